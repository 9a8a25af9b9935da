"""Attention of new tokens to a paged KV cache: the values of `attention`, without gradients.

    sequence b has n new queries and L = lengths[b] keys, including the new ones; key j lies in the cache at
    [block_tables[b, j // block], j % block]
    query i has position p = L - n + i and attends to keys max(0, p - window + 1) .. p
    s = scale q k^T, with a softcap softcap tanh(s / softcap), + alibi_h (j - p)      zero if a query has no key
    y = softmax(s) v, with the sink of head h as one more logit without a value
    int8 cache: key j's scale multiplies s, value j's scale multiplies its weight; products of integers are exact

Fused backends split the keys at multiples of a constant, counted from the sequence's first key, and add the parts in
order: m = max(m, m'), l = l e^(m_old - m) + l' e^(m' - m), y likewise; a sink is one more part. Therefore a query's
result has the same bits in any batch, with any number of other queries, and for any location of its blocks. Splitting
the keys over processors: Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding for long-context inference". Blocks: Kwon et
al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op
from peakgpt.kernels.ops.attention import attention, check_scores, sample_sinks
from peakgpt.kernels.ops.cache_store import check_cache, quantize_heads

OP = "attention_decode"


def _int32(name: str, tensor: Tensor | None, device: torch.device) -> None:
    check.integers(OP, name, tensor, device)
    if tensor is not None and tensor.dtype != torch.int32:
        raise ValueError(f"{OP}: {name} has dtype {tensor.dtype}, expected int32")


def _check(
    q, k_cache, v_cache, block_tables, lengths, cu_queries, k_scale, v_scale, alibi, sinks, *, window, scale, softcap
):  # fmt: skip
    check.shape(OP, "q", q, None, None, None)
    check.shape(OP, "k_cache", k_cache, None, None, None, q.shape[2])
    check_cache(OP, "q", q, k_cache, v_cache, k_scale, v_scale)
    check.same(OP, "q", q, mixed=True, alibi=alibi)
    check.shape(OP, "block_tables", block_tables, None, None)
    batch = block_tables.shape[0]
    check.shape(OP, "lengths", lengths, batch)
    for name, tensor in (("block_tables", block_tables), ("lengths", lengths), ("cu_queries", cu_queries)):
        _int32(name, tensor, q.device)
    if k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"{OP}: {q.shape[1]} query heads over {k_cache.shape[2]} key heads, expected a whole multiple")
    check_scores(OP, q.shape[1], q.device, window, softcap, sinks)
    check.shape(OP, "alibi", alibi, q.shape[1])
    if cu_queries is None:
        check.shape(OP, "q", q, batch, None, None)
    else:
        check.shape(OP, "cu_queries", cu_queries, batch + 1)
        check.offsets(OP, "cu_queries", cu_queries, q.shape[0], q.device)
    if check.readable(lengths) and check.readable(block_tables) and batch:
        _check_blocks(k_cache, block_tables, lengths)


def _check_blocks(k_cache: Tensor, block_tables: Tensor, lengths: Tensor) -> None:
    """Check that the used entries of the tables are blocks of the cache. Unused entries may have any value."""
    count, block = k_cache.shape[:2]
    low, high = (int(v) for v in torch.aminmax(lengths))
    if low < 0 or high > block_tables.shape[1] * block:
        raise ValueError(
            f"{OP}: lengths has values {low} to {high}, expected 0 to {block_tables.shape[1] * block}: "
            f"{block_tables.shape[1]} blocks of {block} per sequence"
        )
    if high == 0:
        return
    used = torch.arange(block_tables.shape[1]) * block < lengths[:, None]
    low, high = (int(v) for v in torch.aminmax(block_tables[used]))
    if low < 0 or high >= count:
        raise ValueError(f"{OP}: block_tables has values {low} to {high}, expected 0 to {count - 1}")


def _queries(q: Tensor, block_tables: Tensor, cu_queries: Tensor | None) -> Tensor:
    """(B,) number of queries of each sequence."""
    return block_tables.new_ones(block_tables.shape[0]) if cu_queries is None else cu_queries.diff()


def _cost(q, k_cache, v_cache, block_tables, lengths, cu_queries=None, k_scale=None, *_, window=None, **__):
    """2 products of 2 D FLOPs per live pair. Moves live keys and values with their scales, q, y and used table entries.

    Reads the values of `lengths`, which synchronizes with a GPU.
    """
    heads, width = q.shape[1:]
    pairs = keys = entries = 0
    counts = _queries(q, block_tables, cu_queries).tolist()
    for length, count in zip(lengths.tolist(), counts, strict=True):
        reach = [max(0, length - count + i + 1) for i in range(count)]
        pairs += sum(reach if window is None else (min(r, window) for r in reach))
        keys += length if window is None else min(length, window + count - 1)
        entries += -(-length // k_cache.shape[1])
    head = width * k_cache.element_size() + (0 if k_scale is None else k_scale.element_size())  # bytes per token
    y = q.numel() * q.element_size()
    tables = 4 * (entries + lengths.numel() + (0 if cu_queries is None else cu_queries.numel()))
    return Cost(4 * width * heads * pairs, 2 * keys * k_cache.shape[2] * head + 2 * y + tables, 0, 0, y, 0)


def _matmul_flops(q, k_cache, v_cache, block_tables, lengths, cu_queries=None, *_, **__):
    """2 products of 2 D FLOPs per pair of a query and a key of its sequence, live or not, as torch counts."""
    pairs = int((_queries(q, block_tables, cu_queries) * lengths).sum())
    return 4 * q.shape[1] * q.shape[2] * pairs


def _sample(
    batch: int = 4, queries: int = 1, heads: int = 12, head_dim: int = 64, keys: int = 256,
    kv_heads: int | None = None, block: int = 16, bits: int | None = None, slopes: int | None = None,
    sinks: int | None = None, **like,
):  # fmt: skip
    """A cache with blocks in random order. block = keys gives one block per sequence, bits = 8 an int8 cache.

    `slopes` and `sinks` add ALiBi slopes and sinks.
    """
    blocks, device = -(-keys // block), like.get("device")
    q = torch.randn(batch * queries, heads, head_dim, **like)
    caches = [torch.randn(batch * blocks, block, kv_heads or heads, head_dim, **like) for _ in "kv"]
    tables = torch.randperm(batch * blocks, device=device).view(batch, blocks).int()
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    starts = None if queries == 1 else torch.arange(batch + 1, dtype=torch.int32, device=device) * queries
    scales = ()
    if bits is not None:
        caches, scales = zip(*map(quantize_heads, caches), strict=True)
    if slopes is sinks is None:
        return q, *caches, tables, lengths, starts, *scales
    alibi = None if slopes is None else torch.arange(1, heads + 1, device=device).to(q.dtype) / 8
    sink = None if sinks is None else sample_sinks(heads, **like)
    return q, *caches, tables, lengths, starts, *(scales or (None, None)), alibi, sink


def _dequantized(blocks: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    return blocks if scales is None else (blocks * scales[..., None]).to(dtype)


def _alloc(q, *_, needs, **__):
    return (torch.empty(q.shape, dtype=q.dtype, device=q.device),), ()


@op(
    cost=_cost, sample=_sample, check=_check, alloc=_alloc, strided=("q", "k_cache", "v_cache"),
    autocast="lower", gradient=False, autocast_exempt=("k_scale", "v_scale", "sinks"), matmul_flops=_matmul_flops,
)  # fmt: skip
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    cu_queries: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    window: int | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention from the last tokens of each sequence to its cached keys.

    Args:
        q: (N, H, D) float32, bfloat16 or float16, the new tokens of B sequences, concatenated.
        k_cache, v_cache: (blocks, block, K, D), any strides; K divides H. Only the eager backend takes a cache whose
            last axis is not contiguous. A contiguous cache (B, S, K, D) is the case block = S with block_tables =
            arange(B)[:, None]. Values after a sequence's keys have no effect, not even NaN. Dtype of q, or int8 with
            scales.
        block_tables: (B, M) int32, the blocks of each sequence. Entries after its keys are not read.
        lengths: (B,) int32, number of keys of each sequence, including its new tokens; at most M * block.
        cu_queries: (B + 1,) int32, the start of each sequence's queries in q, then N. None: one query per sequence.
        k_scale, v_scale: (blocks, block, K) float32, contiguous: the scale of each head of each token in an int8
            cache, as `cache_store` writes them.
        window: a query attends to at most this many keys, including its own.
        alibi: (H,) slopes; adds slope * (j - p) for a query at position p.
        sinks: (H,) of any floating dtype, as in `attention`.
        scale: factor on q k^T. Default: 1 / sqrt(D).
        softcap: limit of the scaled scores, as in `attention`.
    Returns:
        (N, H, D), dtype of q, contiguous; zero for a query without a live key (more queries than keys, length 0).
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.
        NotImplementedError: an input requires grad, or the forced backend does not support the call.
    """
    counts = _queries(q, block_tables, cu_queries).tolist()
    results = []
    for queries, table, length in zip(q.split(counts), block_tables, lengths.tolist(), strict=True):
        used = table[: -(-length // k_cache.shape[1])].long()
        k, v = (
            _dequantized(cache[used], None if scales is None else scales[used], q.dtype).flatten(0, 1)[None, :length]
            for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
        )
        empty = queries.new_zeros(1, *queries.shape)
        params = {"window": window, "alibi": alibi, "sinks": sinks, "scale": scale, "softcap": softcap}
        results.append(attention.eager(queries[None], k, v, **params) if length else empty)
    return torch.cat([result[0] for result in results]) if results else torch.empty_like(q)
