"""The steps of a run, each as what one device does: training, summary, evaluation.

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

from alexnet_jax.data import augment
from alexnet_jax.data.augment import PixelStatistics
from alexnet_jax.models import ops
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.layers import Activation, feature_names
from alexnet_jax.training import metrics, parallel

P = PartitionSpec
PyTree = Any
Arrays = dict[str, jax.Array]  # a batch, features, or scalars, by name

# The purposes of randomness: what is folded into the key of the seed first.
INIT, DROPOUT, AUGMENT = range(3)


@dataclass(frozen=True)
class StepSpec:
    """What the steps of a run share.

    Attributes:
      model: the whole network.
      tx: the optimiser; evaluation does not use it.
      augmentation: how training images are made; all images have its `crop_size`.
      mesh, mode: the devices, and how the network and the batch are split over them.
      transform: the wrapper around a step, see `parallel.on_devices`.
      seed: for all that is random.
      accumulate_steps: each device cuts its share of the batch into so many equal parts
        that go through the network one after the other: the same one update, in less
        memory. Only batch normalisation tells a difference: its statistics are then
        those of one part (of every device).
      label_smoothing: in the loss of training, see `metrics.cross_entropy`.
      frozen: layers whose gradients are neither computed nor exchanged, but zeros. It is
        for `tx` to leave them where they are, weight decay included.
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
    frozen: Collection[str] = ()

    @property
    def crop_size(self) -> int:
        return self.augmentation.crop_size

    @property
    def batch_axes(self) -> tuple[str, ...]:
        return parallel.batch_axes(self.mesh, self.mode)

    @property
    def local_model(self) -> AlexNet:
        """The network of one device."""
        return parallel.local_model(
            self.model, self.mesh, self.mode, self.accumulate_steps
        )


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
    """Return the key of one purpose: INIT, DROPOUT or AUGMENT."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def init_state(spec: StepSpec) -> TrainState:
    """Make a new run's state, each leaf where its PartitionSpec puts it."""
    init = jax.jit(
        lambda: _first_state(spec.model, spec.tx, spec.seed, spec.crop_size),
        out_shardings=parallel.shardings(spec.mesh, state_specs(spec)),
    )
    return init()


