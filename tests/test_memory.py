"""Memory that was freed is given back."""

import os
import platform
import subprocess
import sys

import pytest

# In a process of its own: where others have left a hole that is large enough, an array
# is put into it. That of 2 MiB is what mallinfo2 (glibc's <malloc.h>) then counts as
# mapped alone, after larger ones were freed.
MAPPED_ALONE = """
import ctypes
import numpy as np
from alexnet_jax import memory

class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = MallInfo
memory.return_freed_arrays()
for mebibytes in (4, 8, 16):
    np.ones(mebibytes * 2**20, np.uint8)
before = mallinfo2().e
array = np.ones(2 * 2**20, np.uint8)
print(mallinfo2().e - before >= array.nbytes)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
@pytest.mark.parametrize(
    "chosen, alone",
    [
        ({}, "True\n"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=9999999"}, "False\n"),
    ],
)
def test_arrays_do_not_share_their_memory_with_small_blocks(chosen, alone):
    done = subprocess.run(
        [sys.executable, "-c", MAPPED_ALONE],
        env=os.environ | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == alone
