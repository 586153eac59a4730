"""Binary codes: packing, exact Hamming search, gain by training, files."""

import numpy as np
import pytest

from alexnet_jax.analysis import codes as codes_lib
from alexnet_jax.analysis import retrieval
from alexnet_jax.analysis.codes import (
    Coder,
    Codes,
    load_codes,
    nearest_codes,
    recall,
    shortlist,
    train_coder,
)
from alexnet_jax.analysis.retrieval import RetrievalError, nearest
from benchmarks.speed import codes as benchmark

BITS = 20  # fills neither its last byte nor its word


def clusters(count, seed):
    """Return points around 60 centres in a 12-dimensional subspace of 48, far from zero."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(12, 48))
    centres = rng.normal(size=(60, 12)) * 3
    rng = np.random.default_rng(seed)
    points = centres[rng.integers(0, 60, count)] + rng.normal(size=(count, 12))
    noise = 0.1 * rng.normal(size=(count, 48))
    return (20 + points @ directions + noise).astype(np.float32)


@pytest.fixture(scope="module")
def features():
    return clusters(1500, seed=1)


@pytest.fixture(scope="module")
def codes(features):
    coder = train_coder(features, bits=BITS, steps=400, seed=3)
    return Codes.of(coder, features)


def plain_search(codes, queries, count):
    different = [
        [sum(int(a ^ b).bit_count() for a, b in zip(q, c, strict=True)) for c in codes]
        for q in queries
    ]
    # Python's sort is stable: ties by row.
    rows = [sorted(range(len(d)), key=d.__getitem__)[:count] for d in different]
    return [[d[row] for row in r] for d, r in zip(different, rows, strict=True)], rows


@pytest.mark.parametrize(("width", "block"), [(1, 1), (3, 7), (8, 64), (3, 1000)])
def test_hamming_search_equals_a_plain_search(width, block, monkeypatch):
    rng = np.random.default_rng(width)
    codes = rng.integers(0, 256, (150, width), np.uint8)
    codes[[17, 149]] = codes[90]  # more ties than bytes alone give
    queries = np.concatenate([codes[[90]], rng.integers(0, 256, (5, width), np.uint8)])
    monkeypatch.setattr(retrieval, "BLOCK_BYTES", block * 4 * len(queries))
    distances, rows = nearest_codes(codes, queries, 9)
    want_distances, want_rows = plain_search(codes, queries, 9)
    np.testing.assert_array_equal(rows, want_rows)
    np.testing.assert_array_equal(distances, want_distances)
    assert set(rows[0][distances[0] == 0]) >= {17, 90, 149} or width == 1
    _, order = nearest_codes(codes[:3], queries, 9)
    np.testing.assert_array_equal(order, plain_search(codes[:3], queries, 3)[1])


def test_bits_are_packed_signs_of_hyperplanes():
    rng = np.random.default_rng(0)
    planes = Coder(
        mean=rng.normal(size=5).astype(np.float32),
        kernel=rng.normal(size=(5, BITS)).astype(np.float32),
        bias=rng.normal(size=BITS).astype(np.float32),
    )
    features = rng.normal(size=(codes_lib._ROWS + 3, 5)).astype(np.float32)
    packed = planes.encode(features)
    assert packed.shape == (len(features), 3) and planes.bits == BITS
    bits = (features - planes.mean) @ planes.kernel + planes.bias > 0
    np.testing.assert_array_equal(np.unpackbits(packed, axis=1, count=BITS), bits)
    assert not (packed[:, -1] & 0b1111).any()  # what fills the last byte is 0


def test_a_coder_is_a_function_of_features_and_seed(features, codes):
    again = train_coder(features, bits=BITS, steps=400, seed=3).kernel
    np.testing.assert_array_equal(again, codes.coder.kernel)
    other = train_coder(features, bits=BITS, steps=400, seed=4).kernel
    assert np.abs(other - again).max() > 0.01


def test_trained_codes_find_more_than_random_planes(features, codes):
    queries = clusters(200, seed=2)
    _, exact = nearest(features, queries, 10)

    def found(coder):
        packed = coder.encode(features)
        return recall(nearest_codes(packed, coder.encode(queries), 20)[1], exact)

    ours = found(codes.coder)
    random = [found(benchmark.random_planes(features, BITS, seed)) for seed in range(5)]
    assert ours > max(random) + 0.1
    assert ours > 0.72
    # Bits use both values.
    on = np.unpackbits(codes.packed, axis=1, count=BITS).mean(axis=0)
    assert ((on > 0.2) & (on < 0.8)).mean() > 0.8


def test_constant_or_non_finite_features_are_refused(features):
    for wrong in (np.where(features > 40, np.nan, features), np.ones_like(features)):
        with pytest.raises(RetrievalError, match="all the same, or not finite"):
            train_coder(wrong, bits=8)


def test_shortlist_is_sorted_by_exact_distance(features, codes):
    queries = clusters(20, seed=4)
    distances, rows = shortlist(features, codes, queries, 5, size=40)
    asked = codes.coder.encode(queries)
    _, near = nearest_codes(codes.packed, asked, 40)
    for query, listed, got, order in zip(queries, near, distances, rows, strict=True):
        differences = features[listed].astype(np.float64) - query
        far = np.linalg.norm(differences, axis=1)
        best = sorted(zip(far, listed, strict=True))[:5]
        assert order.tolist() == [row for _, row in best]
        np.testing.assert_allclose(got, [d for d, _ in best], rtol=1e-12)
    whole = shortlist(features, codes, queries, 5, size=len(features))
    np.testing.assert_array_equal(whole[1], nearest(features, queries, 5)[1])


def test_recall():
    assert recall(np.array([[4, 2, 9], [1, 2, 3]]), np.array([[2, 3], [3, 1]])) == 0.75


def test_saved_codes_load_and_recognise_their_features(features, codes, tmp_path):
    path = tmp_path / "new" / "codes.npz"
    codes.save(path)
    again = load_codes(path)
    assert [p.name for p in path.parent.iterdir()] == ["codes.npz"]
    np.testing.assert_array_equal(again.packed, codes.packed)
    np.testing.assert_array_equal(again.coder.encode(features), codes.packed)
    assert again.are_of(features)
    one_bit = features.copy()
    one_bit.view(np.uint32)[7, 3] ^= 1
    for other in (one_bit, features[::-1], features[:-1], features[:, 1:]):
        assert not again.are_of(other)


@pytest.mark.nightly
def test_the_benchmark_runs(features, tmp_path):
    labels = np.arange(len(features)) % 3
    asked = (features[5:9], labels[5:9])
    found = benchmark.quality((features, labels), asked, bits=(12,), steps=3)
    squares = (features**2).sum(axis=1)
    plain = benchmark.plain_search(features, squares, features[:7], 4)
    np.testing.assert_array_equal(plain, nearest(features, features[:7], 4)[1])
    record = {"quality": {"toy": found}, "speed": benchmark.speed(200, 8, rounds=1)}
    assert "| exact |  | 192 | 100% |" in benchmark.table(record)
    benchmark.chart(record).savefig(tmp_path / "codes.png")
