"""No fresh pages in steady state: what a step frees stays in the process for the next one.

First touch of fresh memory runs at 1 to 3 GB/s where a copy runs at 30, and torch's CPU allocator gives large blocks
back to the system and faults them in again every step. A trainer calls this once; importing peakgpt never does, since
it changes malloc for the whole process. The same can be had from outside by
GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=40000000000:glibc.malloc.hugetlb=1
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor


@functools.cache
def keep_pages() -> str | None:
    """Keep freed memory in the process and use huge pages for it, for good.

    Returns:
        None, or the reason why it could not be done.
    """
    try:
        from peakgpt.kernels.cpu.ext import _C
    except ImportError as error:
        return f"no C++ extension: {error}"
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None if _C.keep_pages(half) else "this C library's malloc has no such settings"


def streamed(count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, (count,), for what is read from end to end, often: in huge pages where it can be."""
    from peakgpt.kernels.cpu.ext import _C

    memory = torch.empty(count, dtype=dtype, device="cpu")
    _C.ask_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory
