"""TrainState, and what one device does in a training, summary or evaluation step.

Everything random comes from (seed, purpose, step, position in the global batch), so
a step is the same on any number of devices and after a resume.
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

from alexnet_jax import augment, metrics, ops, parallel
from alexnet_jax.alexnet import AlexNet
from alexnet_jax.layers import Activation, feature_names

P = PartitionSpec
PyTree = Any

# The purposes of randomness: what is folded into the key of the seed first.
INIT, DROPOUT, AUGMENT = range(3)


@flax.struct.dataclass
class TrainState:
    """All that a step changes; arrays only.

    Attributes:
      step: int32, the number of updates made.
      params: the one full tree, however it is split over devices.
      batch_stats: running statistics of batch normalisation, else empty.
      opt_state: optax's.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


def purpose_key(seed: int, purpose: int) -> jax.Array:
    """The key of one purpose: INIT, DROPOUT or AUGMENT."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def init_state(
    model: AlexNet,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    crop_size: int,
    mesh: Mesh,
    mode: str,
) -> TrainState:
    """A new run's state, each leaf made where its spec puts it."""
    specs = state_specs(model, tx, crop_size=crop_size, mesh=mesh, mode=mode)
    init = jax.jit(
        lambda: _first_state(model, tx, seed, crop_size),
        out_shardings=parallel.shardings(mesh, specs),
    )
    return init()


def abstract_state(
    model: AlexNet,
    tx: optax.GradientTransformation,
    *,
    crop_size: int,
    mesh: Mesh,
    mode: str,
) -> TrainState:
    """The shapes, dtypes and shardings of a state: what a checkpoint is read into."""
    specs = state_specs(model, tx, crop_size=crop_size, mesh=mesh, mode=mode)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        _shapes(model, tx, crop_size),
        parallel.shardings(mesh, specs),
    )


def state_specs(
    model: AlexNet,
    tx: optax.GradientTransformation,
    *,
    crop_size: int,
    mesh: Mesh,
    mode: str,
) -> TrainState:
    """The PartitionSpec of every leaf of a TrainState.

    The optimiser's state is split like the parameters it belongs to: left to `jit`
    the whole momentum would sit on one device.
    """
    shapes = _shapes(model, tx, crop_size)
    params = parallel.param_specs(model.network, shapes.params, mesh, mode)
    return shapes.replace(
        step=P(),
        params=params,
        batch_stats=parallel.param_specs(model.network, shapes.batch_stats, mesh, mode),
        opt_state=optax.tree.map_params(
            tx,
            lambda _, spec: spec,
            shapes.opt_state,
            params,
            transform_non_params=lambda _: P(),
        ),
    )


def _shapes(model: AlexNet, tx: optax.GradientTransformation, crop_size: int) -> Any:
    return _first_state.eval_shape(model, tx, 0, crop_size)


# Jitted for jax to remember its trace: a run asks for the shapes half a dozen times.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _first_state(
    model: AlexNet, tx: optax.GradientTransformation, seed: int, crop_size: int
) -> TrainState:
    images = jnp.zeros((1, crop_size, crop_size, 3), jnp.float32)
    variables = model.init(purpose_key(seed, INIT), images)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
    )


def make_train_step(
    model: AlexNet,
    tx: optax.GradientTransformation,
    augmentation: augment.Augmentation,
    *,
    mesh: Mesh,
    mode: str,
    seed: int,
    accumulate_steps: int = 1,
    label_smoothing: float = 0.0,
    frozen: Collection[str] = (),
    transform: str = "shard_map",
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted (state, batch, statistics) -> (state, metrics).

    `batch` is {"image": uint8 [B, S, S, 3], "label": int32 [B]}, B global and split
    over `parallel.batch_axes`; the state is donated. The metrics are the batch's mean
    "loss", its "top1_error", and the learning rate "lr" of the update. The loss is
    against labels smoothed by `label_smoothing` (`metrics.cross_entropy`). `transform`
    is `parallel.on_devices`'.

    `frozen` are layers whose gradients are not computed, nor exchanged: zeros. It is for
    `tx` to leave them where they are, weight decay included.

    With `accumulate_steps` n each device cuts its share of the batch into n equal
    parts that go through the network one after the other: the same one update, in
    less memory. Only batch normalisation tells a difference: its statistics are then
    of one part (of every device).

    On a CPU the step has compiler options (`ops.compiler_options`), which JAX takes at
    the top only: inside another jit, scan or grad use `step.__wrapped__`.
    """
    specs = state_specs(
        model, tx, crop_size=augmentation.crop_size, mesh=mesh, mode=mode
    )
    local = parallel.local_model(model, mesh, mode, accumulate_steps)
    through = _Pass(
        local,
        augmentation,
        seed,
        accumulate_steps,
        label_smoothing,
        frozenset(frozen),
        specs.params,
    )
    step = parallel.on_devices(
        functools.partial(_device_train_step, through, tx),
        mesh,
        (specs, P(through.batch_axes), P()),
        (specs, P()),
        transform,
    )
    return jax.jit(step, donate_argnums=0, compiler_options=ops.compiler_options())


def _device_train_step(
    through: "_Pass",
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: dict[str, jax.Array],
    statistics: augment.PixelStatistics,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One device's share of a training step."""
    found = through.gradients(state, batch, statistics)
    loss, wrong = lax.pmean((found.loss, found.wrong), through.batch_axes)
    opt_state: Any
    grads = {**jax.tree.map(jnp.zeros_like, state.params), **found.grads}
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=found.batch_stats,
        opt_state=opt_state,
    )
    rate = opt_state.hyperparams["learning_rate"]
    return new_state, {"loss": loss, "top1_error": wrong, "lr": rate}


