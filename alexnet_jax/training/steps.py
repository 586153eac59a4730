"""Loss, gradients and update: the training, summary and evaluation steps.

Each step is written for one device; `parallel.on_devices` runs it on a mesh. A random
number is a function of (seed, purpose, step, position in the global batch). A step
therefore gives the same numbers on any mesh and after a resume.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax.data import augment
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.models import ops
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.layers import Activation, feature_names
from alexnet_jax.training import metrics, parallel

P = PartitionSpec
PyTree = Any
Arrays = dict[str, jax.Array]  # a batch, features, or scalars, by name

# Purposes of random numbers, folded into the key of the seed.
INIT, DROPOUT, AUGMENT, MIXUP = range(4)


@dataclass(frozen=True)
class StepSpec:
    """Arguments that all steps of a run share.

    Attributes:
      model: the whole network.
      tx: any optax optimiser; evaluation does not use it.
      augmentation: augmentation of training images. Its `crop_size` holds for evaluation
        images too.
      mesh, mode: the devices, and how network and batch are split over them.
      transform: the wrapper around a step, see `parallel.on_devices`.
      seed: seed of all random numbers.
      accumulate_steps: number of micro-batches per device. They pass through the
        network one after the other and make one update, in less memory. Only batch
        normalisation tells the difference: it takes its statistics per micro-batch.
      label_smoothing: label smoothing of the training loss, see `metrics.cross_entropy`.
      loss: another training loss, (logits [B, K], labels [B]) -> [B], in float32. It takes
        no `label_smoothing`.
      frozen: layers whose gradients are not computed; the optimiser gets zeros. `tx`
        must keep these layers as they are, despite weight decay.
      init_extra: parameters -> the first `TrainState.extra`.
      after_update: new state -> state. It runs at the end of each training step, for
        example for a moving average of the weights or for constraints on them.
    """

    model: AlexNet
    tx: optax.GradientTransformation
    augmentation: augment.Augmentation
    mesh: Mesh
    mode: str = "data"
    transform: str = "shard_map"
    seed: int = 0
    accumulate_steps: int = 1
    label_smoothing: float = 0.0
    loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    frozen: Collection[str] = ()
    init_extra: Callable[[PyTree], dict[str, PyTree]] | None = None
    after_update: Callable[["TrainState"], "TrainState"] | None = None

    def __post_init__(self) -> None:
        if self.loss is not None and self.label_smoothing:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} has no effect on a `loss` of your own. "
                "Leave it at 0 and smooth the labels in `loss`."
            )

    @property
    def crop_size(self) -> int:
        return self.augmentation.crop_size

    @property
    def batch_axes(self) -> tuple[str, ...]:
        return parallel.batch_axes(self.mesh, self.mode)

    @property
    def local_model(self) -> AlexNet:
        """The network as one device runs it."""
        return parallel.local_model(self.model, self.mesh, self.mode, self.accumulate_steps)


@flax.struct.dataclass
class TrainState:
    """Arrays that a training step changes.

    Attributes:
      step: int32, number of finished updates.
      params: the one full tree, however it is split over devices.
      batch_stats: running statistics of batch normalisation; empty without it.
      opt_state: the state of the optax optimiser.
      extra: arrays of a researcher's own, by name: `StepSpec.init_extra` makes them and
        `after_update` changes them. Parameters under the name "average" are evaluated,
        and loaded, in place of `params`.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    extra: dict[str, PyTree] = flax.struct.field(default_factory=dict)

    @property
    def eval_params(self) -> PyTree:
        """The parameters to evaluate: the moving average, if there is one."""
        return self.extra.get("average", self.params)


