"""Batches from a source: order by Grain, decoding in threads.

The batch of step s is a pure function of (seed, s), whatever the number of workers,
processes and restarts. So a checkpoint stores no data position. Batches run on across
the ends of epochs and nothing is dropped; every example comes once per epoch.
"""

import collections
import itertools
import math
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, Self

import numpy as np

from alexnet_jax.data.batch_memory import BatchMemory
from alexnet_jax.data.sources import Source

Batch = dict[str, np.ndarray]
# Batches that are decoded ahead, beside the one that is used.
PREFETCH = 4


def train_order(num_examples: int, seed: int) -> Callable[[int, int], np.ndarray]:
    """Return the order of training: another permutation per epoch, computed on the spot.

    It equals Grain's `MapDataset.range(n).seed(seed).shuffle().repeat()`, but calls only
    the permutation: an index of ImageNet takes 3 microseconds instead of 9, in which no
    other thread runs Python.

    Args:
      num_examples: examples per epoch.
      seed: 0..2**32 - 1.

    Returns:
      A function of (first, last): the examples at these positions, counted from step 0
      on, int64 [last - first].
    """
    from grain.experimental import index_shuffle

    # Grain derives the seed of the first operation after `.seed(seed)` so.
    start = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])

    def examples(first: int, last: int) -> np.ndarray:
        found = [
            index_shuffle(index, num_examples - 1, (start + epoch) % 2**32, 4)
            for epoch, index in (divmod(p, num_examples) for p in range(first, last))
        ]
        return np.array(found, np.int64)

    return examples


class Batches(Iterator[Batch]):
    """Iterator over decoded batches, read ahead by a pool of threads.

    The memory of a batch is used again when nothing refers to it any more, JAX's arrays
    included; do not write to it. Use it as a context manager or call `close()`.

    Args:
      source: where the images come from.
      examples: the order, see `train_order`.
      batch_size: size of the global batch; may exceed the number of examples.
      positions: (lo, hi), the half-open range of positions in the global batch that
        this process feeds; the whole batch if absent.
      start_step: the first step.
      num_examples: positions until the end, then the last batch is padded; None: endless.
      workers: decoding threads; as many as there are free cores.
      prefetch: batches decoded ahead; each takes b * S * S * 3 bytes.

    Attributes:
      step: number of the batch that `next` returns.
      num_batches: batches from step 0 to the end; None for endless training.
      wait_seconds: total time for which `next` was blocked.
    """

    def __init__(
        self,
        source: Source,
        examples: Callable[[int, int], np.ndarray],
        *,
        batch_size: int,
        positions: tuple[int, int] | None = None,
        start_step: int = 0,
        num_examples: int | None = None,
        workers: int = 2,
        prefetch: int = PREFETCH,
    ):
        low, high = positions or (0, batch_size)
        if min(batch_size, workers, prefetch) < 1 or not 0 <= low < high <= batch_size:
            raise ValueError(
                f"{batch_size=}, {workers=} and {prefetch=} must be at least 1, and "
                f"{positions=} a range of positions in the batch"
            )
        self.step = start_step
        self.num_batches = num_examples and -(-num_examples // batch_size)
        self.wait_seconds = 0.0

        def fetch(lo: int, hi: int, images: np.ndarray, labels: np.ndarray) -> None:
            source.fetch(examples(lo, hi), images, labels)

        self._fetch = fetch  # no method: threads must not keep the iterator alive
        self._batch_size, self._low, self._size = batch_size, low, high - low
        self._end = math.inf if num_examples is None else num_examples
        side = source.image_size
        self._memory = BatchMemory((self._size, side, side, 3), most=prefetch + 2)
        self._workers = workers
        self._prefetch = prefetch
        self._next_to_submit = start_step
        self._pending: collections.deque[tuple[Batch, list[futures.Future]]]
        self._pending = collections.deque()
        self._pool = futures.ThreadPoolExecutor(workers, "alexnet-data")
        # A forgotten iterator ends its threads too; __del__ would run too late, when
        # the interpreter has already taken its modules apart.
        weakref.finalize(self, self._pool.shutdown, cancel_futures=True)

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if self.step == self.num_batches:
            self.close()
            raise StopIteration
        self._read_ahead()
        batch, parts = self._pending.popleft()
        try:
            for part in parts:
                part.result()
        except BaseException:
            self.close()
            raise
        self._read_ahead()
        self.step += 1
        self.wait_seconds += time.perf_counter() - started
        return batch

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; return whether `next` has its batch."""
        if self.step == self.num_batches:
            return True  # it raises at once
        self._read_ahead()
        _, parts = self._pending[0]
        return not futures.wait(parts, timeout).not_done

    def _read_ahead(self) -> None:
        """Keep `prefetch` batches in the making, each cut into `workers` parts.

        Raises:
          RuntimeError: the iterator was closed.
        """
        while len(self._pending) < self._prefetch and self._next_to_submit != self.num_batches:
            first = self._next_to_submit * self._batch_size + self._low
            real = int(max(0, min(self._size, self._end - first)))
            images, labels = self._memory.take(), np.empty(self._size, np.int32)
            images[real:] = 0
            labels[real:] = 0
            batch = {"image": images, "label": labels}
            if self.num_batches is not None:
                batch["mask"] = (np.arange(self._size) < real).astype(np.float32)
            cuts = np.linspace(0, real, self._workers + 1).astype(int)
            parts = [
                self._pool.submit(self._fetch, first + lo, first + hi, images[lo:hi], labels[lo:hi])
                for lo, hi in itertools.pairwise(cuts.tolist())
                if lo < hi
            ]
            self._pending.append((batch, parts))
            self._next_to_submit += 1

    def close(self) -> None:
        """Drop the batches read ahead and end the threads; may be called twice."""
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def train_batches(
    source: Source, *, batch_size: int, seed: int, start_step: int = 0, **options: Any
) -> Batches:
    """Iterate over shuffled batches without end, from `start_step` on.

    Args:
      source, batch_size, start_step, options: see `Batches`.
      seed: 0..2**32 - 1; decides the order.

    Returns:
      An iterator of {"image": uint8 [b, S, S, 3], "label": int32 [b]}, b = hi - lo.

    Raises:
      DataError: while iterating: an image is broken.
    """
    order = train_order(source.num_examples, seed)
    return Batches(source, order, batch_size=batch_size, start_step=start_step, **options)


def eval_batches(source: Source, *, batch_size: int, **options: Any) -> Batches:
    """Iterate over every example exactly once, in order; pad the last batch.

    Every process gets the same number of batches, so none waits for another.

    Args:
      source, batch_size, options: see `Batches`.

    Returns:
      An iterator of ceil(num_examples / batch_size) batches {"image": uint8
      [b, S, S, 3], "label": int32 [b], "mask": float32 [b]}; mask is 1 for an
      example and 0 for padding, whose image and label are 0.

    Raises:
      DataError: while iterating: an image is broken.
    """
    count = source.num_examples
    return Batches(source, np.arange, batch_size=batch_size, num_examples=count, **options)
