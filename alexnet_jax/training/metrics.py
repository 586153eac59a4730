"""Top-k errors and masked sums. The cross-entropy is optax's."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Return losses [B] in nats, in at least float32.

    Args:
      logits: [B, K].
      labels: int [B].
      smoothing: the target is 1 - smoothing for the label, plus smoothing / K for every
        class, as in `optax.smooth_labels` (Szegedy et al. 2016, section 7). No [B, K]
        targets are made.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing == 0:
        return loss
    uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    return (1 - smoothing) * loss + smoothing * uniform


def in_top_k(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Return bool [B]: the label is among the k largest logits.

    Ties are ordered by index, as in `lax.top_k`, so logits that are all equal score as
    chance. NaN counts as the largest logit, so a broken network is wrong.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    index = jnp.arange(logits.shape[-1])
    before = ~(logits <= own) | ((logits == own) & (index < labels[:, None]))
    return before.sum(-1) < k


def shows_top5(num_classes: int) -> bool:
    """Return False for five classes or fewer, whose top-5 error is always 0."""
    return num_classes > 5


def log_mean_probabilities(logits: jax.Array) -> jax.Array:
    """Return log of the mean probabilities, [B, K], of the logits [V, B, K] of V views.

    The paper averages "the predictions made by the network's softmax layer" (4.1).
    """
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits.astype(wide), axis=-1)
    return jax.nn.logsumexp(log_probabilities, axis=0) - jnp.log(logits.shape[0])


def sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Return sums over the examples whose mask is 1.

    Returns:
      {"loss": in nats, "top1", "top5": correct examples, "count": examples}. With five
      classes or fewer, "top5" equals "count".
    """
    mask = mask.astype(jnp.promote_types(logits.dtype, jnp.float32))
    loss = jnp.where(mask > 0, cross_entropy(logits, labels), 0.0)
    return {
        "loss": jnp.sum(loss),
        "top1": jnp.sum(in_top_k(logits, labels, 1) * mask),
        "top5": jnp.sum(in_top_k(logits, labels, 5) * mask),
        "count": jnp.sum(mask),
    }
