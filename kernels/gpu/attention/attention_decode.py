"""Attention of new tokens to a paged cache, in Triton: split the keys, compute each split separately, then merge.

    parts    for a tile of DECODE_ROWS rows (queries of one sequence x heads of one group) and each split of SPLIT keys:
                 m, l, acc of an online softmax over this split
    merge    for each row: m = max_s m_s    w_s = exp2(m_s - m)    out = sum_s w_s acc_s / sum_s w_s l_s
             a sink is one more split, with m = sink log2(e), l = 1 and acc = 0

An int8 cache is converted to q's dtype, which is exact. The scales of the keys multiply the scores in float32. The
scales of the values multiply the softmax weights before these are rounded to q's dtype.

The bits of a row depend on its own keys only: tiles, splits and the order of the merge are the same in any batch, and a
split that the row does not see contributes an exact zero. The number of programs that share the splits has no effect.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch, overlap
from peakgpt.kernels.gpu.attention import schedule
from peakgpt.kernels.gpu.attention.schedule import DECODE_ROWS, SPLIT
from peakgpt.kernels.gpu.attention.tile_ops import LOG2_E, cap_scores, live_pairs
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.ops.attention_math import default_scale

_slot_start = triton.jit(schedule.slot_start)


@dataclass(frozen=True, kw_only=True)
class DecodeTile(Tile):
    BLOCK_K: int


WIDTHS = (64, 128, 256)  # a row serves the head widths up to its own
WORKSPACE_BYTES = 1 << 26  # for m, l and acc of all splits; more rows take several launches
MERGE_TILE = Tile(warps=4)
# Softmax weights times the values' scales (max|v| / 127) are multiplied by this, so that float16 does not underflow.
VALUE_SCALE: tl.constexpr = tl.constexpr(64.0)
CHUNK = 16  # splits that the merge reads at a time

# Not measured on hardware; compiled without spills by Triton 3.7.1. Bytes in flight matter here, not arithmetic: the
# 3.35 TB/s of an H100 at a latency of 0.7 us need 18 KB a processor. An entry of the block table is loaded one stage
# before its block, so 2 n + 1 stages hold n blocks of keys and values: 5 stages are 32 KB a program, and four programs
# are resident. float32 spills with one stage on sm_86, and with two stages everywhere if the cache is int8. The rows
# after the | would spill with the general parameters.
_STAGES = {"sm_80": 5, "sm_86": 3, "sm_90": 5, "sm_100": 5, "gfx942": 2}
_BLOCKS = {
    ("half", 64): 64, ("half", 128): 32, ("half", 256): 32, ("fp32", 64): 32, ("fp32", 128): 16, ("fp32", 256): 16
}  # fmt: skip
TILES = {
    (arch, bits, *row): DecodeTile(BLOCK_K=block, warps=4, stages=_STAGES[arch] if row[0] == "half" else few)
    for arch in launch.ARCHS
    for bits, few in ((None, 2), (8, 1))  # bits of the cache's elements; None: the dtype of q
    for row, block in _BLOCKS.items()
} | {
    ("sm_80", 8, "fp32", 128): DecodeTile(BLOCK_K=16, warps=8, stages=1),
    ("sm_86", 8, "fp32", 128): DecodeTile(BLOCK_K=16, warps=8, stages=2),
    ("sm_86", 8, "fp32", 256): DecodeTile(BLOCK_K=16, warps=8, stages=1),
    ("sm_100", 8, "half", 64): DecodeTile(BLOCK_K=64, warps=4, stages=4),
}
# Rows of TILES that spill with a soft cap.
CAPPED_TILES = {("sm_86", bits, "half", 64): DecodeTile(BLOCK_K=64, warps=8, stages=3) for bits in (None, 8)}


@triton.jit
def _sequence(slot, cu_queries_ptr, B, steps, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return (sequence, its first query, its number of queries, first row of the slot).

    The row of an unused slot is past the last row of its sequence.
    """
    if cu_queries_ptr is None:
        per: tl.constexpr = (GROUP + ROWS - 1) // ROWS
        b = slot // per
        first, count, r0 = b, 1, slot % per * ROWS
    else:
        b, high = tl.cast(0, tl.int32), B - 1
        for _ in range(steps):  # binary search for the last sequence whose slots begin at this one or before
            middle = (b + high + 1) // 2
            begun = _slot_start(middle, tl.load(cu_queries_ptr + middle), GROUP, ROWS) <= slot
            b, high = tl.where(begun, middle, b), tl.where(begun, high, middle - 1)
        first = tl.load(cu_queries_ptr + b)
        count = tl.load(cu_queries_ptr + b + 1) - first
        r0 = (slot - _slot_start(b, first, GROUP, ROWS)) * ROWS
    return b, first, count, r0