def abstract_state(spec: StepSpec) -> TrainState:
    """Return shapes, dtypes and shardings of a state: what a checkpoint is read into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        _shapes(spec),
        parallel.shardings(spec.mesh, state_specs(spec)),
    )


def state_specs(spec: StepSpec) -> TrainState:
    """Return the PartitionSpec of every leaf of a TrainState.

    The optimiser's state is split like the parameters it belongs to: left to `jit`
    the whole momentum would sit on one device.
    """
    shapes, network = _shapes(spec), spec.model.network
    params, batch_stats = (
        parallel.param_specs(network, tree, spec.mesh, spec.mode)
        for tree in (shapes.params, shapes.batch_stats)
    )
    return shapes.replace(
        step=P(),
        params=params,
        batch_stats=batch_stats,
        opt_state=optax.tree.map_params(
            spec.tx,
            lambda _, param_spec: param_spec,
            shapes.opt_state,
            params,
            transform_non_params=lambda _: P(),
        ),
    )


def _shapes(spec: StepSpec) -> Any:
    return _first_state.eval_shape(spec.model, spec.tx, 0, spec.crop_size)


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


def make_train_step(spec: StepSpec) -> Callable[..., tuple[TrainState, Arrays]]:
    """Return the jitted (state, batch, statistics) -> (state, metrics).

    `batch` is {"image": uint8 [B, S, S, 3], "label": int32 [B]}, B global and split
    over `parallel.batch_axes`; the state is donated. The metrics are the batch's mean
    "loss", its "top1_error", and the learning rate "lr" of the update.

    On a CPU the step has compiler options (`ops.jit`), which JAX takes at the top only:
    inside another jit, scan or grad use `step.__wrapped__`.
    """
    specs = state_specs(spec)
    loss_and_grad = LossAndGrad(spec, specs.params)

    def device_step(
        state: TrainState, batch: Arrays, statistics: PixelStatistics
    ) -> tuple[TrainState, Arrays]:
        found = loss_and_grad(state, batch, statistics)
        loss, wrong = lax.pmean((found.loss, found.wrong), spec.batch_axes)
        opt_state: Any
        grads = {**jax.tree.map(jnp.zeros_like, state.params), **found.grads}
        updates, opt_state = spec.tx.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=found.batch_stats,
            opt_state=opt_state,
        )
        rate = opt_state.hyperparams["learning_rate"]
        return new_state, {"loss": loss, "top1_error": wrong, "lr": rate}

    in_specs = (specs, P(spec.batch_axes), P())
    step = parallel.on_devices(
        device_step, spec.mesh, in_specs, (specs, P()), spec.transform
    )
    return ops.jit(step, donate_argnums=0)


class PassResult(NamedTuple):
    """The result of `LossAndGrad`.

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
class LossAndGrad:
    """Forward and backward pass over one device's shard of the batch.

    Attributes:
      param_specs: how the parameters are split.
      observe: takes the features of a part, returns arrays to be kept.
    """

    spec: StepSpec
    param_specs: PyTree
    observe: Callable[[Arrays], PyTree] = lambda features: ()

    def __call__(
        self, state: TrainState, batch: Arrays, statistics: PixelStatistics
    ) -> PassResult:
        """Return the gradients of training at `state`, on one device of the mesh."""
        count, share = self.spec.accumulate_steps, batch["label"].shape[0]
        axes, specs = self.spec.batch_axes, self.param_specs
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
                now = dataclasses.replace(state, batch_stats=stats)
                position = first + i * (share // count)
                grads, stats, seen = self._part(now, part, position, statistics, scale)
                return (jax.tree.map(jnp.add, sums, grads), stats), seen

            parts = jax.tree.map(
                lambda a: a.reshape(count, share // count, *a.shape[1:]), batch
            )
            zeros = jax.tree.map(jnp.zeros_like, self._trained(params))
            (grads, stats), seen = lax.scan(
                add_part,
                (zeros, state.batch_stats),
                (jnp.arange(count, dtype=jnp.int32), parts),
            )
        losses, wrong, observed = seen
        grads = parallel.sum_gradients(grads, self._trained(specs), axes)
        return PassResult(grads, stats, losses.mean(), wrong.mean(), observed)

    def _trained(self, tree: dict[str, PyTree]) -> dict[str, PyTree]:
        """Return the part of a tree like the parameters' that is not frozen."""
        return {layer: tree[layer] for layer in tree if layer not in self.spec.frozen}

    def _part(
        self,
        state: TrainState,
        batch: Arrays,
        first_example: jax.Array,
        statistics: PixelStatistics,
        scale: float,
    ) -> tuple[PyTree, PyTree, Any]:
        """Return the gradients of `scale` times the mean loss, batch_stats, what was seen.

        Keys belong to the examples' positions in the global batch, whichever part
        they are in; raw images become floats here, so never more than a part of them.
        """
        model, seed = self.spec.local_model, self.spec.seed
        images = augment.train_images(
            batch["image"],
            jax.random.fold_in(purpose_key(seed, AUGMENT), state.step),
            first_example,
            statistics,
            self.spec.augmentation,
            _wide(model.dtype),
            step=state.step,
        )
        dropout_key = jax.random.fold_in(purpose_key(seed, DROPOUT), state.step)

        def loss_fn(trained: PyTree) -> tuple[jax.Array, Any]:
            params = {**state.params, **trained}
            features, changed = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                first_example=first_example,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
                method="features",
            )
            labels, logits = batch["label"], features["logits"]
            losses = metrics.cross_entropy(logits, labels, self.spec.label_smoothing)
            loss = jnp.mean(losses)
            wrong = jnp.mean(~metrics.in_top_k(logits, labels, 1), dtype=loss.dtype)
            return scale * loss, (changed, (loss, wrong, self.observe(features)))

        trained = self._trained(state.params)
        grads, (changed, seen) = jax.grad(loss_fn, has_aux=True)(trained)
        # flax keeps running statistics in float32 whatever they were added up in
        stats = jax.tree.map(
            lambda new, old: new.astype(old.dtype),
            changed.get("batch_stats", {}),
            state.batch_stats,
        )
        return grads, stats, seen


def make_summary_step(spec: StepSpec) -> Callable[..., Arrays]:
    """Return the jitted (state, batch, statistics) -> scalars; changes nothing.

    They tell what the training step is about to see, on the same batch, weights and
    keys as that step:

    - `grad_norm/<layer>`: L2 norm of the gradient of the mean loss over the global
      batch with respect to the layer's kernel and bias together, without the decay.
    - `dead_relu/<layer>`: share in [0, 1] of the layer's units (a feature map, or a
      fully connected unit) that are zero at every position for every example of the
      global batch. Of the layers whose activation is relu.
    - `train/loss`: the mean loss before the update.
    """
    specs, axes, relu = state_specs(spec), spec.batch_axes, Activation("relu")
    rows = {row.name: row for row in spec.model.network.layers if relu in row.then}
    # What the activation gives, which is not always the layer's own name.
    outputs = {
        layer: feature_names(row)[row.then.index(relu)] for layer, row in rows.items()
    }

    def alive(features: Arrays) -> Arrays:
        """Return which units are not zero everywhere; not a number counts as alive."""
        return {
            layer: jnp.any(features[name] != 0, axis=range(features[name].ndim - 1))
            for layer, name in outputs.items()
            if name
        }

    loss_and_grad = LossAndGrad(spec, specs.params, alive)

    def device_step(
        state: TrainState, batch: Arrays, statistics: PixelStatistics
    ) -> Arrays:
        found = loss_and_grad(state, batch, statistics)
        scalars = {"train/loss": lax.pmean(found.loss, axes)}
        for layer, grads in found.grads.items():
            split = specs.params[layer]
            squares = [
                parallel.sum_shards(jnp.sum(jnp.square(grad)), split[name])
                for name, grad in grads.items()
            ]
            scalars[f"grad_norm/{layer}"] = jnp.sqrt(sum(squares))
        for layer, parts in found.observed.items():
            # Alive in any part, for any device's examples; a unit is split as its bias.
            bias_spec = specs.params[layer]["bias"]
            elsewhere = parallel.replicated_axes(bias_spec, axes)
            alive = parts.any(0).astype(jnp.int32)
            if elsewhere:
                alive = lax.pmax(alive, elsewhere)
            dead = parallel.sum_shards(jnp.sum(1 - alive), bias_spec)
            scalars[f"dead_relu/{layer}"] = dead / rows[layer].features
        return scalars

    in_specs = (specs, P(axes), P())
    step = parallel.on_devices(device_step, spec.mesh, in_specs, P(), spec.transform)
    return ops.jit(step)


def make_eval_step(spec: StepSpec, views: int = 1) -> Callable[..., Arrays]:
    """Return the jitted (params, batch_stats, batch, statistics) -> sums.

    `batch` also has a "mask" [B], 1 for real examples and 0 for padding; the sums
    over the whole batch are those of `metrics.sums`, of the centre view. With more
    `views` (`augment.several_views`) the same sums come again under "views_...", of the
    probabilities averaged over the views, as in section 4.1 of the paper.
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

    They are logarithms of probabilities, [B, K], whole on every device: "centre", and
    with more `views` "views", of the probabilities averaged over them: those of which
    `make_eval_step` gives the sums. Always under `shard_map`.
    """

    def predictions_of(logits: jax.Array, _: Any) -> Arrays:
        found = {"centre": metrics.log_mean_probabilities(logits[:1])}
        if views > 1:
            found["views"] = metrics.log_mean_probabilities(logits)
        return found

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

    On each device one view and one part of its share of the batch goes through the
    network after the other, in the memory of one.
    """
    model, crop_size = spec.local_model, spec.crop_size

    def device_step(
        params: PyTree, batch_stats: PyTree, batch: Arrays, statistics: PixelStatistics
    ) -> Arrays:
        variables = {"params": params, "batch_stats": batch_stats}

        def logits_of(view: jax.Array) -> Any:
            images = augment.eval_images(
                view,
                mean_image=statistics.mean_image,
                crop_size=crop_size,
                dtype=_wide(model.dtype),
            )
            return model.apply(variables, images)

        cut = augment.several_views(batch["image"], views, crop_size)
        pieces = views * spec.accumulate_steps
        logits = lax.map(logits_of, cut.reshape((pieces, -1, *cut.shape[2:])))
        return finish(logits.reshape(views, -1, logits.shape[-1]), batch)

    specs = state_specs(spec)
    in_specs = (specs.params, specs.batch_stats, P(spec.batch_axes), P())
    return parallel.on_devices(device_step, spec.mesh, in_specs, out_specs, transform)


def _wide(dtype: Any) -> Any:
    """Images are prepared in at least float32; the network rounds them if it must."""
    return jnp.promote_types(dtype, jnp.float32)
