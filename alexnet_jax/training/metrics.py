"""Top-k errors and masked sums. The cross-entropy is optax's."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0
) -> jax.Array:
    """[B, K] logits and int [B] labels -> [B] losses in nats, at least float32.

    With `smoothing` the target is (1 - smoothing) of the label and an equal share of
    the rest for every class, the label among them, as `optax.smooth_labels` has it
    (Szegedy et al. 2016, section 7): without the [B, K] targets themselves.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing == 0:
        return loss
    uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    return (1 - smoothing) * loss + smoothing * uniform


def in_top_k(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether each label is among its k largest logits, [B] bool.

    The label's rank is the number of classes before it: those of a larger logit, and
    of equal ones those with a smaller index (as `lax.top_k` orders them), so logits
    that are all alike score as chance, not as right. A logit that is not a number
    counts as larger than any label's: a broken network is wrong, not lucky.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    index = jnp.arange(logits.shape[-1])
    before = ~(logits <= own) | ((logits == own) & (index < labels[:, None]))
    return before.sum(-1) < k


def shows_top5(num_classes: int) -> bool:
    """Return False for five classes or fewer, whose top-5 error is always 0."""
    return num_classes > 5


def log_mean_probabilities(logits: jax.Array) -> jax.Array:
    """[V, B, K] logits of V views -> [B, K] logarithms of the mean probabilities.

    The paper averages "the predictions made by the network's softmax layer" (4.1).
    """
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits.astype(wide), axis=-1)
    return jax.nn.logsumexp(log_probabilities, axis=0) - jnp.log(logits.shape[0])


def sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the examples whose mask is 1: loss, top1, top5 (right ones), count.

    With five classes or fewer top5 is always right.
    """
    mask = mask.astype(jnp.promote_types(logits.dtype, jnp.float32))
    loss = jnp.where(mask > 0, cross_entropy(logits, labels), 0.0)
    return {
        "loss": jnp.sum(loss),
        "top1": jnp.sum(in_top_k(logits, labels, 1) * mask),
        "top5": jnp.sum(in_top_k(logits, labels, 5) * mask),
        "count": jnp.sum(mask),
    }