@triton.jit(do_not_specialize=("stride_tables_b", "B", "parts", "splits", "first_slot", "steps", "window"))
def attention_decode_parts(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, tables_ptr, lengths_ptr, cu_queries_ptr, alibi_ptr,
    acc_ptr, m_ptr, l_ptr,
    stride_q_n, stride_q_h, stride_k_n, stride_k_s, stride_k_h, stride_v_n, stride_v_s, stride_v_h, stride_tables_b,
    B, parts, splits, first_slot, steps, block, scale, softcap, window,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Store m, l and acc of one tile of rows, for every parts-th split of its keys."""
    overlap.wait_for_previous(OVERLAP)
    slot, kv_head, part = first_slot + tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, first, count, r0 = _sequence(slot, cu_queries_ptr, B, steps, GROUP, ROWS)
    length = tl.load(lengths_ptr + b)
    rows = tl.arange(0, ROWS)
    i, h = (r0 + rows) // GROUP, kv_head * GROUP + (r0 + rows) % GROUP
    live_rows = i < count
    position = length - count + i
    d = tl.arange(0, BLOCK_D)
    q_at = q_ptr + (first + i).to(tl.int64)[:, None] * stride_q_n + h[:, None] * stride_q_h + d[None, :]
    q = tl.load(q_at, mask=live_rows[:, None] & (d < D)[None, :], other=0.0)
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + h, mask=live_rows, other=0.0).to(tl.float32) * LOG2_E
    lo, hi = tl.cast(0, tl.int32), tl.minimum(length, length - count + (r0 + ROWS - 1) // GROUP + 1)
    if window is not None:
        lo = tl.maximum(0, length - count + r0 // GROUP - window + 1)
    hi = tl.where(r0 < count * GROUP, hi, 0)  # an unused slot has no keys
    tables_ptr += b.to(tl.int64) * stride_tables_b
    keys = tl.arange(0, BLOCK_K)

    for split in range(lo // SPLIT + part, (hi + SPLIT - 1) // SPLIT, parts):
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((ROWS,), tl.float32)  # noqa: E741
        acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for t in range((tl.minimum(hi - split * SPLIT, SPLIT) + BLOCK_K - 1) // BLOCK_K):
            j = split * SPLIT + t * BLOCK_K + keys
            inside = j < hi
            at = tl.load(tables_ptr + j // block, mask=inside, other=0).to(tl.int64)
            mask = inside[:, None] & (d < D)[None, :]
            k_at = k_ptr + at * stride_k_n + (j % block).to(tl.int64) * stride_k_s + kv_head.to(tl.int64) * stride_k_h
            v_at = v_ptr + at * stride_v_n + (j % block).to(tl.int64) * stride_v_s + kv_head.to(tl.int64) * stride_v_h
            k = tl.load(k_at[:, None] + d[None, :], mask=mask, other=0.0)
            v = tl.load(v_at[:, None] + d[None, :], mask=mask, other=0.0)
            s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
            if softcap is None:
                s *= scale * LOG2_E
            if k_scale_ptr is not None:
                scales_at = (at * block + j % block) * tl.num_programs(1) + kv_head
                s *= tl.load(k_scale_ptr + scales_at, mask=inside, other=0.0)[None, :]
            if softcap is not None:
                s = cap_scores(s, scale, softcap, PRECISE=q.dtype == tl.float32)[0]
            if alibi_ptr is not None:
                s += slope[:, None] * (j[None, :] - position[:, None])
            live = live_pairs(position[:, None], j[None, :], window, True) & inside[None, :]
            s = tl.where(live, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - base[:, None])
            alpha = tl.exp2(m - base)
            l = l * alpha + tl.sum(p, 1)  # noqa: E741
            if v_scale_ptr is not None:
                p *= tl.load(v_scale_ptr + scales_at, mask=inside, other=0.0)[None, :] * VALUE_SCALE
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * alpha[:, None], input_precision="ieee")
            m = m_new
        if v_scale_ptr is not None:
            acc *= 1.0 / VALUE_SCALE
        # m, l and acc are (slots, K, ROWS, splits). Rows that do not see this split store m = -inf, l = 0, acc = 0.
        row = ((slot - first_slot).to(tl.int64) * tl.num_programs(1) + kv_head) * ROWS + rows
        tl.store(m_ptr + row * splits + split, m, mask=live_rows)
        tl.store(l_ptr + row * splits + split, l, mask=live_rows)
        at = acc_ptr + (row * splits + split)[:, None] * D + d[None, :]
        tl.store(at, acc, mask=live_rows[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=("B", "splits", "first_slot", "steps", "window"))
def attention_decode_merge(
    lengths_ptr, cu_queries_ptr, sinks_ptr, acc_ptr, m_ptr, l_ptr, out_ptr, B, splits, first_slot, steps, window,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Store the output of one row: merge m, l and acc of its splits in a fixed order."""
    overlap.wait_for_previous(OVERLAP)
    slot, kv_head, row = first_slot + tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, first, count, r0 = _sequence(slot, cu_queries_ptr, B, steps, GROUP, ROWS)
    i, h = (r0 + row) // GROUP, kv_head * GROUP + (r0 + row) % GROUP
    if i < count:
        position = tl.load(lengths_ptr + b) - count + i
        lo, hi = tl.cast(0, tl.int32), tl.maximum(position + SPLIT, 0) // SPLIT  # the row sees splits lo..hi-1
        if window is not None:
            lo = tl.maximum(0, position - window + 1) // SPLIT
        at = (((slot - first_slot).to(tl.int64) * tl.num_programs(1) + kv_head) * ROWS + row) * splits
        d, chunk = tl.arange(0, BLOCK_D), tl.arange(0, CHUNK)
        split_m = tl.full((CHUNK,), float("-inf"), tl.float32)
        for c in range(lo // CHUNK, (hi + CHUNK - 1) // CHUNK):
            split = c * CHUNK + chunk
            visible = (split >= lo) & (split < hi)
            split_m = tl.maximum(split_m, tl.load(m_ptr + at + split, mask=visible, other=float("-inf")))
        m = tl.max(split_m, 0)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2_E
            m = tl.maximum(m, sink)
        m = tl.where(m == float("-inf"), 0.0, m)
        split_l = tl.zeros((CHUNK,), tl.float32)
        acc = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        for c in range(lo // CHUNK, (hi + CHUNK - 1) // CHUNK):
            split = c * CHUNK + chunk
            visible = (split >= lo) & (split < hi)
            weight = tl.exp2(tl.load(m_ptr + at + split, mask=visible, other=float("-inf")) - m)
            split_l += weight * tl.load(l_ptr + at + split, mask=visible, other=0.0)
            mask = visible[:, None] & (d < D)[None, :]
            acc += weight[:, None] * tl.load(acc_ptr + (at + split)[:, None] * D + d[None, :], mask=mask, other=0.0)
        l = tl.sum(split_l, 0)  # noqa: E741
        if sinks_ptr is not None:
            l += tl.exp2(sink - m)  # noqa: E741
        out = tl.sum(acc, 0) / tl.where(l == 0.0, 1.0, l)
        heads = tl.num_programs(1) * GROUP
        at_out = out_ptr + ((first + i).to(tl.int64) * heads + h) * D + d
        tl.store(at_out, out.to(out_ptr.dtype.element_ty), mask=d < D)


# ---- the backend ----


def objection(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_, **__) -> str | None:
    if reason := launch.objection(q):
        return reason
    if not 1 <= q.shape[2] <= WIDTHS[-1]:
        return f"takes head widths 1 to {WIDTHS[-1]}, got {q.shape[2]}"
    if any(t.stride(-1) != 1 for t in (k_cache, v_cache)) and q.shape[2] > 1:
        return "needs caches with a contiguous last axis"
    return None


def _tile(q: Tensor, bits: int | None, softcap: float | None) -> DecodeTile:
    precision = "fp32" if q.dtype == torch.float32 else "half"
    row = launch.arch(q), bits, precision, next(w for w in WIDTHS if q.shape[2] <= w)
    return TILES[row] if softcap is None else CAPPED_TILES.get(row, TILES[row])


def forward(
    outputs, saved, q, k_cache, v_cache, block_tables, lengths, cu_queries, k_scale, v_scale, alibi, sinks,
    *, window, scale, softcap,
) -> None:  # fmt: skip
    (queries, heads, width), (_, block, kv_heads, _) = q.shape, k_cache.shape
    batch, group = lengths.shape[0], heads // kv_heads
    slots = -(-group // DECODE_ROWS) * batch
    if cu_queries is not None:
        slots = schedule.decode_slots(queries, batch, group)
    if queries == 0:
        return
    splits = max(1, -(-block_tables.shape[1] * block // SPLIT))
    slot_rows = kv_heads * DECODE_ROWS * splits
    batches = schedule.decode_batches(slots, slot_rows * (width + 2) * 4, WORKSPACE_BYTES)
    workspace = torch.empty(batches[0][1] * slot_rows * (width + 2), dtype=torch.float32, device=q.device)
    acc, m, l = workspace.split([batches[0][1] * slot_rows * n for n in (width, 1, 1)])  # noqa: E741
    q = launch.unit_last(q)
    tile = _tile(q, None if k_scale is None else 8, softcap)
    common = {
        "lengths_ptr": lengths, "cu_queries_ptr": cu_queries, "acc_ptr": acc, "m_ptr": m, "l_ptr": l, "B": batch,
        "splits": splits, "steps": batch.bit_length(), "window": window, "GROUP": group, "ROWS": DECODE_ROWS,
        "SPLIT": SPLIT, "D": width, "BLOCK_D": max(16, triton.next_power_of_2(width)), **overlap.options(q, queries),
    }  # fmt: skip
    merged_rows = DECODE_ROWS if cu_queries is not None else min(group, DECODE_ROWS)
    with launch.device_of(q):
        for first_slot, count in batches:
            parts = schedule.decode_parts(count, kv_heads, splits, launch.processors(q))
            attention_decode_parts[(count, kv_heads, parts)](
                q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, k_scale_ptr=k_scale, v_scale_ptr=v_scale,
                tables_ptr=block_tables, alibi_ptr=alibi,
                stride_q_n=q.stride(0), stride_q_h=q.stride(1),
                stride_k_n=k_cache.stride(0), stride_k_s=k_cache.stride(1), stride_k_h=k_cache.stride(2),
                stride_v_n=v_cache.stride(0), stride_v_s=v_cache.stride(1), stride_v_h=v_cache.stride(2),
                stride_tables_b=block_tables.stride(0), first_slot=first_slot, parts=parts, block=block,
                scale=default_scale(width, scale), softcap=None if softcap is None else float(softcap),
                BLOCK_K=tile.BLOCK_K, num_warps=tile.warps,
                num_stages=tile.stages, **common,
            )  # fmt: skip
            attention_decode_merge[(count, kv_heads, merged_rows)](
                sinks_ptr=sinks, out_ptr=outputs[0], first_slot=first_slot, CHUNK=CHUNK, num_warps=MERGE_TILE.warps,
                **common,
            )  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases: every row, for a cache of q's dtype and of int8.

    Half precision also compiles the plain call (one query a sequence).
    """
    options = {"OVERLAP": arch in overlap.ARCHS}
    for (row_arch, bits, precision, width), row in TILES.items():
        if row_arch == arch:
            for call in _ABSENT if precision == "half" else (_EVERY,):
                tile = CAPPED_TILES.get((arch, bits, precision, width), row) if call == _CAPPED else row
                sizes = {"BLOCK_K": tile.BLOCK_K, **options}
                yield _case(attention_decode_parts, precision, width, tile, call, sizes, bits)
                if precision == "half" and bits is None and call != _CAPPED:
                    merge_sizes = {"CHUNK": CHUNK, **options}
                    yield _case(attention_decode_merge, precision, width, MERGE_TILE, call, merge_sizes)


# The arguments that a call of the static check lacks. A soft cap with float32 spills up to ten instructions (sm_80).
_PLAIN, _EVERY, _CAPPED = "", " every option", " soft cap"
_ABSENT = {
    _PLAIN: {"cu_queries_ptr", "alibi_ptr", "sinks_ptr", "softcap", "window"}, _EVERY: {"softcap"},
    _CAPPED: {"alibi_ptr"},
}  # fmt: skip


def _case(
    kernel, precision: str, width: int, tile: Tile, call: str, sizes: dict[str, int], bits: int | None = None
) -> AotCase:
    dtype = "fp32" if precision == "fp32" else "bf16"
    missing = _ABSENT[call] | ({"k_scale_ptr", "v_scale_ptr"} if bits is None else set())
    absent = dict.fromkeys(missing & set(kernel.arg_names))
    given = {"GROUP": 1 if call == _PLAIN else 4, "ROWS": DECODE_ROWS, "SPLIT": SPLIT, "D": width, "BLOCK_D": width}
    types = {} if bits is None else dict.fromkeys(("k_ptr", "v_ptr"), "*i8")
    label = f"{dtype} D={width}{call}" + ("" if bits is None else " int8")
    return launch.case(
        kernel, label, tile, dtype, {**given, **sizes, **absent},
        hot=call == _PLAIN and (bits is None or width == WIDTHS[0]), scale="fp32", softcap="fp32", **types,
        **dict.fromkeys(("acc_ptr", "m_ptr", "l_ptr", "alibi_ptr", "sinks_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32"),
        **dict.fromkeys(("tables_ptr", "lengths_ptr", "cu_queries_ptr"), "*i32"),
    )  # fmt: skip
