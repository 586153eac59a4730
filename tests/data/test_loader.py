"""The loader: order, every example once, memory, threads and errors."""

import contextlib
import itertools
import threading
import time
import types

import grain
import jax
import numpy as np
import pytest

from alexnet_jax.data import eval_batches, loader, sources, train_batches
from alexnet_jax.data.loader import train_order


class NumberedSource(sources.Source):
    """Yield image i filled with i and label i; raise for `broken`."""

    image_size = 2
    class_names = ("a",)
    description = "numbers"

    def __init__(self, num_examples: int, broken: int = -1):
        self.num_examples = num_examples
        self.broken = broken

    def fetch(self, indices, images, labels):
        if self.broken in indices:
            raise ValueError(f"cannot decode image_{self.broken}.jpg")
        time.sleep(0.001 * (int(indices[0]) % 3))  # threads end out of order
        images[...] = (indices % 256)[:, None, None, None]
        labels[:] = indices


def test_order_is_a_function_of_seed_and_step():
    def labels(start, count, **options):
        options |= {"batch_size": 4, "seed": 7, "start_step": start}
        with train_batches(NumberedSource(10), **options) as batches:
            return np.stack([next(batches)["label"] for _ in range(count)])

    expected = labels(0, 10, workers=1)
    np.testing.assert_array_equal(labels(0, 10, workers=5), expected)
    np.testing.assert_array_equal(labels(6, 4, prefetch=1), expected[6:])
    np.testing.assert_array_equal(labels(0, 10, positions=(1, 3)), expected[:, 1:3])
    # Batches run on over the ends of epochs: 40 labels are 4 epochs of 10.
    epochs = expected.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (train_order(10, 8)(0, 40) != expected.ravel()).any()


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
@pytest.mark.parametrize("count", [1, 10, 1_281_167])
def test_order_equals_grain(count, seed):
    order = train_order(count, seed)
    whole = grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(7)
    last = count // 7  # its batch goes over the end of the epoch
    for step in (0, 1, last, last + 1):
        np.testing.assert_array_equal(order(7 * step, 7 * step + 7), whole[step])


@pytest.mark.parametrize("count", [1, 3])
def test_batch_larger_than_the_data_set(count):
    with train_batches(NumberedSource(count), batch_size=6, seed=0) as batches:
        labels = np.concatenate([next(batches)["label"] for _ in range(2)])
    assert np.bincount(labels).tolist() == [12 // count] * count


def test_batch_memory_is_reused_only_when_unreferenced():
    with train_batches(NumberedSource(50), batch_size=8, seed=0, prefetch=2) as batches:
        # A view of a view, JAX's arrays (which share the memory on CPU), whole batches.
        views = [next(batches)["image"][2:][:1] for _ in range(4)]
        arrays = [jax.device_put(next(batches)["image"]) for _ in range(4)]
        kept = [next(batches) for _ in range(4)]
        places = {next(batches)["image"].ctypes.data for _ in range(50)}
    order = train_order(50, 0)(0, 96).reshape(12, 8)
    for step, view in enumerate(views):
        assert (view == order[step][2]).all()
    for step, array in enumerate(arrays, 4):
        np.testing.assert_array_equal(array[:, 0, 0, 0], order[step])
    for step, batch in enumerate(kept, 8):
        assert batch["image"].shape == (8, 2, 2, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32 and set(batch) == {"image", "label"}
        np.testing.assert_array_equal(batch["image"][:, 1, 1, 1], order[step])
        np.testing.assert_array_equal(batch["label"], order[step])
    assert len(places) <= 4  # two read ahead, one handed out, one being taken
    assert all(place % 64 == 0 for place in places)


@pytest.mark.parametrize("batch_size", [1, 7, 10, 64])
@pytest.mark.parametrize("workers", [1, 3])
def test_eval_sees_every_example_once(batch_size, workers):
    seen = []
    batches = eval_batches(NumberedSource(10), batch_size=batch_size, workers=workers)
    assert batches.num_batches == -(-10 // batch_size)
    for batch in batches:
        assert len(batch["image"]) == len(batch["label"]) == batch_size
        assert batch["mask"].dtype == np.float32
        real = batch["mask"] == 1
        seen += batch["label"][real].tolist()
        assert not batch["label"][~real].any() and not batch["image"][~real].any()
    assert seen == list(range(10))
    assert batches.step == batches.num_batches
    with pytest.raises(StopIteration):
        next(batches)


def test_eval_positions_of_two_processes_cover_the_split():
    halves = [
        list(eval_batches(NumberedSource(10), batch_size=8, positions=positions))
        for positions in ((0, 4), (4, 8))
    ]
    labels = [[b["label"][b["mask"] > 0].tolist() for b in half] for half in halves]
    assert labels == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7], []]]


def test_error_reaches_the_consumer_and_threads_end():
    before = threading.active_count()
    batches = train_batches(NumberedSource(10, broken=6), batch_size=4, seed=0)
    with pytest.raises(ValueError, match=r"image_6\.jpg"):
        for _ in range(10):
            next(batches)
    with pytest.raises(RuntimeError, match="shutdown"):
        next(batches)
    batches = train_batches(NumberedSource(10), batch_size=4, seed=0, workers=3)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    batches.close()
    batches = train_batches(NumberedSource(10), batch_size=4, seed=0)
    next(batches)
    del batches  # a forgotten iterator ends its threads too
    assert threading.active_count() == before


def test_reading_ahead_is_bounded_and_waiting_is_measured(monkeypatch):
    seconds, more = itertools.count(), threading.Event()
    now = 0

    class Slow(NumberedSource):
        fetched = 0

        def fetch(self, indices, images, labels):
            nonlocal now
            if Slow.fetched == 4:
                more.wait()
            now = next(seconds) + 1  # on the clock below
            super().fetch(indices, images, labels)
            Slow.fetched += 1

    clock = types.SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(loader, "time", clock)
    batches = train_batches(Slow(100), batch_size=2, seed=0, workers=1, prefetch=3)
    with batches, contextlib.ExitStack() as ended:
        ended.callback(more.set)
        next(batches)
        while Slow.fetched < 4:  # one handed out, three ahead
            time.sleep(0.001)
        time.sleep(0.05)
        assert Slow.fetched == 4
        waited = batches.wait_seconds
        assert 1 <= waited <= 4  # for the first; the others may be ready already
        next(batches)
        assert batches.wait_seconds == waited  # it lay ready


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"workers": 0},
        {"prefetch": 0},
        {"positions": (2, 6)},
        {"positions": (2, 2)},
    ],
)
def test_arguments_are_checked(options):
    given = {"batch_size": 4, "seed": 0, **options}
    with pytest.raises(ValueError, match=next(iter(options))):
        train_batches(NumberedSource(10), **given)
