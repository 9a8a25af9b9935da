"""Programmatic dependent launch: a small kernel begins while the one before it in the stream still runs.

A step of decoding is hundreds of kernels of a few microseconds, and a boundary between two costs about one. On sm_90
and newer a kernel that is launched with `options` starts as soon as the one before it lets it; until `follow` returns
it may touch nothing that another kernel writes or reads. CUDA C++ Programming Guide, "Programmatic Dependent Launch and
Synchronization"; PTX ISA, "griddepcontrol": the wait ends when all kernels before have completed and their writes are
visible. The static check fails a kernel that touches memory earlier.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.core.dispatch import interpreted
from peakgpt.kernels.gpu import launch

# Unmeasured on hardware. sm_86 stands for 12.x too, and so is left out.
CLASSES = ("sm_90", "sm_100")
MOST_ROWS = 64  # tokens; kernels of more are long beside a boundary
LANES = tl.constexpr(8)


def options(x: Tensor, rows: int) -> dict[str, bool]:
    """What a kernel of that many rows on x's device is launched with: OVERLAP, which it hands to `follow`, and more."""
    on = launch.arch(x) in CLASSES and rows <= MOST_ROWS and not interpreted()
    return {"OVERLAP": True, "launch_pdl": True} if on else {"OVERLAP": False}


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait for the ones before; comes before any access to memory."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(w_ptr, stride_w, row, rows: tl.constexpr, N, K, BYTES: tl.constexpr, THREADS: tl.constexpr):
    """Bring the first BYTES of each of `rows` rows of w (N, K), from `row` on, into the L2 cache.

    Before `follow` too, for it reads no value. Rows start on 16 bytes and are multiples of them. One lane in LANES
    asks: a warp does so for one lane after the other.
    """
    size: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    share: tl.constexpr = BYTES // size // (THREADS // LANES // rows)
    lane = tl.arange(0, THREADS)
    n, first = row + lane // LANES % rows, lane // LANES // rows * share
    length = tl.where((lane % LANES == 0) & (n < N), tl.minimum(K - first, share), 0)
    at = w_ptr + n.to(tl.int64) * stride_w + first
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred some;
            setp.gt.s32 some, $2, 0;
            @some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, 0;
        }
        """,
        "=r,l,r", [at, length * size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
