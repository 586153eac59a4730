"""What the C library does with memory that was freed: for runs of days."""

import ctypes
import os

# Of glibc's <malloc.h>; and the size in bytes from which a block is an array.
M_MMAP_THRESHOLD = -3
ARRAY_BYTES = 2**20


def return_freed_arrays() -> None:
    """From here on arrays of a MiB and more go back to the system once they are freed.

    Left to itself glibc raises that size, up to 32 MiB, whenever such an array is freed.
    Those below it then share the arenas of their threads with small blocks, and what is
    free between these stays: a training grew by some 100 MiB in 1,200 steps while what
    was in use stayed the same (docs/reliability.md).

    Nothing is done with another C library than glibc, or where the environment chooses
    that size itself (MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES).
    """
    chosen = "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, ARRAY_BYTES)
