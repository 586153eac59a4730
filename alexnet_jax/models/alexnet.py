"""AlexNet: a Flax module that walks a layer table from top to bottom."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from alexnet_jax.models import ops, variants
from alexnet_jax.models.ablations import customize
from alexnet_jax.models.exchange import Exchange, Part
from alexnet_jax.models.layers import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Layer,
    Local,
    Lrn,
    Pool,
    Stage,
    Variant,
    WithinMapLrn,
    feature_names,
    stage_name,
    table_from_json,
)
from alexnet_jax.models.summary import check_image_size

INITS = ("paper", "caffe", "he")
DTYPES = ("float32", "bfloat16", "float64")
# Standard deviation of ImageNet's pixels, 0..255: the root of a third of the sum of the three
# principal variances (augment.IMAGENET_PCA_STD_255).
PIXEL_STD_255 = 74.4
_ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}


class _Weights(nn.Module):
    """The kernel of one layer in `dtype`, and its bias in at least float32.

    A locally connected layer has a kernel and a bias per place; `places` is (down, across).
    """

    shape: tuple[int, ...]
    kernel_init: nn.initializers.Initializer
    bias: float
    dtype: Any
    places: tuple[int, ...] = ()

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        dtype = _param_dtype(self.dtype)
        kernel = self.param("kernel", self.kernel_init, (*self.places, *self.shape), dtype)
        constant = nn.initializers.constant(self.bias)
        bias = self.param("bias", constant, (*self.places, self.shape[-1]), dtype)
        return kernel.astype(self.dtype), bias


class AlexNet(nn.Module):
    """The network of a layer table; `create_model` makes it.

    Attributes:
      network: the layer table.
      dtype: dtype of the computation; parameters are at least float32.
      init_name: rule for the initial weights and biases, see `create_model`.
      fast: use the backend's fast operators; False supports forward-mode derivatives.
      exchange: which part of the network this device has, and how it gets what other devices
        have. The default has everything; `parallel.local_model` sets another.
    """

    network: Variant
    dtype: Any = jnp.float32
    init_name: str = "paper"
    fast: bool = True
    exchange: Exchange = Exchange(batch_axes=())

    def __call__(
        self, images: jax.Array, train: bool = False, first_example: int | jax.Array = 0
    ) -> jax.Array:
        """Return the logits [B, K], in at least float32.

        Args:
          images: float [B, S, S, 3], RGB, 0..255 minus the mean.
          train: use dropout and the statistics of the batch; needs `rngs={"dropout": key}`.
          first_example: position of images[0] in the global batch. Dropout masks follow it, so
            they do not depend on how the batch is split.

        Raises:
          ValueError: for a size that does not give the table's grid.
        """
        return self.features(images, train, first_example)["logits"]

    @nn.compact
    def features(
        self,
        images: jax.Array,
        train: bool = False,
        first_example: int | jax.Array = 0,
        *,
        pre_activations: bool = False,
    ) -> dict[str, jax.Array]:
        """Return the output of every layer by name: conv1, norm1, pool1 ... fc7, logits.

        `conv1` is the output after bias and activation, `norm1` after normalisation, `pool1`
        after pooling. An activation keeps the name of its input: in `original` conv1's comes
        after pooling, so `pool1` has it and `conv1` does not. A device of a mesh returns its own
        features of its own examples. Other arguments and errors are those of `__call__`.

        Args:
          pre_activations: also return `conv1_pre` ... `fc7_pre`, the weighted sums plus biases,
            before any stage. Class visualisation maximises them: unlike ReLU's output they have
            a gradient everywhere.
        """
        _check_images(self.network, images)
        x = images.astype(self.dtype)
        positions = first_example + jnp.arange(images.shape[0])
        features: dict[str, jax.Array] = {}
        *rows, classifier = self.network.layers
        for row in rows:
            part = self.exchange.part(row, positions)
            conv_and_bias = None
            match row:
                case Conv():
                    conv_and_bias = self._conv(row, x, part)
                    x = ops.add_bias(*conv_and_bias, fast=self.fast)
                case Local():
                    x = self._local(row, x)
                case Dense():
                    x = self._dense(row, x, part)
            if pre_activations:
                features[f"{row.name}_pre"] = x
            features[row.name] = x
            for i, (stage, name) in enumerate(zip(row.then, feature_names(row), strict=True)):
                # LRN adds the bias and applies ReLU again, in its own loop, and max pooling
                # normalises again, which is faster. jit drops the results that nobody reads.
                match row.then[:i], stage:
                    case (Activation("relu"),), Lrn() if conv_and_bias:
                        x = self._lrn(stage, part, *conv_and_bias, relu=True)
                    case (Activation("relu"), Lrn() as lrn), Pool(kind="max") if conv_and_bias:
                        x = self._lrn(lrn, part, *conv_and_bias, relu=True, pool=stage)
                    case _:
                        x = self._stage(stage, row.name, x, train, part)
                if name:
                    features[name] = x
        features["logits"] = self._classifier(classifier, x)
        return features

    def _conv(self, row: Conv, x: jax.Array, part: Part) -> tuple[jax.Array, jax.Array]:
        """Return the convolution of x, and the bias to add to it."""
        groups = 1
        if row is not self.network.layers[0]:  # The first layer reads whole images.
            if row.sees == "own":
                groups = self.network.columns // part.shards
            else:
                x = self.exchange.gather_features(x)
        inputs, outputs = x.shape[-1] // groups, row.features // part.shards
        kernel, bias = self._weights(row, (row.kernel, row.kernel, inputs, outputs))
        pads = row.pads(x.shape[1])
        x = ops.grouped_conv(
            x, kernel, stride=row.stride, padding=pads, groups=groups, fast=self.fast
        )
        return x, bias

    def _local(self, row: Local, x: jax.Array) -> jax.Array:
        side = row.side(x.shape[1])
        shape = (row.kernel, row.kernel, x.shape[-1], row.features)
        kernel, bias = self._weights(row, shape, places=(side, side))
        return (ops.local_conv(x, kernel, padding=row.padding) + bias).astype(self.dtype)

    def _dense(self, row: Dense, x: jax.Array, part: Part) -> jax.Array:
        columns = self.network.columns if row.sees == "own" else 1
        x = self.exchange.dense_inputs(x, columns)
        batch, own_columns, inputs = x.shape
        kernel, bias = self._weights(row, (inputs, row.features // part.shards))
        if own_columns == 1:
            x = x.reshape(batch, inputs) @ kernel
        else:
            kernel = kernel.reshape(inputs, own_columns, -1)
            x = jnp.einsum("bgi,igo->bgo", x, kernel).reshape(batch, -1)
        return (x + bias).astype(self.dtype)

    def _classifier(self, row: Layer, x: jax.Array) -> jax.Array:
        """Return the logits of this device's own examples.

        The layer is split by its inputs, which are on the right device already. The partial
        logits are summed once, and the bias is added once.
        """
        x = self.exchange.classifier_inputs(x)
        kernel, bias = self._weights(row, (x.shape[-1], row.features))
        partial_logits = ops.wide_matmul(x, kernel, fast=self.fast)
        return self.exchange.sum_logits(partial_logits) + bias

    def _weights(
        self, row: Layer, shape: tuple[int, ...], places: tuple[int, ...] = ()
    ) -> tuple[jax.Array, jax.Array]:
        kernel_init, bias = _initializers(self.network, row, self.init_name)
        return _Weights(shape, kernel_init, bias, self.dtype, places, name=row.name)()

    def _stage(self, stage: Stage, layer: str, x: jax.Array, train: bool, part: Part) -> jax.Array:
        match stage:
            case Activation(kind):
                return _ACTIVATIONS[kind](x)
            case Lrn():
                return self._lrn(stage, part, x)
            case WithinMapLrn(size, k, alpha, beta):
                return ops.within_map_response_norm(
                    x, size=size, k=k, alpha=alpha, beta=beta, fast=self.fast
                )
            case BatchNorm():
                # Statistics of the global batch: flax passes the axes to `lax.pmean`.
                axes: Any = None if self.is_initializing() else part.batch_axes
                return nn.BatchNorm(
                    use_running_average=not train,
                    momentum=0.9,
                    dtype=self.dtype,
                    param_dtype=_param_dtype(self.dtype),
                    axis_name=axes or None,
                    name=stage_name("norm", layer),
                )(x)
            case Pool(window, stride, "max", ceil):
                return ops.max_pool(x, window=window, stride=stride, ceil=ceil, fast=self.fast)
            case Pool(window, stride, _, ceil):
                return ops.avg_pool(x, window=window, stride=stride, ceil=ceil)
            case Dropout(rate):
                key = self.make_rng("dropout") if train and rate > 0 else None
                return dropout(x, stage, key, part)

    def _lrn(
        self,
        stage: Lrn,
        part: Part,
        x: jax.Array,
        bias: jax.Array | None = None,
        relu: bool = False,
        pool: Pool | None = None,
    ) -> jax.Array:
        windows = pool and {"window": pool.window, "stride": pool.stride, "ceil": pool.ceil}
        return ops.local_response_norm(
            x,
            bias,
            relu=relu,
            size=stage.size,
            k=stage.k,
            alpha=stage.alpha,
            beta=stage.beta,
            groups=self.network.columns // part.shards if stage.per_column else 1,
            alpha_mode=stage.alpha_mode,
            pool=windows,
            fast=self.fast,
        )


@jax.named_scope("dropout")
def dropout(x: jax.Array, stage: Dropout, key: jax.Array | None, part: Part) -> jax.Array:
    """Drop units [B, ..., F] at random; without a key only scale them, for the evaluation.

    A mask follows the example's position in the global batch and the unit's in the whole layer:
    it does not depend on how the two are split.
    """
    keep = 1.0 - stage.rate
    if key is None:
        return x * keep if stage.scale_at == "test" else x
    units = x.shape[-1]

    def mask(example: jax.Array) -> jax.Array:
        """Draw for all units of the layer, and keep those of this device."""
        shape = (*x.shape[1:-1], units * part.shards)
        drawn = jax.random.bernoulli(jax.random.fold_in(key, example), jnp.float32(keep), shape)
        if part.shards == 1:
            return drawn
        return lax.dynamic_slice_in_dim(drawn, part.index * units, units, axis=-1)

    x = x * jax.vmap(mask)(part.positions)
    return x if stage.scale_at == "test" else x / keep


def create_model(
    variant: str | Variant = "paper",
    *,
    num_classes: int | None = None,
    width: float = 1.0,
    dtype: Any = jnp.float32,
    init: str = "paper",
    fast: bool = True,
    **ablations: Any,
) -> AlexNet:
    """Build the network of a layer table.

    Args:
      variant: a table, or the name of one in `variants.VARIANTS`, for example "paper" or "owt".
      num_classes: units of the last layer; None: the table's own (1,000 or 10).
      width: factor on the features of every layer but the last.
      dtype: dtype of the computation: float32, bfloat16, or float64 (with x64 enabled).
      init: rule for the initial weights and biases.
        "paper": as the table says. In the paper's own, weights have a standard deviation of
          0.01, and biases are 1 in conv2, conv4, conv5, fc6 and fc7.
        "caffe": as bvlc_alexnet. The standard deviation is 0.005 in fc6 and fc7, and biases are
          0.1 instead of 1.
        "he": He et al. 2015 (fan-in), conv1 scaled down for pixels of 0..255, the last layer
          with a standard deviation of 0.01, biases 0. Narrow networks need it: with the others
          their loss seldom leaves ln(classes).
      fast: use the backend's fast operators; False supports forward-mode derivatives.
      **ablations: changes of the table, for example `lrn=False`, `pool_window=2` or `columns=1`.
        `ablations.ABLATIONS` lists them. None: no change.

    Raises:
      TypeError: for an unknown ablation.
      ValueError: for another unknown name, or a value out of range.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r} must be one of {', '.join(INITS)}.")
    if width < 1 and init != "he":
        warnings.warn(
            f"A network of width {width} started with init={init!r} seldom leaves a loss of "
            "ln(classes); use init='he'.",
            stacklevel=2,
        )
    table = variant if isinstance(variant, Variant) else variants.get(variant)
    network = customize(table, num_classes=num_classes, width=width, **ablations)
    return AlexNet(network, dtype=jnp.dtype(dtype), init_name=init, fast=fast)


