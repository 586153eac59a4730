"""Batches from a source: order by Grain, decoding in threads.

The batch of step s is a pure function of (seed, s): no worker count, no process
count and no restart changes it, so nothing about the data position has to be
stored in a checkpoint. Batches run on across the ends of epochs and nothing is
dropped; within one epoch every example comes exactly once.
"""

import collections
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, Self

import numpy as np

from alexnet_jax.data.sources import Source

Batch = dict[str, np.ndarray]


def train_order(num_examples: int, *, batch_size: int, seed: int) -> Any:
    """The order of training: a Grain dataset of index batches.

    Args:
      num_examples: examples in an epoch.
      batch_size: examples in a (global) batch.
      seed: 0..2**32 - 1.

    Returns:
      A `grain.MapDataset`; its element s is int64 [batch_size], the examples of
      step s. Every epoch is another permutation.
    """
    import grain

    # Grain refuses larger seeds with a message that names no field.
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32-1, got {seed}")
    order = grain.MapDataset.range(num_examples).seed(seed).shuffle().repeat()
    return order.batch(batch_size)


class Batches(Iterator[Batch]):
    """Iterator over decoded batches, read ahead by a pool of threads.

    Every batch is freshly allocated: on CPU a jax array may share a NumPy array's
    memory, so a buffer must never be used twice. Use it as a context manager or
    call `close()`.

    Attributes:
      step: number of the batch that `next` gives.
      num_batches: batches from step 0 to the end; None for endless training.
      wait_seconds: total time `next` was blocked; its share of the wall time is
        the `data_wait_frac` of the logs.
    """

    def __init__(
        self,
        source: Source,
        indices_of: Callable[[int], np.ndarray],
        *,
        batch_size: int,
        start_step: int,
        num_batches: int | None,
        workers: int,
        prefetch: int,
        with_mask: bool,
    ):
        if workers < 1 or prefetch < 1:
            raise ValueError(
                "workers and prefetch must be at least 1, "
                f"got workers={workers}, prefetch={prefetch}"
            )
        self.step = start_step
        self.num_batches = num_batches
        self.wait_seconds = 0.0
        self._source = source
        self._indices_of = indices_of
        self._batch_size = batch_size
        self._workers = workers
        self._prefetch = prefetch
        self._with_mask = with_mask
        self._next_to_submit = start_step
        self._pending: collections.deque[tuple[Batch, list[futures.Future]]]
        self._pending = collections.deque()
        self._pool: futures.ThreadPoolExecutor | None
        self._pool = futures.ThreadPoolExecutor(workers, "alexnet-data")
        # A forgotten iterator ends its threads too; __del__ would run too late, when
        # the interpreter has already taken its modules apart.
        weakref.finalize(self, self._pool.shutdown, cancel_futures=True)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if self.step == self.num_batches:
            self.close()
            raise StopIteration
        if self._pool is None:
            raise RuntimeError("this batch iterator was closed: make a new one")
        self._submit(self._prefetch)
        batch, parts = self._pending.popleft()
        try:
            for part in parts:
                part.result()
        except BaseException:
            self.close()
            raise
        self._submit(self._prefetch)
        self.step += 1
        self.wait_seconds += time.perf_counter() - started
        return batch

    def _submit(self, count: int) -> None:
        """Keeps `count` batches in the making, each cut into `workers` parts."""
        assert self._pool is not None
        while len(self._pending) < count:
            if self._next_to_submit == self.num_batches:
                return
            indices = np.asarray(self._indices_of(self._next_to_submit))
            size, real = self._batch_size, len(indices)
            side = self._source.image_size
            batch = {
                "image": np.empty((size, side, side, 3), np.uint8),
                "label": np.empty(size, np.int32),
            }
            batch["image"][real:] = 0
            batch["label"][real:] = 0
            if self._with_mask:
                batch["mask"] = (np.arange(size) < real).astype(np.float32)
            cuts = np.linspace(0, real, self._workers + 1).astype(int)
            parts = [
                self._pool.submit(
                    self._source.fetch,
                    indices[lo:hi],
                    batch["image"][lo:hi],
                    batch["label"][lo:hi],
                )
                for lo, hi in itertools.pairwise(cuts)
                if lo < hi
            ]
            self._pending.append((batch, parts))
            self._next_to_submit += 1

    def close(self) -> None:
        """Drops what was read ahead and ends the threads; may be called twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self._pending.clear()
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    positions: tuple[int, int] | None = None,
    workers: int = 2,
    prefetch: int = 4,
) -> Batches:
    """Endless shuffled batches, from `start_step` on.

    Args:
      source: where the pictures come from.
      batch_size: size of the GLOBAL batch.
      seed: 0..2**32 - 1; decides the order.
      start_step: the step to begin with (after a resume: the restored step).
      positions: (lo, hi), the half-open range of positions of the global batch this
        process feeds; the whole batch when absent.
      workers: decoding threads; as many as there are free cores.
      prefetch: batches decoded ahead; each takes b * S * S * 3 bytes.

    Returns:
      An iterator of {"image": uint8 [b, S, S, 3], "label": int32 [b]}, b = hi - lo.

    Raises:
      ValueError: arguments out of range; while iterating a DataError for a broken
        picture.
    """
    low, high = _positions(positions, batch_size)
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, got {start_step}")
    order = train_order(source.num_examples, batch_size=batch_size, seed=seed)
    return Batches(
        source,
        lambda step: order[step][low:high],
        batch_size=high - low,
        start_step=start_step,
        num_batches=None,
        workers=workers,
        prefetch=prefetch,
        with_mask=False,
    )


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    positions: tuple[int, int] | None = None,
    workers: int = 2,
    prefetch: int = 4,
) -> Batches:
    """Every example exactly once, in order; the last batch is padded.

    Args:
      source: where the pictures come from.
      batch_size: size of the GLOBAL batch; may exceed the number of examples.
      positions: (lo, hi), the part of each global batch this process feeds; every
        process gets the same number of batches, so none waits for another.
      workers: decoding threads.
      prefetch: batches decoded ahead.

    Returns:
      An iterator of ceil(num_examples / batch_size) batches {"image": uint8
      [b, S, S, 3], "label": int32 [b], "mask": float32 [b]}; mask is 1 for an
      example and 0 for padding, whose picture and label are 0.

    Raises:
      ValueError: arguments out of range; while iterating a DataError for a broken
        picture.
    """
    low, high = _positions(positions, batch_size)
    count = source.num_examples

    def indices_of(step: int) -> np.ndarray:
        first = step * batch_size
        return np.arange(min(first + low, count), min(first + high, count))

    return Batches(
        source,
        indices_of,
        batch_size=high - low,
        start_step=0,
        num_batches=-(-count // batch_size),
        workers=workers,
        prefetch=prefetch,
        with_mask=True,
    )


def _positions(positions: tuple[int, int] | None, batch_size: int) -> tuple[int, int]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    low, high = (0, batch_size) if positions is None else positions
    if not 0 <= low < high <= batch_size:
        raise ValueError(
            f"positions must be a non-empty range inside 0..{batch_size} "
            f"(the global batch), got ({low}, {high})"
        )
    return low, high
