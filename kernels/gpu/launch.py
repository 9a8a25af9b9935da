"""Helpers of all Triton ops: device architecture, launch parameters (Tile), cases of the static check (AotCase).

The file of an op keeps its launch parameters as frozen rows (subclasses of Tile), keyed by architecture where they
differ. Its function `aot_cases(arch)` yields one AotCase for each kernel and row. The static check
(`python -m peakgpt.kernels.gpu.static_check`) compiles these cases.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from peakgpt.kernels.core.dispatch import interpreted
from peakgpt.kernels.gpu import interpreter

# Keys of the tile tables. sm_86 stands for all chips with 99 KB of shared memory a block (8.6, 8.9, 12.x).
ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
OLDEST_TRITON = (3, 6)  # the first version whose tl.range has disable_licm


def expect_version(version: str) -> None:
    """Check the version of Triton.

    Raises:
        ImportError: the version is older than OLDEST_TRITON. Dispatch reports it as the backend's objection.
    """
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        raise ImportError(f"needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer, got {version}")


expect_version(triton.__version__)
if interpreted():
    interpreter.patch()


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Launch parameters of a kernel: warps and pipeline stages. Subclasses add the BLOCK_* sizes."""

    warps: int
    stages: int = 1


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """A kernel with the arguments and launch parameters that the static check compiles it with.

    Args:
        kernel: the `triton.jit` function.
        label: distinguishes the cases of one kernel, such as "bf16 D=64".
        signature: type of each run-time argument by name: "*bf16", "*fp32", "fp32", "i32", "i64".
            Pointers and integers are compiled as multiples of 16, as the launcher specializes a typical call.
        constexprs: value of each compile-time argument, and of the run-time arguments that the launcher turns into
            constants (a stride of 1, a missing tensor as None).
        tile: warps and stages.
        matmul: the chip's matrix instruction must appear in the machine code.
        narrow: this instruction is the one for tiles with fewer than 64 rows.
        hot: the fast tests compile the case. The slow tests and `peakgpt aot` compile all cases.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    tile: Tile
    matmul: bool = False
    narrow: bool = False
    hot: bool = True


def case(
    kernel: Any,
    label: str,
    tile: Tile,
    dtype: str,
    constexprs: Mapping[str, Any],
    *,
    matmul: bool = False,
    narrow: bool = False,
    hot: bool = True,
    **types: str,
) -> AotCase:
    """Make an AotCase. An argument's type is `types[name]`; by default "*dtype" for names with "_ptr", else "i32"."""
    runtime = [name for name in kernel.arg_names if name not in constexprs]
    signature = {n: types.get(n) or (f"*{dtype}" if n.endswith("_ptr") else "i32") for n in runtime}
    return AotCase(
        kernel=kernel, label=label, tile=tile, signature=signature, constexprs=constexprs, matmul=matmul,
        narrow=narrow, hot=hot,
    )  # fmt: skip


@functools.cache
def _arch(index: int) -> str | None:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    exact = f"sm_{major}{minor}"
    return exact if exact in ARCHS else {8: "sm_86", 10: "sm_100", 12: "sm_86"}.get(major)


def arch(x: Tensor) -> str | None:
    """Return the key of x's device in the tile tables, None for chips older than sm_80, "sm_80" in the interpreter."""
    return "sm_80" if interpreted() else _arch(x.device.index)


def objection(x: Tensor, *matrices: Tensor) -> str | None:
    """Return the reason why no Triton kernel of this package supports x, or one of its matrices, or None."""
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 or float16, got {x.dtype}"
    for matrix in matrices:
        if not matrix.numel():
            return f"takes matrices with elements, got {tuple(matrix.shape)}"
    if arch(x) is None:
        return f"needs sm_80 or newer, got {torch.cuda.get_device_name(x.device)}"
    return None


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: Tensor) -> int:
    """Return the number of streaming multiprocessors of x's device.

    It is 1 in the interpreter, so that small tests run several iterations of the loops in persistent kernels.
    """
    return _processors(x.device.index) if x.is_cuda else 1


def as_rows(x: Tensor) -> Tensor:
    """Return x as (R, C) with unit stride along C. It is a copy only if the strides of x do not allow a view."""
    x = x.reshape(-1, x.shape[-1])
    return unit_last(x)


def unit_last(x: Tensor) -> Tensor:
    """Return x with stride 1 in its last axis: x itself, or a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make x's device the current device: Triton launches on the current device, not on the device of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
