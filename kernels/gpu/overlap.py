"""Programmatic dependent launch: a kernel starts while the previous kernel of the stream still runs.

A decoding step runs hundreds of kernels that take a few microseconds each. Without overlap the GPU loses about one
microsecond between two of them. A kernel that is launched with `options` may start before the previous kernel has
ended (sm_90 and newer). It must not access memory that another kernel reads or writes until `wait_for_previous` has
returned: by then all previous kernels have completed and their writes are visible. The static check rejects kernels
that access memory earlier.

CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, "griddepcontrol".
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.core.dispatch import interpreted
from peakgpt.kernels.gpu import launch

# Not measured on hardware. sm_86 is not here: it stands for 12.x, but also for 8.x, which lacks the feature.
ARCHS = ("sm_90", "sm_100")
MAX_TOKENS = 64  # kernels for more tokens run long compared with the gap between two kernels
PREFETCH_LANES = tl.constexpr(8)  # one of 8 threads issues a prefetch: a warp issues those of its threads in sequence


def options(x: Tensor, tokens: int) -> dict[str, bool]:
    """Return the launch options that let a kernel for this number of tokens start early on x's device.

    They include the kernel's compile-time argument OVERLAP, which it passes on to `wait_for_previous`.
    """
    supported = launch.arch(x) in ARCHS and tokens <= MAX_TOKENS and not interpreted()
    return {"OVERLAP": True, "launch_pdl": True} if supported else {"OVERLAP": False}


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Allow the next kernel to start and wait for all previous kernels. Call it before any access to memory."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(w_ptr, stride_w, row, ROWS: tl.constexpr, N, K, BYTES: tl.constexpr, THREADS: tl.constexpr):
    """Fetch the first BYTES of rows row .. row + ROWS - 1 of w (N, K) into the L2 cache.

    Allowed before `wait_for_previous`, because it reads no values. Every row of w must start at a multiple of 16 bytes
    and be a multiple of 16 bytes long.
    """
    size: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    share: tl.constexpr = BYTES // size // (THREADS // PREFETCH_LANES // ROWS)  # elements of one prefetch
    thread = tl.arange(0, THREADS)
    n, first = row + thread // PREFETCH_LANES % ROWS, thread // PREFETCH_LANES // ROWS * share
    length = tl.where((thread % PREFETCH_LANES == 0) & (n < N), tl.minimum(K - first, share), 0)
    at = w_ptr + n.to(tl.int64) * stride_w + first
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred nonempty;
            setp.gt.s32 nonempty, $2, 0;
            @nonempty cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, 0;
        }
        """,
        "=r,l,r", [at, length * size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