def purpose_key(seed: int, purpose: int) -> jax.Array:
    """Return the random key of a purpose: INIT, DROPOUT, AUGMENT or MIXUP."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def init_state(spec: StepSpec) -> TrainState:
    """Return the first state of a run, sharded by `state_specs`."""
    return _init(spec)()


def abstract_state(spec: StepSpec) -> TrainState:
    """Return shapes, dtypes and shardings of a state, to restore a checkpoint into."""
    return _init(spec).eval_shape()


def _init(spec: StepSpec) -> Any:
    return jax.jit(
        lambda: _first_state(*_origin(spec)),
        out_shardings=parallel.shardings(spec.mesh, state_specs(spec)),
    )


def _origin(spec: StepSpec) -> tuple[Any, ...]:
    return spec.model, spec.tx, spec.init_extra, spec.seed, spec.crop_size


def state_specs(spec: StepSpec) -> TrainState:
    """Return the PartitionSpec of every leaf of a TrainState.

    Arrays of the optimiser, or of `extra`, that are named and shaped like a parameter are
    split like it. All others are whole on every device.
    """
    shapes: Any = _first_state.eval_shape(*_origin(spec))
    network = spec.model.network
    params, batch_stats = (
        parallel.param_specs(network, tree, spec.mesh, spec.mode)
        for tree in (shapes.params, shapes.batch_stats)
    )
    leaves = jax.tree_util.tree_leaves_with_path(shapes.params)
    names = [path for path, _ in leaves]  # (layer, "kernel" or "bias")
    found = zip([leaf.shape for _, leaf in leaves], jax.tree.leaves(params), strict=True)
    known = dict(zip(names, found, strict=True))

    def like_params(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        shape, split = known.get(path[-2:], (None, P()))
        return split if leaf.shape == shape else P()

    opt_state, extra = (
        jax.tree_util.tree_map_with_path(like_params, tree)
        for tree in (shapes.opt_state, shapes.extra)
    )
    return shapes.replace(
        step=P(), params=params, batch_stats=batch_stats, opt_state=opt_state, extra=extra
    )


# Jitted so that JAX caches the trace: a run asks for the shapes half a dozen times.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _first_state(
    model: AlexNet,
    tx: optax.GradientTransformation,
    init_extra: Callable[[PyTree], dict[str, PyTree]] | None,
    seed: int,
    crop_size: int,
) -> TrainState:
    images = jnp.zeros((1, crop_size, crop_size, 3), jnp.float32)
    variables = model.init(purpose_key(seed, INIT), images)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(params),
        extra=init_extra(params) if init_extra else {},
    )


def make_train_step(spec: StepSpec) -> Callable[..., tuple[TrainState, Arrays]]:
    """Return the jitted training step: (state, batch, statistics) -> (state, metrics).

    `batch` is {"image": uint8 [B, S, S, 3], "label": int32 [B]}: the global batch,
    split over `spec.batch_axes`. `statistics` are those of `augment.train_images`. The
    state is donated. `metrics` holds the batch's mean "loss" in nats, its "top1_error"
    in [0, 1], and the learning rate "lr" of the update, if the optimiser's state tells
    it (`optax.inject_hyperparams`).

    Each device computes its gradients. The optimiser and `after_update` see whole arrays,
    which XLA keeps split: a norm is that of the whole kernel on any mesh.

    On a CPU the step has compiler options (`ops.jit`), which JAX accepts only at the
    top: use `step.__wrapped__` inside another jit, scan or grad.
    """
    specs = state_specs(spec)

    trained = {layer: specs.params[layer] for layer in specs.params if layer not in spec.frozen}

    def device_step(
        state: TrainState, batch: Arrays, statistics: Statistics
    ) -> tuple[PyTree, PyTree, Arrays]:
        result = loss_and_grad(spec, specs.params, state, batch, statistics)
        loss, error = lax.pmean((result.loss, result.top1_error), spec.batch_axes)
        return result.grads, result.batch_stats, {"loss": loss, "top1_error": error}

    def network_of(state: TrainState) -> TrainState:
        return dataclasses.replace(state, opt_state=(), extra={})

    gradients = parallel.on_devices(
        device_step,
        spec.mesh,
        (network_of(specs), P(spec.batch_axes), P()),
        (trained, specs.batch_stats, P()),
        spec.transform,
    )

    def train_step(
        state: TrainState, batch: Arrays, statistics: Statistics
    ) -> tuple[TrainState, Arrays]:
        grads, batch_stats, scalars = gradients(network_of(state), batch, statistics)
        # Frozen layers have a gradient of 0.
        grads = {**jax.tree.map(jnp.zeros_like, state.params), **grads}
        opt_state: Any
        with jax.named_scope("update"):
            tx = optax.with_extra_args_support(spec.tx)
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, value=scalars["loss"], grad=grads
            )
            params = optax.apply_updates(state.params, updates)
        new_state = TrainState(state.step + 1, params, batch_stats, opt_state, state.extra)
        if spec.after_update:
            new_state = spec.after_update(new_state)
        found = optax.tree.get_all_with_path(opt_state, "learning_rate")
        if rates := [value for _, value in found if isinstance(value, jax.Array)]:
            scalars = scalars | {"lr": rates[0]}
        shardings = parallel.shardings(spec.mesh, (specs, P()))
        return lax.with_sharding_constraint((new_state, scalars), shardings)

    return ops.jit(train_step, donate_argnums=0)


class PassResult(NamedTuple):
    """Result of `loss_and_grad`.

    Attributes:
      grads: of the mean loss over the global batch, summed over devices; without frozen
        layers.
      batch_stats: the updated running statistics.
      loss, top1_error: means over this device's shard of the batch.
      observed: results of `observe`, stacked over the micro-batches.
    """

    grads: PyTree
    batch_stats: PyTree
    loss: jax.Array
    top1_error: jax.Array
    observed: PyTree


def loss_and_grad(
    spec: StepSpec,
    param_specs: PyTree,
    state: TrainState,
    batch: Arrays,
    statistics: Statistics,
    observe: Callable[[Arrays], PyTree] = lambda features: (),
) -> PassResult:
    """Run the forward and backward pass over one device's shard of the batch.

    Args:
      param_specs: how the parameters are split.
      observe: maps the features of a micro-batch to arrays that are returned.
    """
    model, axes, count = spec.local_model, spec.batch_axes, spec.accumulate_steps
    size = batch["label"].shape[0] // count  # of a micro-batch
    first = lax.axis_index(axes) * size * count
    scale = 1.0 / (lax.axis_size(axes) * count)
    augment_key, dropout_key, mixup_key = (
        jax.random.fold_in(purpose_key(spec.seed, purpose), state.step)
        for purpose in (AUGMENT, DROPOUT, MIXUP)
    )
    # From here on each device has its own gradients. They are summed once, at the end,
    # for any number of micro-batches.
    params = parallel.vary(state.params, param_specs, axes)

    def without_frozen(tree: dict[str, PyTree]) -> dict[str, PyTree]:
        return {layer: tree[layer] for layer in tree if layer not in spec.frozen}

    def micro_batch(
        batch_stats: PyTree, batch: Arrays, first_example: jax.Array
    ) -> tuple[PyTree, PyTree, Any]:
        """Return gradients, running statistics and (loss, error, observed)."""
        images = augment.train_images(
            batch["image"],
            augment_key,
            first_example,
            statistics,
            spec.augmentation,
            jnp.promote_types(model.dtype, jnp.float32),  # the network rounds images
            step=state.step,
        )
        mixed = None
        if spec.augmentation.mixup:
            mixed = augment.mixup(
                images, batch["label"], mixup_key, first_example, spec.augmentation.mixup
            )
            images = mixed.images

        def example_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
            if spec.loss is None:
                return metrics.cross_entropy(logits, labels, spec.label_smoothing)
            return spec.loss(logits, labels)

        def loss_fn(trained: PyTree) -> tuple[jax.Array, Any]:
            features, changed = model.apply(
                {"params": {**params, **trained}, "batch_stats": batch_stats},
                images,
                train=True,
                first_example=first_example,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
                method="features",
            )
            labels, logits = batch["label"], features["logits"]
            losses = example_losses(logits, labels)
            if losses.shape != labels.shape:
                raise ValueError(
                    f"StepSpec.loss must return one number per example, {list(labels.shape)}; "
                    f"got shape {list(losses.shape)}."
                )
            if mixed is not None:
                others = example_losses(logits, mixed.other_labels)
                losses = mixed.share * losses + (1 - mixed.share) * others
                labels = jnp.where(mixed.share >= 0.5, labels, mixed.other_labels)
            loss = jnp.mean(losses)
            error = jnp.mean(~metrics.in_top_k(logits, labels, 1), dtype=loss.dtype)
            return scale * loss, (changed, (loss, error, observe(features)))

        trained = without_frozen(params)
        grads, (changed, seen) = jax.grad(loss_fn, has_aux=True)(trained)
        # Running statistics stay in float32, whatever dtype computed them.
        new_stats = jax.tree.map(
            lambda new, old: new.astype(old.dtype), changed.get("batch_stats", {}), batch_stats
        )
        return grads, new_stats, seen

    if count == 1:
        grads, batch_stats, seen = micro_batch(state.batch_stats, batch, first)
        seen = jax.tree.map(lambda a: a[None], seen)
    else:

        def add(carry: Any, xs: Any) -> Any:
            (sums, batch_stats), (i, part) = carry, xs
            grads, batch_stats, seen = micro_batch(batch_stats, part, first + i * size)
            return (jax.tree.map(jnp.add, sums, grads), batch_stats), seen

        parts = jax.tree.map(lambda a: a.reshape(count, size, *a.shape[1:]), batch)
        zeros = jax.tree.map(jnp.zeros_like, without_frozen(params))
        (grads, batch_stats), seen = lax.scan(
            add, (zeros, state.batch_stats), (jnp.arange(count, dtype=jnp.int32), parts)
        )
    losses, errors, observed = seen
    grads = parallel.sum_gradients(grads, without_frozen(param_specs), axes)
    return PassResult(grads, batch_stats, losses.mean(), errors.mean(), observed)


def make_summary_step(spec: StepSpec) -> Callable[..., Arrays]:
    """Return the jitted summary step: (state, batch, statistics) -> scalars.

    The arguments are those of the training step that follows, which sees the same
    batch, weights and keys. Nothing is changed. The scalars:

    - `grad_norm/<layer>`: L2 norm of the gradient of the mean loss over the global
      batch, over the layer's kernel and bias together, without weight decay.
    - `dead_relu/<layer>`: fraction in [0, 1] of a ReLU layer's units that are zero for
      every example of the global batch. A feature map is one unit, zero everywhere.
    - `train/loss`: mean loss before the update, in nats.
    """
    specs, axes, relu = state_specs(spec), spec.batch_axes, Activation("relu")
    rows = {row.name: row for row in spec.model.network.layers if relu in row.then}
    # The name of the activation's output, which may differ from the layer's.
    outputs = {layer: feature_names(row)[row.then.index(relu)] for layer, row in rows.items()}

    def alive_units(features: Arrays) -> Arrays:
        """Return which units are non-zero somewhere; NaN counts as alive."""
        return {
            layer: jnp.any(features[name] != 0, axis=range(features[name].ndim - 1))
            for layer, name in outputs.items()
            if name
        }

    def device_step(state: TrainState, batch: Arrays, statistics: Statistics) -> Arrays:
        result = loss_and_grad(spec, specs.params, state, batch, statistics, alive_units)
        scalars = {"train/loss": lax.pmean(result.loss, axes)}
        for layer, grads in result.grads.items():
            split = specs.params[layer]
            squares = [
                parallel.sum_shards(jnp.sum(jnp.square(grad)), split[name])
                for name, grad in grads.items()
            ]
            scalars[f"grad_norm/{layer}"] = jnp.sqrt(sum(squares))
        for layer, parts in result.observed.items():
            # Alive in any micro-batch, on any device. Units are split like the bias.
            bias_spec = specs.params[layer]["bias"]
            replicas = parallel.replicated_axes(bias_spec, axes)
            alive = parts.any(0).astype(jnp.int32)
            if replicas:
                alive = lax.pmax(alive, replicas)
            dead = parallel.sum_shards(jnp.sum(1 - alive), bias_spec)
            scalars[f"dead_relu/{layer}"] = dead / rows[layer].features
        return scalars

    in_specs = (specs, P(axes), P())
    step = parallel.on_devices(device_step, spec.mesh, in_specs, P(), spec.transform)
    return ops.jit(step)


def make_eval_step(spec: StepSpec, views: int = 1) -> Callable[..., Arrays]:
    """Return the jitted (params, batch_stats, batch, statistics) -> sums.

    `batch` also has a "mask" [B], 1 for examples and 0 for padding. The sums over the
    global batch are those of `metrics.sums`, for the centre view. With several `views`
    (`augment.several_views`) the same sums under "views_..." are those of the mean
    probabilities over the views (section 4.1).
    """

    def sums_of(logits: jax.Array, batch: Arrays) -> Arrays:
        labels, mask = batch["label"], batch["mask"]
        sums = metrics.sums(logits[0], labels, mask)
        if views > 1:
            averaged = metrics.log_mean_probabilities(logits)
            several = metrics.sums(averaged, labels, mask)
            sums |= {f"views_{name}": value for name, value in several.items()}
        return lax.psum(sums, spec.batch_axes)

    step = _on_views(spec, views, sums_of, P(), spec.transform)
    return ops.jit(step)


def make_predict_step(spec: StepSpec, views: int = 1) -> Callable[..., Arrays]:
    """Return the jitted (params, batch_stats, batch, statistics) -> predictions.

    They are natural logarithms of probabilities, [B, K], whole on every device:
    "centre" for the centre view and, with several `views`, "views" for the mean over
    the views. The step always runs under `shard_map`.
    """

    def predictions_of(logits: jax.Array, _: Any) -> Arrays:
        predictions = {"centre": metrics.log_mean_probabilities(logits[:1])}
        if views > 1:
            predictions["views"] = metrics.log_mean_probabilities(logits)
        return predictions

    step = _on_views(spec, views, predictions_of, P(spec.batch_axes))
    return ops.jit(step, out_shardings=NamedSharding(spec.mesh, P()))


def _on_views(
    spec: StepSpec,
    views: int,
    finish: Callable[[jax.Array, Arrays], Arrays],
    out_specs: PartitionSpec,
    transform: str = "shard_map",
) -> Callable[..., Arrays]:
    """Return (params, batch_stats, batch, statistics) -> finish(logits [V, B, K], batch).

    Each device runs one view of one micro-batch after the other, to save memory.
    """
    model, crop_size = spec.local_model, spec.crop_size

    def device_step(
        params: PyTree, batch_stats: PyTree, batch: Arrays, statistics: Statistics
    ) -> Arrays:
        variables = {"params": params, "batch_stats": batch_stats}

        def logits_of(view: jax.Array) -> Any:
            images = augment.eval_images(
                view,
                mean_image=statistics.mean_image,
                crop_size=crop_size,
                dtype=jnp.promote_types(model.dtype, jnp.float32),
            )
            return model.apply(variables, images)

        cut = augment.several_views(batch["image"], views, crop_size)
        pieces = views * spec.accumulate_steps
        logits = lax.map(logits_of, cut.reshape((pieces, -1, *cut.shape[2:])))
        return finish(logits.reshape(views, -1, logits.shape[-1]), batch)

    specs = state_specs(spec)
    in_specs = (specs.params, specs.batch_stats, P(spec.batch_axes), P())
    return parallel.on_devices(device_step, spec.mesh, in_specs, out_specs, transform)
