"""Dropout in Triton. The kernel reads its seed from device memory, so a replay of a CUDA graph can use a new mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.ops.dropout import LANES, WORDS

# BLOCK_G groups of LANES * WORDS = 64 elements a program, 16 elements a thread. Not measured on hardware.
BLOCK_G, TILE = 32, Tile(warps=4)


@triton.jit
def dropout_apply(
    x_ptr, seed_ptr, y_ptr, N, threshold, keep_scale, LANES: tl.constexpr, WORDS: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Store y = x keep_scale where the random word is at least threshold, else 0. One Philox call gives WORDS words."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    lane = tl.arange(0, LANES)
    counter = group[:, None] * LANES + lane[None, :]
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros([BLOCK_G, LANES], tl.uint32)
    words = tl.philox(tl.load(seed_ptr), low, high, zero, zero, n_rounds=7)
    for word in tl.static_range(WORDS):
        at = group[:, None] * (LANES * WORDS) + word * LANES + lane[None, :]
        x = tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        y = tl.where(words[word] >= threshold.to(tl.uint32), x * keep_scale, 0.0)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < N)


def objection(x: Tensor, *_, p: float) -> str | None:
    return launch.objection(x) if p else "drops nothing at p = 0"


def forward(outputs, saved, x, seed, *, p):
    _drop(x, seed, outputs[0], p)


def backward(grads, inputs, outputs, saved, needs, *, p):
    dx = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
    _drop(grads[0], inputs[1], dx, p)
    return dx, None


def _drop(x: Tensor, seed: Tensor, y: Tensor, p: float) -> None:
    with launch.device_of(x):
        dropout_apply[(triton.cdiv(x.numel(), BLOCK_G * LANES * WORDS),)](
            x_ptr=x, seed_ptr=seed.long(), y_ptr=y, N=x.numel(), threshold=int(p * 2**32),
            keep_scale=1.0 / (1.0 - p), LANES=LANES, WORDS=WORDS, BLOCK_G=BLOCK_G,
            num_warps=TILE.warps, num_stages=TILE.stages,
        )  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases."""
    sizes = {"LANES": LANES, "WORDS": WORDS, "BLOCK_G": BLOCK_G}
    types = {"seed_ptr": "*i64", "N": "i64", "threshold": "i64", "keep_scale": "fp32"}
    yield launch.case(dropout_apply, "bf16", TILE, "bf16", sizes, **types)
