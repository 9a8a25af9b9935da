"""Store the keys and values of new tokens in a paged KV cache, in the model's dtype or quantized to int8.

    token n goes to block slots[n] // block, position slots[n] % block; it is not stored if slots[n] < 0
    int8, for each head of a token:    x = s q    s = max|x| / 127    q = round(x / s), ties to even

A scale below float32's smallest normal number becomes 0, and so do its int8 values. An infinity or NaN makes the scale
infinite or NaN, so the head is read as NaN. The division is exact (no multiplication by a reciprocal), so all backends
round to the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op

OP = "cache_store"
SMALLEST_SCALE = 2.0**-126


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each head of each token to int8.

    Args:
        x: (..., D) floating.
    Returns:
        q (..., D) int8 in -127..127, scale (...) float32, or float64 if x is float64.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(-1) / 127
    scale = scale.masked_fill(scale < SMALLEST_SCALE, 0.0)
    return (wide / scale[..., None]).round_().nan_to_num_(0.0, 0.0, 0.0).to(torch.int8), scale


def check_cache(
    name: str, first: str, x: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Check a cache (blocks, block, K, D) of x's dtype, or of int8 with a scale for each head of each token."""
    check.shape(name, "v_cache", v_cache, *k_cache.shape)
    if (k_scale is None) != (v_scale is None):
        given, missing = ("v_scale", "k_scale") if k_scale is None else ("k_scale", "v_scale")
        raise ValueError(f"{name}: got {given} without {missing}, expected both or neither")
    if k_scale is None:
        check.same(name, first, x, k_cache=k_cache, v_cache=v_cache)
        return
    for letter, cache, scale in (("k", k_cache, k_scale), ("v", v_cache, v_scale)):
        if cache.dtype != torch.int8 or cache.device != x.device:
            raise ValueError(
                f"{name}: {letter}_cache is {cache.dtype} on {cache.device}, expected int8 on {x.device} with scales"
            )
        check.shape(name, f"{letter}_scale", scale, *k_cache.shape[:3])
        expected = torch.promote_types(x.dtype, torch.float32)
        if scale.dtype != expected or scale.device != x.device or not scale.is_contiguous():
            raise ValueError(
                f"{name}: {letter}_scale is {scale.dtype} on {scale.device} with strides {scale.stride()}, "
                f"expected contiguous {expected} on {x.device}"
            )


def _check(k, v, k_cache, v_cache, slots, k_scale=None, v_scale=None):
    check.shape(OP, "k", k, None, None, None)
    check.shape(OP, "v", v, *k.shape)
    check.same(OP, "k", k, v=v)
    check.shape(OP, "k_cache", k_cache, None, None, *k.shape[1:])
    check_cache(OP, "k", k, k_cache, v_cache, k_scale, v_scale)
    check.distinct(OP, k_cache=k_cache, v_cache=v_cache)
    check.shape(OP, "slots", slots, k.shape[0])
    check.integers(OP, "slots", slots, k.device)
    if check.readable(slots) and slots.numel():
        count, last = k_cache.shape[0] * k_cache.shape[1], int(slots.max())
        if last >= count:
            raise ValueError(f"{OP}: slots has a value {last}, expected below {count}: {k_cache.shape[0]} blocks")


def _cost(k, v, k_cache, v_cache, slots, k_scale=None, v_scale=None):
    """Reads and writes once. int8: 5 FLOPs per element (absolute value, maximum, division, rounding, cast)."""
    elements, heads = 2 * k.numel(), 0 if k_scale is None else 2 * k.shape[0] * k.shape[1]
    written = elements * k_cache.element_size() + heads * (0 if k_scale is None else k_scale.element_size())
    read = elements * k.element_size() + slots.numel() * slots.element_size()
    return Cost(0 if k_scale is None else 5 * elements, read + written, 0, 0, written, 0)


def _sample(tokens: int = 1024, heads: int = 12, head_dim: int = 64, block: int = 16, bits: int | None = None, **like):
    """Tokens in random order and a cache with the fewest blocks that hold them; bits = 8 gives an int8 cache."""
    k, v = (torch.randn(tokens, heads, head_dim, **like) for _ in "kv")
    blocks = -(-tokens // block)
    slots = torch.randperm(blocks * block, device=k.device)[:tokens]
    if bits is None:
        return k, v, *(k.new_zeros(blocks, block, heads, head_dim) for _ in "kv"), slots
    caches = [torch.zeros(blocks, block, heads, head_dim, dtype=torch.int8, device=k.device) for _ in "kv"]
    scale_like = {"dtype": torch.promote_types(k.dtype, torch.float32), "device": k.device}
    return k, v, *caches, slots, *(torch.zeros(blocks, block, heads, **scale_like) for _ in "kv")


@op(
    cost=_cost, sample=_sample, check=_check, mutates=("k_cache", "v_cache", "k_scale", "v_scale"),
    strided=("k", "v", "k_cache", "v_cache"), matmul_flops=lambda *_, **__: 0,
)  # fmt: skip
def cache_store(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens into a KV cache, in place.

    Args:
        k, v: (N, K, D) float32, bfloat16 or float16, any strides.
        k_cache, v_cache: (blocks, block, K, D), dtype of k, or int8 with scales; any strides but 0. Only the
            eager backend takes a cache whose last axis is not contiguous.
        slots: (N,) int32 or int64, block index * block + position in the block, without duplicates. Negative: the
            token is not stored.
        k_scale, v_scale: (blocks, block, K) float32, contiguous; written for each stored token.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    live = slots >= 0
    slots = slots[live].long()
    index = slots // k_cache.shape[1], slots % k_cache.shape[1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x[live]
        if scale is not None:
            x, scale[index] = quantize_heads(x)
        cache[index] = x
