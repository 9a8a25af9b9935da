"""Keep freed memory in the process, so that a training step needs no fresh pages.

The first touch of fresh memory runs at 1 to 3 GB/s and a copy at 30. torch's CPU allocator returns large blocks to the
system, so every step touches fresh memory again. A trainer calls `keep_pages` once. Importing peakgpt never calls it,
since it changes malloc for the whole process. The environment can set the same with
GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=40000000000:glibc.malloc.hugetlb=1
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor


@functools.cache
def keep_pages() -> str | None:
    """Keep freed memory in the process from now on, and use huge pages for it.

    Returns:
        None, or the reason why it is not possible.
    """
    try:
        from peakgpt.kernels.cpu.ext import _C
    except ImportError as error:
        return f"no C++ extension: {error}"
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None if _C.keep_pages(bytes=half) else "this C library's malloc has no such settings"


def streamed(count: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor (count,), in huge pages if possible, for data that is often read as a stream."""
    from peakgpt.kernels.cpu.ext import _C

    memory = torch.empty(count, dtype=dtype, device="cpu")
    _C.request_huge_pages(memory=memory.data_ptr(), bytes=memory.nbytes)
    return memory
