"""Top-k and masked sums, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alexnet_jax.training import metrics

LOGITS = jnp.array(
    [
        [5.0, 1.0, 2.0, 3.0, 4.0, 0.0],
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [jnp.nan, 1.0, 2.0, 3.0, 4.0, 5.0],
    ]
)


def test_in_top_k_counts_ties_by_index_and_nan_as_wrong():
    labels = jnp.array([0, 0, 0, 5])
    top1 = metrics.in_top_k(LOGITS, labels, 1)
    np.testing.assert_array_equal(top1, [True, False, True, False])
    top5 = metrics.in_top_k(LOGITS, labels, 5)
    np.testing.assert_array_equal(top5, [True, False, True, True])
    # All alike: chance, not always right.
    alike = jnp.zeros((6, 6))
    assert metrics.in_top_k(alike, jnp.arange(6), 1).sum() == 1
    assert metrics.in_top_k(alike, jnp.arange(6), 5).sum() == 5


def test_sums_leave_padding_out():
    labels = jnp.array([0, 5, 1, 5])
    mask = jnp.array([1.0, 1.0, 1.0, 0.0])  # the row with NaN is padding
    sums = metrics.sums(LOGITS, labels, mask)
    row = np.log(np.exp(np.arange(6.0)).sum())
    expected = (row - 5) + (row - 5) + np.log(6)
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
    assert (sums["top1"], sums["top5"], sums["count"]) == (2, 3, 3)


def test_few_classes_are_always_in_the_top_five():
    assert metrics.in_top_k(jnp.zeros((3, 3)), jnp.arange(3), 5).all()


def test_probabilities_are_averaged_not_logits():
    logits = np.random.default_rng(0).normal(0, 3, (4, 5, 6))
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    got = metrics.log_mean_probabilities(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(got, np.log(probabilities.mean(0)), rtol=1e-4)
    assert metrics.log_mean_probabilities(jnp.zeros((2, 3, 4), jnp.bfloat16)).dtype == (jnp.float32)


def test_smoothed_cross_entropy_is_that_of_smoothed_targets():
    """Compare with a loop over the classes, and with optax's targets [B, K]."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(5, 7)) * 4).astype(np.float32)
    logits[4] = 0.0  # a network that guesses
    labels = rng.integers(0, 7, 5).astype(np.int32)

    @jax.jit
    def losses(logits, labels):
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 7), 0.1)
        return (
            metrics.cross_entropy(logits, labels, 0.1),
            optax.softmax_cross_entropy(logits, targets),
            metrics.cross_entropy(logits, labels),
            metrics.cross_entropy(logits, labels, 0.0),
        )

    smoothed, expected, plain, zero = losses(logits, labels)
    np.testing.assert_allclose(smoothed, expected, rtol=1e-5)
    np.testing.assert_array_equal(zero, plain)
    np.testing.assert_allclose(smoothed[4], np.log(7), rtol=1e-6)
    for i, row in enumerate(logits.astype(np.float64)):
        log_probabilities = row - np.log(np.exp(row).sum())
        targets = 0.9 * (np.arange(7) == labels[i]) + 0.1 / 7
        np.testing.assert_allclose(smoothed[i], -(targets * log_probabilities).sum(), rtol=1e-5)
