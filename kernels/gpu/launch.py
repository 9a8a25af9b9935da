"""What every Triton op shares: the class of the device, the base of a tile row, a case of the static check.

A file kernels/gpu/<op>.py keeps its launch parameters as frozen rows (subclasses of Tile) keyed by class, and yields
from `aot_cases(arch)` one AotCase per kernel and row, which `python -m peakgpt.kernels.gpu.static_check` compiles.
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

# Classes share tile rows. sm_86 stands for every chip with 99 KB of shared memory a block (8.6, 8.9, 12.x).
CLASSES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
OLDEST = (3, 6)  # the first Triton whose tl.range has disable_licm


def expect_version(version: str) -> None:
    """
    Raises:
        ImportError: an older Triton than the kernels are written for; dispatch keeps it as the backend's objection.
    """
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise ImportError(f"needs Triton {'.'.join(map(str, OLDEST))} or newer, got {version}")


expect_version(triton.__version__)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Launch parameters of one row; subclasses add their BLOCK_*."""

    warps: int
    stages: int = 1


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One kernel and one row, as the static check compiles it.

    Args:
        kernel: the `triton.jit` function.
        label: what distinguishes this case from the kernel's others, such as "bf16 D=64".
        signature: type of each run-time argument by name: "*bf16", "*fp32", "fp32", "i32", "i64".
            Pointers and integers are compiled as multiples of 16, as the launcher specialises a typical call.
        constexprs: value of each compile-time argument, and of those run-time ones that the launcher makes
            constant (a stride of 1, a missing tensor as None).
        tile: warps and stages.
        matmul: whether the chip's matrix instruction must appear.
        narrow: whether that is the one for tiles of under 64 rows.
        hot: whether every run of the tests compiles it; the others are left to `peakgpt aot` and the slow tests.
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
    """An AotCase whose signature follows from the names: *_ptr is "*dtype", others "i32", unless `types` says more."""
    rest = [name for name in kernel.arg_names if name not in constexprs]
    signature = {n: types.get(n) or (f"*{dtype}" if n.endswith("_ptr") else "i32") for n in rest}
    return AotCase(
        kernel=kernel, label=label, tile=tile, signature=signature, constexprs=constexprs, matmul=matmul,
        narrow=narrow, hot=hot,
    )  # fmt: skip


@functools.cache
def _class(index: int) -> str | None:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    exact = f"sm_{major}{minor}"
    return exact if exact in CLASSES else {8: "sm_86", 10: "sm_100", 12: "sm_86"}.get(major)


def arch(x: Tensor) -> str | None:
    """The class whose rows apply to x's device; None for a chip older than sm_80. Interpreted: sm_80."""
    return "sm_80" if interpreted() else _class(x.device.index)


def objection(x: Tensor) -> str | None:
    """Why no Triton kernel of this package takes x, or None."""
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 or float16, got {x.dtype}"
    if arch(x) is None:
        return f"needs sm_80 or newer, got {torch.cuda.get_device_name(x.device)}"
    return None


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of x's device; interpreted: 1, so that small tests walk the persistent loops."""
    return _processors(x.device.index) if x.is_cuda else 1


def rows(x: Tensor) -> Tensor:
    """x as (R, C) with unit stride along C; a copy only where the strides do not allow a view."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def on(x: Tensor) -> contextlib.AbstractContextManager:
    """Make x's device the current one: Triton launches there, whatever the tensors say."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
