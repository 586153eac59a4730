"""Recycled memory for batches."""

import collections
import math

import numpy as np

_ALIGNMENT = 64  # bytes; a cache line, and what XLA asks for


class BatchMemory:
    """Arrays for batches; memory that nothing refers to any more is used again.

    The kernel zeroes fresh memory page by page, which takes a tenth of the time of
    decoding into it. The arrays begin at multiples of 64 bytes: JAX copies others on CPU.
    """

    def __init__(self, shape: tuple[int, ...], most: int):
        self._shape = shape
        # A caller may have kept many batches: only so much is held for the next ones.
        self._free: collections.deque[np.ndarray] = collections.deque(maxlen=most)

    def take(self) -> np.ndarray:
        """Return uint8 [*shape], contents undefined."""
        try:
            memory = self._free.popleft()
        except IndexError:
            size = math.prod(self._shape)
            raw = np.empty(size + _ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % _ALIGNMENT
            memory = raw[start : start + size].reshape(self._shape)
        return np.asarray(_Lease(memory, self._free))


class _Lease:
    """Base of an array; returns the memory when the last view (NumPy or JAX) dies."""

    def __init__(self, memory: np.ndarray, free: "collections.deque[np.ndarray]"):
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory
        self._free = free

    def __del__(self):
        self._free.append(self._memory)
