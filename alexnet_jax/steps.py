"""TrainState, and what one device does in a training and in an evaluation step.

Everything random comes from (seed, purpose, step, position in the global batch), so
a step is the same on any number of devices and after a resume.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from alexnet_jax import augment, metrics, parallel
from alexnet_jax.model import AlexNet

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
    return jax.eval_shape(lambda: _first_state(model, tx, 0, crop_size))


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
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted (state, batch, statistics) -> (state, metrics).

    `batch` is {"image": uint8 [B, S, S, 3], "label": int32 [B]}, B global and split
    over "data"; the state is donated. The metrics are the batch's mean "loss", its
    "top1_error", and the learning rate "lr" of the update.
    """
    device_step = functools.partial(
        _device_train_step, model.local(mesh, mode), tx, augmentation, seed
    )
    specs = state_specs(
        model, tx, crop_size=augmentation.crop_size, mesh=mesh, mode=mode
    )
    step = parallel.shard_map(
        device_step, mesh, (specs, P(parallel.DATA), P()), (specs, P())
    )
    return jax.jit(step, donate_argnums=0)


def _device_train_step(
    model: AlexNet,
    tx: optax.GradientTransformation,
    augmentation: augment.Augmentation,
    seed: int,
    state: TrainState,
    batch: dict[str, jax.Array],
    statistics: augment.PixelStatistics,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One device's share of a training step, inside `shard_map`."""
    labels = batch["label"]
    first_example = lax.axis_index(parallel.DATA) * labels.shape[0]
    images = augment.train_images(
        batch["image"],
        jax.random.fold_in(purpose_key(seed, AUGMENT), state.step),
        first_example,
        statistics,
        augmentation,
        _wide(model.dtype),
    )
    dropout_key = jax.random.fold_in(purpose_key(seed, DROPOUT), state.step)

    def loss_fn(params: PyTree) -> tuple[jax.Array, Any]:
        # From here on each device's own: the gradient of this line is the sum of the
        # devices' gradients, as the mean below asks for.
        params = parallel.vary(params, parallel.DATA)
        logits, changed = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            first_example=first_example,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        loss = jnp.mean(metrics.cross_entropy(logits, labels))
        right = jnp.mean(metrics.in_top_k(logits, labels, 1), dtype=loss.dtype)
        mean_loss, mean_right = lax.pmean((loss, right), parallel.DATA)
        return mean_loss, (1.0 - mean_right, changed)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (top1_error, changed)), grads = grad_fn(state.params)
    opt_state: Any
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        # flax keeps running statistics in float32 whatever they were added up in
        batch_stats=jax.tree.map(
            lambda new, old: new.astype(old.dtype),
            changed.get("batch_stats", {}),
            state.batch_stats,
        ),
        opt_state=opt_state,
    )
    rate = opt_state.hyperparams["learning_rate"]
    return new_state, {"loss": loss, "top1_error": top1_error, "lr": rate}


def make_eval_step(
    model: AlexNet, *, mesh: Mesh, mode: str, crop_size: int
) -> Callable[..., dict[str, jax.Array]]:
    """Returns the jitted (params, batch_stats, batch, statistics) -> sums.

    `batch` also has a "mask" [B], 1 for real examples and 0 for padding; the sums
    over the whole batch are those of `metrics.sums`. The centre view is taken.
    """
    local = model.local(mesh, mode)

    def device_step(
        params: PyTree,
        batch_stats: PyTree,
        batch: dict[str, jax.Array],
        statistics: augment.PixelStatistics,
    ) -> dict[str, jax.Array]:
        images = augment.eval_images(
            batch["image"],
            mean_image=statistics.mean_image,
            crop_size=crop_size,
            dtype=_wide(model.dtype),
        )
        logits: Any = local.apply(
            {"params": params, "batch_stats": batch_stats}, images
        )
        sums = metrics.sums(logits, batch["label"], batch["mask"])
        return lax.psum(sums, parallel.DATA)

    specs = state_specs(
        model, optax.identity(), crop_size=crop_size, mesh=mesh, mode=mode
    )
    in_specs = (specs.params, specs.batch_stats, P(parallel.DATA), P())
    return jax.jit(parallel.shard_map(device_step, mesh, in_specs, P()))


def _wide(dtype: Any) -> Any:
    """Images are prepared in at least float32; the network rounds them if it must."""
    return jnp.promote_types(dtype, jnp.float32)
