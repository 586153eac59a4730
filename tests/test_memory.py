"""Memory that was freed is given back."""

import ctypes
import platform

import numpy as np
import pytest

from alexnet_jax import memory


class _MallInfo(ctypes.Structure):
    """mallinfo2's answer (glibc's <malloc.h>); hblkhd: bytes that were mapped alone."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
@pytest.mark.parametrize("chosen", [False, True])
def test_arrays_do_not_share_their_memory_with_small_blocks(chosen, monkeypatch):
    mallopt = ctypes.CDLL(None).mallopt
    mapped = ctypes.CDLL(None).mallinfo2
    mapped.restype = _MallInfo
    # As in a process that has freed large arrays, or whose environment has chosen.
    mallopt(memory.M_MMAP_THRESHOLD, 32 * 2**20)
    if chosen:
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=33554432")
    memory.return_freed_arrays()
    before = mapped().hblkhd
    array = np.ones(2**21, np.uint8)
    mapped_now = mapped().hblkhd - before
    del array
    mallopt(memory.M_MMAP_THRESHOLD, memory.ARRAY_BYTES)
    assert (mapped_now >= 2**21) is not chosen
