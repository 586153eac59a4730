"""AlexNet: a thin flax.linen shell over `ops` that follows a layer table.

`AlexNet` describes what ONE device computes. As made by `create_model` it is the
whole network; `model.local(mesh, mode)` is the clone that runs on one device of a
mesh, with its share of features and examples and the exchanges between devices.
"""

import functools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh

from alexnet_jax import ops, parallel, variants
from alexnet_jax.ops.reference import pooled_length
from alexnet_jax.variants import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Layer,
    Local,
    Lrn,
    NormalizationKind,
    Pool,
    Stage,
    Variant,
    WithinMapLrn,
)

INITS = ("paper", "caffe", "he")
DTYPES = ("float32", "bfloat16", "float64")
# Of ImageNet's pixels about their mean, on the scale 0..255: the root of a third of
# the sum of the three principal variances (augment.IMAGENET_PCA_STD_255).
PIXEL_STD_255 = 74.4
_ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}


class _Weights(nn.Module):
    """The kernel and bias of one layer, in `dtype`.

    `places`: for how many places, (down, across), there is a kernel and a bias each.
    """

    shape: tuple[int, ...]
    kernel_init: nn.initializers.Initializer
    bias: float
    dtype: Any
    places: tuple[int, ...] = ()

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        # bfloat16 computes with float32 weights; float64 has float64 ones.
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        shape = (*self.places, *self.shape)
        kernel = self.param("kernel", self.kernel_init, shape, param_dtype)
        constant = nn.initializers.constant(self.bias)
        shape = (*self.places, self.shape[-1])
        bias = self.param("bias", constant, shape, param_dtype)
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class AlexNet(nn.Module):
    """The network of a layer table. Made by `create_model`.

    Attributes:
      network: the layer table.
      dtype: what is computed in; parameters are at least float32.
      init: how parameters start, see `create_model`.
      fast: use the backend's fast operators; False keeps forward-mode derivatives.
      conv_shards, fc_shards: over how many devices of the axis "column" the
        convolutional and the fully connected layers are split (1: not).
      batch_axes: the mesh axes that images are split over; empty for the whole
        network. With "column" among them (mode `hybrid`) a device has its own
        examples in the convolutional layers, and all of its row's in the fully
        connected ones.
      parts: a device's share of a batch comes in so many parts, one after the other:
        the examples of neighbouring devices are so many times further apart.
    """

    network: Variant
    dtype: Any = jnp.float32
    init_name: str = "paper"
    fast: bool = True
    conv_shards: int = 1
    fc_shards: int = 1
    batch_axes: tuple[str, ...] = ()
    parts: int = 1

    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        first_example: int | jax.Array = 0,
    ) -> jax.Array:
        """Returns the logits [B, K], in at least float32.

        Args:
          images: float [B, S, S, 3], RGB, 0..255 minus the mean.
          train: dropout and batch statistics as in training; wants
            `rngs={"dropout": key}`.
          first_example: position of images[0] in the global batch. It picks the
            dropout masks, so they do not depend on how the batch is split.

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
    ) -> dict[str, jax.Array]:
        """Returns every layer's output by name, conv1 ... fc7 and logits.

        `conv1` is the layer's output after bias and activation, `norm1` after
        normalisation, `pool1` after pooling. A table may have the activation later
        (`original`: after pooling); then it is in `pool1`, not in `conv1`. On a device
        of a mesh they are its own features, of the examples that it has there.
        Arguments and errors as for `__call__`.
        """
        _check_images(self.network, images)
        x = images.astype(self.dtype)
        own = first_example + jnp.arange(images.shape[0])
        found: dict[str, jax.Array] = {}
        for row in self.network.layers:
            name = "logits" if row is self.network.layers[-1] else row.name
            terms: tuple[jax.Array, ...] = ()
            if isinstance(row, Conv):
                terms = self._conv(row, x, first=row is self.network.layers[0])
                x = ops.add_bias(*terms, fast=self.fast)
            elif isinstance(row, Local):
                x = self._local(row, x)
            else:
                x = self._dense(row, x, last=name == "logits")
            place = _Place(self.conv_shards, self.batch_axes, own)
            if isinstance(row, Dense):
                place = self._dense_place(own)
            found[name] = x
            labels = feature_names(row)
            for i, (stage, label) in enumerate(zip(row.then, labels, strict=True)):
                after_relu = row.then[:i] == (Activation("relu"),)
                if isinstance(stage, Lrn) and terms and after_relu:
                    # Bias and relu once more: the operator has them in its own loop,
                    # and jit drops those that nobody reads.
                    x = self._lrn(stage, place, *terms, relu=True)
                else:
                    x = self._stage(stage, row.name, x, train, place)
                if label:
                    found[label] = x
        return found

    def local(self, mesh: Mesh, mode: str, parts: int = 1) -> "AlexNet":
        """The clone that runs on one device of `mesh`; `parts` as the attribute.

        Raises:
          ValueError: when the network cannot run in that mode, and why.
        """
        columns = mesh.shape[parallel.COLUMN]
        parallel.check_mode(self.network, mode, columns)
        return self.clone(
            conv_shards=columns if mode == "columns" else 1,
            fc_shards=columns,
            batch_axes=parallel.batch_axes(mesh, mode),
            parts=parts,
        )

    @property
    def _trades_examples(self) -> bool:
        return parallel.COLUMN in self.batch_axes

    def _conv(
        self, row: Conv, x: jax.Array, first: bool
    ) -> tuple[jax.Array, jax.Array]:
        """The convolution of x, and the bias that belongs to it."""
        columns = self.network.columns
        if row.sees == "own" and not first:
            groups = columns // self.conv_shards
        else:
            groups = 1
            if not first:
                x = parallel.gather_features(x, self._axis(self.conv_shards))
        shape = (row.kernel, row.kernel, x.shape[-1] // groups)
        kernel, bias = self._weights(row, shape, row.features // self.conv_shards)
        x = ops.grouped_conv(
            x,
            kernel,
            stride=row.stride,
            padding=row.pads(x.shape[1]),
            groups=groups,
            fast=self.fast,
        )
        return x, bias

    def _local(self, row: Local, x: jax.Array) -> jax.Array:
        side = x.shape[1] + 2 * row.padding - row.kernel + 1
        shape = (row.kernel, row.kernel, x.shape[-1])
        kernel, bias = self._weights(row, shape, row.features, (side, side))
        return ops.local_conv(x, kernel, padding=row.padding) + bias

    def _dense(self, row: Dense, x: jax.Array, last: bool) -> jax.Array:
        if last:
            return self._classifier(row, x)
        columns = self.network.columns if row.sees == "own" else 1
        # Columns of its own that this device computes; each reads only its own part.
        own = max(1, columns // self.fc_shards)
        if columns == 1 or self._trades_examples:
            x = self._all_features(x, columns)
            if columns > own:  # mode `hybrid`: all are here, some are needed
                first = lax.axis_index(parallel.COLUMN) * columns // self.fc_shards
                x = lax.dynamic_slice_in_dim(x, first, own, axis=1)
        else:
            x = _by_column(x, own)
        kernel, bias = self._weights(row, x.shape[-1:], row.features // self.fc_shards)
        if own == 1:
            return x.reshape(x.shape[0], -1) @ kernel + bias
        kernel = kernel.reshape(kernel.shape[0], own, -1)
        return jnp.einsum("bgi,igo->bgo", x, kernel).reshape(x.shape[0], -1) + bias

    def _all_features(self, x: jax.Array, columns: int) -> jax.Array:
        """Every feature that a fully connected layer may read: [B, columns, inputs]."""
        if x.ndim == 2:
            x = parallel.gather_features(x, self._axis(self.fc_shards))
        elif self._trades_examples:
            x = parallel.gather_examples(x, self._axis(self.fc_shards))
        else:
            x = parallel.gather_features(x, self._axis(self.conv_shards))
        return _by_column(x, columns)

    def _classifier(self, row: Dense, x: jax.Array) -> jax.Array:
        """The logits of this device's own examples.

        Split by its inputs, which are where they are needed already: one sum of the
        parts of the logits, and the bias added once.
        """
        axis = self._axis(self.fc_shards)
        if x.ndim == 4:  # no layer before it that was split
            x = parallel.trade_examples(x.reshape(x.shape[0], -1), axis)
        kernel, bias = self._weights(row, x.shape[-1:], row.features)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        parts = jnp.matmul(x, kernel, preferred_element_type=wide)
        if self._trades_examples:
            return parallel.sum_own_examples(parts, axis) + bias
        return parallel.sum_parts(parts, axis) + bias

    def _weights(
        self,
        row: Layer,
        inputs: tuple[int, ...],
        features: int,
        places: tuple[int, ...] = (),
    ) -> tuple[jax.Array, jax.Array]:
        kernel_init, bias = _initializers(self.network, row, self.init_name)
        shape = (*inputs, features)
        module = _Weights(shape, kernel_init, bias, self.dtype, places, name=row.name)
        return module()

    def _stage(
        self,
        stage: Stage,
        layer: str,
        x: jax.Array,
        train: bool,
        place: "_Place",
    ) -> jax.Array:
        match stage:
            case Activation(kind=kind):
                return _ACTIVATIONS[kind](x)
            case Lrn():
                return self._lrn(stage, place, x)
            case WithinMapLrn():
                return ops.within_map_response_norm(
                    x,
                    size=stage.size,
                    k=stage.k,
                    alpha=stage.alpha,
                    beta=stage.beta,
                    fast=self.fast,
                )
            case BatchNorm():
                # Over the whole batch; flax hands the names on to `lax.pmean`.
                axes: Any = None if self.is_initializing() else place.batch_axes
                return nn.BatchNorm(
                    use_running_average=not train,
                    momentum=0.9,
                    dtype=self.dtype,
                    param_dtype=jnp.promote_types(self.dtype, jnp.float32),
                    axis_name=axes or None,
                    name=variants.stage_name("norm", layer),
                )(x)
            case Pool():
                pool = ops.avg_pool
                if stage.kind == "max":
                    pool = functools.partial(ops.max_pool, fast=self.fast)
                return pool(
                    x, window=stage.window, stride=stage.stride, ceil=stage.ceil
                )
            case Dropout():
                return self._dropout(stage, x, train, place)

    def _lrn(
        self,
        stage: Lrn,
        place: "_Place",
        x: jax.Array,
        bias: jax.Array | None = None,
        relu: bool = False,
    ) -> jax.Array:
        columns = self.network.columns // place.shards
        return ops.local_response_norm(
            x,
            bias,
            relu=relu,
            size=stage.size,
            k=stage.k,
            alpha=stage.alpha,
            beta=stage.beta,
            groups=columns if stage.per_column else 1,
            alpha_mode=stage.alpha_mode,
            fast=self.fast,
        )

    def _dropout(
        self, stage: Dropout, x: jax.Array, train: bool, place: "_Place"
    ) -> jax.Array:
        if stage.rate == 0.0:
            return x
        keep = 1.0 - stage.rate
        if not train:
            return x * keep if stage.scale_at == "test" else x
        key = self.make_rng("dropout")
        axis = self._axis(place.shards)
        shape = (*x.shape[1:-1], x.shape[-1] * place.shards)

        def mask(example: jax.Array) -> jax.Array:
            # All units of the layer, of which a device keeps its own: the masks
            # are the same however the layer is split.
            drawn = jax.random.bernoulli(
                jax.random.fold_in(key, example), jnp.float32(keep), shape
            )
            if axis is None:
                return drawn
            start = lax.axis_index(axis) * x.shape[-1]
            return lax.dynamic_slice_in_dim(drawn, start, x.shape[-1], axis=-1)

        x = x * jax.vmap(mask)(place.positions)
        return x if stage.scale_at == "test" else x / keep

    def _axis(self, shards: int) -> str | None:
        return parallel.COLUMN if shards > 1 else None

    def _dense_place(self, own: jax.Array) -> "_Place":
        """What a device has in the fully connected layers; `own`: its positions."""
        if not self._trades_examples:
            return _Place(self.fc_shards, self.batch_axes, own)
        # Those of the devices of its row, one device after the other.
        apart = len(own) * self.parts
        others = jnp.arange(self.fc_shards) - lax.axis_index(parallel.COLUMN)
        row = (own + apart * others[:, None]).reshape(-1)
        axes = tuple(axis for axis in self.batch_axes if axis != parallel.COLUMN)
        return _Place(self.fc_shards, axes, row)


@dataclass(frozen=True)
class _Place:
    """What a device has of a layer.

    Attributes:
      shards: one of so many equal parts of the features.
      batch_axes: the mesh axes over which it has only a part of the batch.
      positions: that part's positions in the global batch.
    """

    shards: int
    batch_axes: tuple[str, ...]
    positions: jax.Array


def _by_column(x: jax.Array, columns: int) -> jax.Array:
    """Features [B, ..., C] -> [B, columns, inputs of a column], in the same order."""
    x = x.reshape(*x.shape[:-1], columns, x.shape[-1] // columns)
    return jnp.moveaxis(x, -2, 1).reshape(x.shape[0], columns, -1)


def create_model(
    variant: str = "paper",
    *,
    num_classes: int | None = None,
    width: float = 1.0,
    dtype: Any = jnp.float32,
    init: str = "paper",
    fast: bool = True,
    lrn: bool | None = None,
    pool_window: int | None = None,
    pool_stride: int | None = None,
    pool_kind: variants.PoolKind | None = None,
    activation: variants.ActivationKind | None = None,
    columns: int | None = None,
    dropout: float | None = None,
    normalization: NormalizationKind | None = None,
    norm_layers: Iterable[str] | None = None,
    norm_place: variants.Place | None = None,
    skip: Iterable[str] | None = None,
) -> AlexNet:
    """Makes a network: a named layer table, changed as asked.

    Args:
      variant: the name of a table of `variants.VARIANTS`: "paper", "original", "owt",
        "cifar", ...
      num_classes: units of the classifier; None: the table's own (1,000, or 10).
      width: factor on the features of every layer but the classifier.
      dtype: what is computed in: float32, bfloat16, or float64 (with x64 enabled).
      init: "paper", the recipe that the variant was published with, which is in its
        table (the paper's: N(0, 0.01), and a bias of 1 in conv2, conv4, conv5, fc6
        and fc7); "caffe", as bvlc_alexnet: fc6 and fc7 from N(0, 0.005), biases of
        0.1 instead of 1; "he": He et al. 2015 (fan-in), conv1 scaled down for
        pixels of 0..255, the classifier from N(0, 0.01), biases 0. Narrowed
        networks need "he": with the others they do not leave ln(classes).
      fast: the backend's fast operators; False keeps forward-mode derivatives.
      lrn, pool_window, pool_stride, pool_kind, activation, columns, dropout,
        normalization, norm_layers, norm_place, skip: the ablations, see
        `variants.customize`. None: as in the table.

    Raises:
      ValueError: for a name that does not exist or a value out of range.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r} must be one of {', '.join(INITS)}.")
    if width < 1 and init != "he":
        warnings.warn(
            f"A network of width {width} started with init={init!r} seldom leaves a "
            "loss of ln(classes); use init='he'.",
            stacklevel=2,
        )
    network = variants.customize(
        variants.get(variant),
        num_classes=num_classes,
        width=width,
        lrn=lrn,
        normalization=normalization,
        norm_layers=norm_layers,
        norm_place=norm_place,
        pool_window=pool_window,
        pool_stride=pool_stride,
        pool_kind=pool_kind,
        activation=activation,
        columns=columns,
        dropout=dropout,
        skip=skip,
    )
    return AlexNet(network, dtype=jnp.dtype(dtype), init_name=init, fast=fast)