class _Gradients(NamedTuple):
    """What a batch's way through the network and back gives.

    Attributes:
      grads: of the mean loss over the global batch, summed over devices already; of the
        layers that are not frozen.
      batch_stats: the running statistics afterwards.
      loss, wrong: means over this device's share of the batch.
      observed: what `observe` gave, each array stacked over the parts.
    """

    grads: PyTree
    batch_stats: PyTree
    loss: jax.Array
    wrong: jax.Array
    observed: PyTree


@dataclass(frozen=True)
class _Pass:
    """A device's share of a batch through the network and back.

    Attributes:
      model: the device's own, from `model.local`.
      accumulate_steps: the number of parts, one after the other; the model's, too.
      label_smoothing: of the loss, see `metrics.cross_entropy`.
      frozen: layers that no gradient is worked out for.
      param_specs: how the parameters are split.
      observe: takes the features of a part, returns arrays to be kept.
    """

    model: AlexNet
    augmentation: augment.Augmentation
    seed: int
    accumulate_steps: int
    label_smoothing: float
    frozen: frozenset[str]
    param_specs: PyTree
    observe: Callable[[dict[str, jax.Array]], PyTree] = lambda features: ()

    @property
    def batch_axes(self) -> tuple[str, ...]:
        return self.model.exchange.batch_axes

    def trained(self, tree: dict[str, PyTree]) -> dict[str, PyTree]:
        """The part of a tree like the parameters' that is not frozen."""
        return {layer: tree[layer] for layer in tree if layer not in self.frozen}

    def gradients(
        self,
        state: TrainState,
        batch: dict[str, jax.Array],
        statistics: augment.PixelStatistics,
    ) -> _Gradients:
        """Training's gradients at `state`, on one device of a mesh."""
        count, share = self.accumulate_steps, batch["label"].shape[0]
        axes, specs = self.batch_axes, self.param_specs
        first = lax.axis_index(axes) * share
        # From here on each device's own: its gradients are summed once, at the end,
        # however many parts there are.
        params = parallel.vary(state.params, specs, axes)
        state = dataclasses.replace(state, params=params)
        scale = 1.0 / (lax.axis_size(axes) * count)
        if count == 1:
            grads, stats, seen = self._part(state, batch, first, statistics, scale)
            seen = jax.tree.map(lambda a: a[None], seen)
        else:

            def add_part(carry: Any, xs: Any) -> Any:
                (sums, stats), (i, part) = carry, xs
                position = first + i * (share // count)
                grads, stats, seen = self._part(
                    dataclasses.replace(state, batch_stats=stats),
                    part,
                    position,
                    statistics,
                    scale,
                )
                return (jax.tree.map(jnp.add, sums, grads), stats), seen

            parts = jax.tree.map(
                lambda a: a.reshape(count, share // count, *a.shape[1:]), batch
            )
            (grads, stats), seen = lax.scan(
                add_part,
                (
                    jax.tree.map(jnp.zeros_like, self.trained(params)),
                    state.batch_stats,
                ),
                (jnp.arange(count, dtype=jnp.int32), parts),
            )
        losses, wrong, observed = seen
        grads = parallel.sum_gradients(grads, self.trained(specs), axes)
        return _Gradients(grads, stats, losses.mean(), wrong.mean(), observed)

    def _part(
        self,
        state: TrainState,
        batch: dict[str, jax.Array],
        first_example: jax.Array,
        statistics: augment.PixelStatistics,
        scale: float,
    ) -> tuple[PyTree, PyTree, Any]:
        """Gradients of `scale` times the mean loss, batch_stats, what was seen.

        Keys belong to the examples' positions in the global batch, whichever part
        they are in; pictures become floats here, so never more than a part of them.
        """
        images = augment.train_images(
            batch["image"],
            jax.random.fold_in(purpose_key(self.seed, AUGMENT), state.step),
            first_example,
            statistics,
            self.augmentation,
            _wide(self.model.dtype),
            step=state.step,
        )
        dropout_key = jax.random.fold_in(purpose_key(self.seed, DROPOUT), state.step)

        def loss_fn(trained: PyTree) -> tuple[jax.Array, Any]:
            features, changed = self.model.apply(
                {
                    "params": {**state.params, **trained},
                    "batch_stats": state.batch_stats,
                },
                images,
                train=True,
                first_example=first_example,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
                method="features",
            )
            labels, logits = batch["label"], features["logits"]
            losses = metrics.cross_entropy(logits, labels, self.label_smoothing)
            loss = jnp.mean(losses)
            wrong = jnp.mean(~metrics.in_top_k(logits, labels, 1), dtype=loss.dtype)
            return scale * loss, (changed, (loss, wrong, self.observe(features)))

        trained = self.trained(state.params)
        grads, (changed, seen) = jax.grad(loss_fn, has_aux=True)(trained)
        # flax keeps running statistics in float32 whatever they were added up in
        stats = jax.tree.map(
            lambda new, old: new.astype(old.dtype),
            changed.get("batch_stats", {}),
            state.batch_stats,
        )
        return grads, stats, seen


def make_summary_step(
    model: AlexNet,
    tx: optax.GradientTransformation,
    augmentation: augment.Augmentation,
    *,
    mesh: Mesh,
    mode: str,
    seed: int,
    accumulate_steps: int = 1,
    label_smoothing: float = 0.0,
    frozen: Collection[str] = (),
    transform: str = "shard_map",
) -> Callable[..., dict[str, jax.Array]]:
    """Returns the jitted (state, batch, statistics) -> scalars; changes nothing.

    They tell what the training step is about to see, on the same batch, weights and
    keys as that step:

    - `grad_norm/<layer>`: L2 norm of the gradient of the mean loss over the global
      batch with respect to the layer's kernel and bias together, without the decay.
    - `dead_relu/<layer>`: share in [0, 1] of the layer's units (a feature map, or a
      fully connected unit) that are zero at every position for every example of the
      global batch. Of the layers whose activation is relu.
    - `train/loss`: the mean loss before the update.
    """
    specs = state_specs(
        model, tx, crop_size=augmentation.crop_size, mesh=mesh, mode=mode
    )
    relu = Activation("relu")
    rows = [row for row in model.network.layers if relu in row.then]
    units = {row.name: row.features for row in rows}
    # What the activation gives, which is not always the layer's own name.
    outputs = {row.name: feature_names(row)[row.then.index(relu)] for row in rows}

    def alive(features: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Which units are not zero everywhere; not a number counts as alive."""
        return {
            layer: jnp.any(features[name] != 0, axis=range(features[name].ndim - 1))
            for layer, name in outputs.items()
            if name
        }

    through = _Pass(
        parallel.local_model(model, mesh, mode, accumulate_steps),
        augmentation,
        seed,
        accumulate_steps,
        label_smoothing,
        frozenset(frozen),
        specs.params,
        alive,
    )
    device_step = functools.partial(_device_summary_step, through, units)
    in_specs = (specs, P(through.batch_axes), P())
    step = parallel.on_devices(device_step, mesh, in_specs, P(), transform)
    return jax.jit(step, compiler_options=ops.compiler_options())


def _device_summary_step(
    through: _Pass,
    units: dict[str, int],
    state: TrainState,
    batch: dict[str, jax.Array],
    statistics: augment.PixelStatistics,
) -> dict[str, jax.Array]:
    """One device's share of a summary; `units`: of each layer, over all devices."""
    found = through.gradients(state, batch, statistics)
    axes, param_specs = through.batch_axes, through.param_specs
    scalars = {"train/loss": lax.pmean(found.loss, axes)}
    for layer, grads in found.grads.items():
        squares = [
            parallel.sum_shards(jnp.sum(jnp.square(grad)), param_specs[layer][name])
            for name, grad in grads.items()
        ]
        scalars[f"grad_norm/{layer}"] = jnp.sqrt(sum(squares))
    for layer, parts in found.observed.items():
        # Alive in any part, for any device's examples; a unit is split as its bias is.
        spec = param_specs[layer]["bias"]
        elsewhere = parallel.replicated_axes(spec, axes)
        alive = parts.any(0).astype(jnp.int32)
        if elsewhere:
            alive = lax.pmax(alive, elsewhere)
        dead = parallel.sum_shards(jnp.sum(1 - alive), spec)
        scalars[f"dead_relu/{layer}"] = dead / units[layer]
    return scalars


def make_eval_step(
    model: AlexNet,
    *,
    mesh: Mesh,
    mode: str,
    crop_size: int,
    views: int = 1,
    parts: int = 1,
    transform: str = "shard_map",
) -> Callable[..., dict[str, jax.Array]]:
    """Returns the jitted (params, batch_stats, batch, statistics) -> sums.

    `batch` also has a "mask" [B], 1 for real examples and 0 for padding; the sums
    over the whole batch are those of `metrics.sums`, of the centre view. With more
    `views` (`augment.several_views`) the same sums come again under "views_...", of the
    probabilities averaged over the views, as in section 4.1 of the paper. Each device's
    share of the batch goes through the network in `parts`, one after the other.
    """
    local = parallel.local_model(model, mesh, mode)

    def sums_of(logits: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        labels, mask = batch["label"], batch["mask"]
        sums = metrics.sums(logits[0], labels, mask)
        if views > 1:
            averaged = metrics.log_mean_probabilities(logits)
            several = metrics.sums(averaged, labels, mask)
            sums |= {f"views_{name}": value for name, value in several.items()}
        return lax.psum(sums, local.exchange.batch_axes)

    device_step = _on_views(local, sums_of, crop_size, views, parts)
    in_specs = _eval_specs(model, mesh, mode, crop_size)
    step = parallel.on_devices(device_step, mesh, in_specs, P(), transform)
    return jax.jit(step, compiler_options=ops.compiler_options())


def make_predict_step(
    model: AlexNet,
    *,
    mesh: Mesh,
    mode: str,
    crop_size: int,
    views: int = 1,
    parts: int = 1,
) -> Callable[..., dict[str, jax.Array]]:
    """Returns the jitted (params, batch_stats, batch, statistics) -> predictions.

    They are logarithms of probabilities, [B, K], whole on every device: "centre", and
    with more `views` "views", of the probabilities averaged over them. Arguments as of
    `make_eval_step`, whose sums are of the same numbers.
    """
    local = parallel.local_model(model, mesh, mode)

    def predictions_of(logits: jax.Array, _: Any) -> dict[str, jax.Array]:
        found = {"centre": metrics.log_mean_probabilities(logits[:1])}
        if views > 1:
            found["views"] = metrics.log_mean_probabilities(logits)
        return found

    device_step = _on_views(local, predictions_of, crop_size, views, parts)
    in_specs = _eval_specs(model, mesh, mode, crop_size)
    step = parallel.on_devices(
        device_step, mesh, in_specs, P(local.exchange.batch_axes)
    )
    return jax.jit(
        step,
        out_shardings=NamedSharding(mesh, P()),
        compiler_options=ops.compiler_options(),
    )


def _eval_specs(
    model: AlexNet, mesh: Mesh, mode: str, crop_size: int
) -> tuple[PyTree, ...]:
    """Of params, batch_stats, batch and statistics."""
    specs = state_specs(
        model, optax.identity(), crop_size=crop_size, mesh=mesh, mode=mode
    )
    axes = parallel.batch_axes(mesh, mode)
    return specs.params, specs.batch_stats, P(axes), P()


def _on_views(
    local: AlexNet,
    finish: Callable[[jax.Array, dict[str, jax.Array]], dict[str, jax.Array]],
    crop_size: int,
    views: int,
    parts: int,
) -> Callable[..., dict[str, jax.Array]]:
    """A device's (params, batch_stats, batch, statistics) -> finish(logits, batch).

    The logits are [V, B, K]. One view and one part after the other, in the memory of one.
    """

    def device_step(
        params: PyTree,
        batch_stats: PyTree,
        batch: dict[str, jax.Array],
        statistics: augment.PixelStatistics,
    ) -> dict[str, jax.Array]:
        variables = {"params": params, "batch_stats": batch_stats}

        def logits_of(view: jax.Array) -> Any:
            images = augment.eval_images(
                view,
                mean_image=statistics.mean_image,
                crop_size=crop_size,
                dtype=_wide(local.dtype),
            )
            return local.apply(variables, images)

        cut = augment.several_views(batch["image"], views, crop_size)
        logits = lax.map(logits_of, cut.reshape((views * parts, -1, *cut.shape[2:])))
        return finish(logits.reshape(views, -1, logits.shape[-1]), batch)

    return device_step


def _wide(dtype: Any) -> Any:
    """Images are prepared in at least float32; the network rounds them if it must."""
    return jnp.promote_types(dtype, jnp.float32)
