"""Write the keys and values of new tokens to a paged cache, in Triton: one launch for both, one program a token."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from peakgpt.kernels.gpu import launch, overlap
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.ops.cache_store import SMALLEST_SCALE

# Elements of keys, and of values, a program: 8 a thread, one program for a token of GPT-2 124M. Not measured.
ELEMENTS, TILE = 1024, Tile(warps=4)
_SMALLEST_SCALE: tl.constexpr = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _quantize(x):
    """Return int8 values and float32 scales of the rows of x; kernels/ops/cache_store.py has the formula."""
    x = x.to(tl.float32)
    # The sum is 0, or NaN if the row holds an infinity or NaN: the maximum alone would lose a NaN.
    scale = tl.div_rn(tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1), 127.0 + tl.zeros([x.shape[0]], tl.float32))
    scale = tl.where(scale < _SMALLEST_SCALE, 0.0, scale)
    divisor = tl.broadcast_to(tl.where(scale > 0.0, scale, 1.0)[:, None], x.shape)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
    q = (tl.div_rn(tl.where((scale > 0.0)[:, None], x, 0.0), divisor) + 12582912.0) - 12582912.0
    return q.to(tl.int8), scale


@triton.jit(do_not_specialize=("K",))
def cache_store(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, k_scale_ptr, v_scale_ptr,
    stride_k_n, stride_k_h, stride_v_n, stride_v_h,
    stride_k_cache_n, stride_k_cache_s, stride_k_cache_h, stride_v_cache_n, stride_v_cache_s, stride_v_cache_h,
    K, block, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Store one token's keys and values at slots_ptr[n]; a negative slot stores nothing."""
    overlap.wait_for_previous(OVERLAP)
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + n).to(tl.int64)
    if slot >= 0:
        h, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK_D)
        live = (h < K)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + n * stride_k_n + h[:, None] * stride_k_h + d[None, :], mask=live, other=0.0)
        v = tl.load(v_ptr + n * stride_v_n + h[:, None] * stride_v_h + d[None, :], mask=live, other=0.0)
        if k_scale_ptr is not None:
            k, k_scale = _quantize(k)
            v, v_scale = _quantize(v)
            tl.store(k_scale_ptr + slot * K + h, k_scale, mask=h < K)
            tl.store(v_scale_ptr + slot * K + h, v_scale, mask=h < K)
        block_index, offset = slot // block, slot % block
        k_at = k_cache_ptr + block_index * stride_k_cache_n + offset * stride_k_cache_s
        v_at = v_cache_ptr + block_index * stride_v_cache_n + offset * stride_v_cache_s
        tl.store(k_at + h.to(tl.int64)[:, None] * stride_k_cache_h + d[None, :], k, mask=live)
        tl.store(v_at + h.to(tl.int64)[:, None] * stride_v_cache_h + d[None, :], v, mask=live)


def objection(k, v, k_cache, v_cache, *_, **__) -> str | None:
    if any(t.stride(-1) != 1 for t in (k_cache, v_cache)) and k.shape[2] > 1:
        return "needs caches with a contiguous last axis"
    return launch.objection(k)


def forward(outputs, saved, k, v, k_cache, v_cache, slots, k_scale, v_scale) -> None:
    k, v = launch.unit_last(k), launch.unit_last(v)
    tokens, heads, width = k.shape
    block_d = triton.next_power_of_2(max(1, width))
    size = max(1, ELEMENTS // block_d)
    if 0 in k.shape:
        return
    with launch.device_of(k):
        cache_store[(tokens, triton.cdiv(heads, size))](
            k_ptr=k, v_ptr=v, k_cache_ptr=k_cache, v_cache_ptr=v_cache, slots_ptr=slots,
            k_scale_ptr=k_scale, v_scale_ptr=v_scale, stride_k_n=k.stride(0), stride_k_h=k.stride(1),
            stride_v_n=v.stride(0), stride_v_h=v.stride(1),
            stride_k_cache_n=k_cache.stride(0), stride_k_cache_s=k_cache.stride(1), stride_k_cache_h=k_cache.stride(2),
            stride_v_cache_n=v_cache.stride(0), stride_v_cache_s=v_cache.stride(1), stride_v_cache_h=v_cache.stride(2),
            K=heads, block=k_cache.shape[1], D=width, HEADS=size, BLOCK_D=block_d,
            num_warps=TILE.warps, num_stages=TILE.stages, **overlap.options(k, tokens),
        )  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases: two head widths, with the cache in bfloat16 and in int8."""
    scales = {"k_scale_ptr", "v_scale_ptr"}
    for width in (64, 128):
        sizes = {"D": width, "HEADS": ELEMENTS // width, "BLOCK_D": width, "OVERLAP": arch in overlap.ARCHS}
        types = {"slots_ptr": "*i64"}
        yield launch.case(cache_store, f"bf16 D={width}", TILE, "bf16", {**sizes, **dict.fromkeys(scales)}, **types)
        int8 = dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), "*i8") | dict.fromkeys(scales, "*fp32")
        yield launch.case(cache_store, f"bf16 D={width} int8", TILE, "bf16", sizes, **types, **int8)