def from_settings(settings: Mapping[str, Any]) -> AlexNet:
    """Return `create_model` of its arguments by name; None is as if not given."""
    return create_model(**{k: v for k, v in settings.items() if v is not None})


@dataclass(frozen=True)
class LayerSummary:
    """A line of `summary`: shape without the batch; multiply-adds for one image."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def summary(model: AlexNet, image_size: int | None = None) -> list[LayerSummary]:
    """Shapes, parameters and multiply-adds of every layer, nothing computed.

    Raises:
      ValueError: for a size that does not give the table's grid.
    """
    size = image_size or model.network.crop_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    names: list[str] = []

    def trace(key: jax.Array, images: jax.Array) -> Any:
        found, variables = model.init_with_output(key, images, method="features")
        names.extend(found)  # in the order of the layers, which eval_shape forgets
        return found, variables["params"]

    shapes, params = jax.eval_shape(trace, key, images)
    shared = {row.name for row in model.network.convs}  # one kernel for all places
    lines = []
    for name in names:
        feature = shapes[name]
        layer = model.network.layers[-1].name if name == "logits" else name
        weights = params.get(layer, {})
        count = sum(leaf.size for leaf in weights.values())
        shape = feature.shape[1:]
        products = weights["kernel"].size if "kernel" in weights else 0
        if layer in shared:
            products *= shape[0] * shape[1]
        lines.append(LayerSummary(layer, shape, count, products))
    return lines


def _initializers(
    network: Variant, row: Layer, init: str
) -> tuple[nn.initializers.Initializer, float]:
    last = row is network.layers[-1]
    if init == "he" and not last:
        # Fan-in; the pixels that the first layer reads are not of unit variance.
        gain = PIXEL_STD_255**-2 if row is network.layers[0] else 1.0
        places = (0, 1) if isinstance(row, Local) else ()
        he = nn.initializers.variance_scaling(
            2.0 * gain, "fan_in", "normal", batch_axis=places
        )
        return he, 0.0
    if init == "he":
        return nn.initializers.normal(0.01), 0.0
    if init == "caffe":
        std = 0.005 if isinstance(row, Dense) and not last else 0.01
        return nn.initializers.normal(std), 0.1 if row.bias else 0.0
    return nn.initializers.normal(row.weight_std), row.bias


def _check_images(network: Variant, images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images has shape {images.shape}; expected [batch, size, size, 3]."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}; expected floats, RGB from 0 to 255 minus "
            "the mean (`preprocess` of `alexnet_jax.load` makes them)."
        )
    check_image_size(network, images.shape[1])
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"images are {images.shape[1]}x{images.shape[2]}, not square.")


def check_image_size(network: Variant, size: int) -> None:
    """Raises ValueError unless images of `size` give the table's first grid.

    And unless every layer then has an output, which too large a pooling window, or too
    long a stride, does not leave.
    """
    first = network.layers[0]
    if not isinstance(first, Conv) or _grid(first, size) == network.grid:
        _check_sides(network, size)
        return
    fits = [n for n in range(1, 2048) if _grid(first, n) == network.grid]
    raise ValueError(
        f"Variant {network.name!r} needs a {network.grid}x{network.grid} grid after "
        f"{first.name}, from images of {fits[0]} to {fits[-1]} pixels; images of "
        f"{size} pixels give {_grid(first, size)}x{_grid(first, size)}. Set "
        f"--config.data.crop_size={network.crop_size}."
    )


def _check_sides(network: Variant, side: int) -> None:
    """Follows the height and width of the maps, up to the first dense layer."""
    for row in network.layers:
        if isinstance(row, Dense):
            return
        side = _grid(row, side)
        if side < 1:
            raise ValueError(
                f"Variant {network.name!r}: the maps before {row.name} are smaller than "
                f"its {row.kernel}x{row.kernel} kernel; pool less "
                "(--config.model.overrides.pool_window and pool_stride)."
            )
        for stage in row.then:
            if not isinstance(stage, Pool):
                continue
            if max(stage.window, stage.stride) > side:
                raise ValueError(
                    f"Variant {network.name!r}: pool_window={stage.window} and "
                    f"pool_stride={stage.stride} do not fit the {side}x{side} maps of "
                    f"{row.name}: neither may be above {side}."
                )
            side = pooled_length(side, stage.window, stage.stride, ceil=stage.ceil)


def _grid(row: Conv | Local, size: int) -> int:
    """The side of a layer's output; 0 if its kernel is larger than its input."""
    _, sides = row.pads(size)
    stride = row.stride if isinstance(row, Conv) else 1
    return max(0, 1 + (size + sum(sides) - row.kernel) // stride)


def feature_names(row: Layer) -> list[str | None]:
    """Under which name `features` has the output of each of a row's stages.

    An activation belongs to what it is applied to; dropout has no name.
    """
    names: list[str | None] = []
    name = row.name
    for stage in row.then:
        match stage:
            case Lrn() | WithinMapLrn() | BatchNorm():
                name = variants.stage_name("norm", row.name)
            case Pool():
                name = variants.stage_name("pool", row.name)
        names.append(None if isinstance(stage, Dropout) else name)
    return names
