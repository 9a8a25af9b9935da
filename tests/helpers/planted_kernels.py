"""Kernels with faults that the static check must reject, and correct ones. Prints {name: failure} as JSON.

test_aot.py runs this program without TRITON_INTERPRET, because interpreted kernels cannot be compiled.
"""

import json

import triton
import triton.language as tl

from peakgpt.kernels.gpu import launch, overlap
from peakgpt.kernels.gpu.launch import Tile
from peakgpt.kernels.gpu.static_check import check_case


@triton.jit
def product(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    """A large BLOCK needs more registers and shared memory than the GPU has."""
    i = tl.arange(0, BLOCK)
    offsets = i[:, None] * BLOCK + i[None, :]
    for k in range(8):
        c = tl.dot(tl.load(a_ptr + offsets + k), tl.load(b_ptr + offsets + k), input_precision="ieee")
        tl.store(c_ptr + offsets + k * BLOCK * BLOCK, c)


@triton.jit
def sums(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    """A matrix product without tl.dot."""
    i = tl.arange(0, BLOCK)
    offsets = i[:, None] * BLOCK + i[None, :]
    a, b = tl.load(a_ptr + offsets).to(tl.float32), tl.load(b_ptr + offsets).to(tl.float32)
    tl.store(c_ptr + offsets, tl.sum(a[:, :, None] * b[None, :, :], 1))


@triton.jit
def centered(a_ptr, BLOCK: tl.constexpr):
    """A long row needs more registers than the GPU has."""
    i = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i).to(tl.float32)
    tl.store(a_ptr + i, a - tl.sum(a, 0) / BLOCK)


@triton.jit
def loads(a_ptr, BLOCK: tl.constexpr):
    tl.load(a_ptr + tl.arange(0, BLOCK))


@triton.jit
def early(a_ptr, BLOCK: tl.constexpr, HASTY: tl.constexpr, OVERLAP: tl.constexpr):
    """Starts before the previous kernel has ended; HASTY accesses memory before the wait."""
    i = tl.arange(0, BLOCK)
    if HASTY:
        tl.store(a_ptr + i, tl.load(a_ptr + BLOCK + i))
    overlap.wait_for_previous(OVERLAP)
    tl.store(a_ptr + i, tl.load(a_ptr + BLOCK + i))


@triton.jit
def broken(a_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0, "planted")


def case(kernel, block, matmul=False, **constexprs):
    constants = {"BLOCK": block, **constexprs}
    return launch.case(kernel, f"BLOCK={block}", Tile(warps=4), "bf16", constants, matmul=matmul)


PLANTED = {
    "good": case(product, 64, matmul=True),
    "good without dot": case(centered, 1024),
    "too large": case(product, 256, matmul=True),
    "spills without dot": case(centered, 131072),
    "no dot": case(sums, 8, matmul=True),
    "no store": case(loads, 64),
    "no store, dot expected": case(loads, 64, matmul=True),
    "early": case(early, 64, HASTY=False, OVERLAP=True),
    "early and hasty": case(early, 64, HASTY=True, OVERLAP=True),
    "broken": case(broken, 64),
}

if __name__ == "__main__":
    print(json.dumps({name: check_case("planted", case, "sm_90").failure for name, case in PLANTED.items()}))