def from_settings(settings: Mapping[str, Any]) -> AlexNet:
    """Return `create_model(**settings)` without the settings that are None.

    "table", if it is not empty, is the variant as JSON (`layers.table_to_json`).
    """
    given = {k: v for k, v in settings.items() if v is not None}
    if table := given.pop("table", ""):
        given["variant"] = table_from_json(table)
    return create_model(**given)


def _initializers(
    network: Variant, row: Layer, init: str
) -> tuple[nn.initializers.Initializer, float]:
    """Return the initializer of a layer's kernel and the initial value of its biases."""
    normal, last = nn.initializers.normal, row is network.layers[-1]
    if init == "he" and not last:
        # The first layer reads pixels, which do not have unit variance.
        gain = PIXEL_STD_255**-2 if row is network.layers[0] else 1.0
        places = (0, 1) if isinstance(row, Local) else ()
        he = nn.initializers.variance_scaling(2.0 * gain, "fan_in", "normal", batch_axis=places)
        return he, 0.0
    if init == "he":
        return normal(0.01), 0.0
    if init == "caffe":
        std = 0.005 if isinstance(row, Dense) and not last else 0.01
        return normal(std), 0.1 if row.bias else 0.0
    return normal(row.weight_std), row.bias


def _param_dtype(dtype: Any) -> Any:
    """Return the dtype of weights and logits: bfloat16 computes with float32 ones."""
    return jnp.promote_types(dtype, jnp.float32)


def _check_images(network: Variant, images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images has shape {images.shape}; expected [batch, size, size, 3].")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}; expected floats, RGB from 0 to 255 minus the mean "
            "(`preprocess` of `alexnet_jax.load` makes them)."
        )
    check_image_size(network, images.shape[1])
    if images.shape[1] != images.shape[2]:
        raise ValueError(
            f"images are {images.shape[1]}x{images.shape[2]}, not square. Crop them first "
            "(`preprocess` of `alexnet_jax.load` does)."
        )
