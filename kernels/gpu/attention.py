"""Attention in Triton: online softmax forward, and a backward of two kernels without atomics.

    forward   for each tile of queries, over tiles of keys:
                  m' = max(m, rowmax s)    p = exp2(s - m')    l = l exp2(m - m') + rowsum p    acc likewise
              out = acc / l    lse = (m + log2 l) ln 2           s in units of log2: scale log2(e) q k^T
    dq        for each tile of queries, over tiles of keys: delta = rowsum(dout * out) (kept for dkv), dq += ds k
    dkv       for each tile of keys, over the heads of its group and tiles of queries: dv += p^T dout, dk += ds^T q

Each range of tiles is cut into full ones, which need no mask, and the rest on the diagonal and at the edges: two loops.
Dao 2023, "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2; Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.attention import default_scale
from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import AotCase, Tile


@dataclass(frozen=True, kw_only=True)
class AttentionTile(Tile):
    BLOCK_Q: int
    BLOCK_K: int
    newest_mma: bool = True  # False: 64 rows of dk and dv leave no registers at D 256; HMMA, not wgmma or tcgen05


class Tiles(NamedTuple):
    """One row of the table: the tile of each kernel."""

    fwd: AttentionTile
    dq: AttentionTile
    dkv: AttentionTile


def _tile(block_q: int, block_k: int, warps: int, stages: int, newest_mma: bool = True) -> AttentionTile:
    return AttentionTile(BLOCK_Q=block_q, BLOCK_K=block_k, warps=warps, stages=stages, newest_mma=newest_mma)


NO_GRADIENT = ("alibi",)
WIDTHS = (64, 128, 256)  # a row serves the head widths up to its own

# Unmeasured: compiled without spills by Triton 3.7.1, not yet timed on hardware. Larger tiles that were tried first
# spill (sm_90, D 64: forward 128 x 128 with 4 warps; D 128: dkv 64 x 128).
_FP32 = {
    64: Tiles(fwd=_tile(64, 32, 8, 2), dq=_tile(64, 32, 8, 2), dkv=_tile(32, 32, 8, 2)),
    128: Tiles(fwd=_tile(32, 16, 4, 2), dq=_tile(32, 16, 8, 2), dkv=_tile(16, 32, 8, 1)),
    256: Tiles(fwd=_tile(32, 16, 8, 2), dq=_tile(16, 16, 8, 2), dkv=_tile(16, 16, 8, 1)),
}
_GFX942_FP32 = {  # four warps of 64 threads may use 512 registers each, eight only 256
    64: Tiles(fwd=_tile(64, 32, 8, 2), dq=_tile(64, 32, 4, 1), dkv=_tile(32, 32, 4, 1)),
    128: _FP32[128],
    256: Tiles(fwd=_tile(32, 16, 8, 2), dq=_tile(16, 16, 4, 1), dkv=_tile(16, 16, 4, 1)),
}
TILES = {
    ("sm_80", "half", 64): Tiles(fwd=_tile(128, 64, 4, 3), dq=_tile(128, 64, 8, 2), dkv=_tile(32, 128, 8, 2)),
    ("sm_80", "half", 128): Tiles(fwd=_tile(64, 64, 8, 2), dq=_tile(64, 64, 8, 2), dkv=_tile(64, 64, 8, 2)),
    ("sm_80", "half", 256): Tiles(fwd=_tile(64, 64, 8, 2), dq=_tile(64, 32, 8, 2), dkv=_tile(32, 32, 8, 2)),
    ("sm_86", "half", 64): Tiles(fwd=_tile(128, 64, 4, 2), dq=_tile(64, 64, 4, 2), dkv=_tile(32, 128, 8, 2)),
    ("sm_86", "half", 128): Tiles(fwd=_tile(64, 64, 4, 2), dq=_tile(64, 64, 8, 2), dkv=_tile(32, 64, 8, 2)),
    ("sm_86", "half", 256): Tiles(fwd=_tile(64, 32, 8, 2), dq=_tile(32, 32, 8, 2), dkv=_tile(32, 32, 8, 2)),
    ("sm_90", "half", 64): Tiles(fwd=_tile(128, 64, 8, 3), dq=_tile(128, 64, 8, 3), dkv=_tile(64, 128, 8, 3)),
    ("sm_90", "half", 128): Tiles(fwd=_tile(128, 64, 8, 3), dq=_tile(128, 64, 8, 2), dkv=_tile(32, 128, 8, 2)),
    ("sm_90", "half", 256): Tiles(
        fwd=_tile(64, 64, 8, 2), dq=_tile(64, 32, 8, 2), dkv=_tile(32, 32, 8, 1, newest_mma=False)
    ),
    ("sm_100", "half", 64): Tiles(fwd=_tile(128, 64, 4, 3), dq=_tile(128, 64, 4, 3), dkv=_tile(64, 64, 8, 2)),
    ("sm_100", "half", 128): Tiles(fwd=_tile(128, 64, 8, 2), dq=_tile(128, 64, 8, 2), dkv=_tile(32, 64, 8, 1)),
    ("sm_100", "half", 256): Tiles(
        fwd=_tile(64, 64, 8, 2), dq=_tile(64, 32, 8, 2), dkv=_tile(32, 32, 8, 1, newest_mma=False)
    ),
    ("gfx942", "half", 64): Tiles(fwd=_tile(128, 64, 4, 1), dq=_tile(128, 64, 4, 1), dkv=_tile(64, 128, 4, 1)),
    ("gfx942", "half", 128): Tiles(fwd=_tile(128, 64, 4, 1), dq=_tile(64, 64, 4, 1), dkv=_tile(64, 64, 4, 1)),
    ("gfx942", "half", 256): Tiles(fwd=_tile(64, 64, 4, 1), dq=_tile(64, 32, 4, 1), dkv=_tile(16, 32, 4, 1)),
} | {
    (arch, "fp32", width): tiles
    for arch in launch.CLASSES
    for width, tiles in (_GFX942_FP32 if arch == "gfx942" else _FP32).items()
}

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))


# ---- which tiles a program visits ----


@triton.jit
def _tiles(need_lo, need_hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """(first, full_first, full_end, end): tiles first..end-1 hold need_lo..need_hi-1; the middle ones lie in full."""
    first = need_lo // BLOCK
    end = tl.where(need_hi > need_lo, (need_hi + BLOCK - 1) // BLOCK, first)
    full_first = tl.minimum(tl.maximum((full_lo + BLOCK - 1) // BLOCK, first), end)
    full_end = tl.minimum(tl.maximum(full_hi // BLOCK, full_first), end)
    return first, full_first, full_end, end


@triton.jit
def key_tiles(i0, T, S, window, lo, hi, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tiles of keys that queries i0..i0+BLOCK_Q-1 see; lo..hi-1 are the sequence's keys."""
    top = i0 + S - T
    bottom = tl.minimum(i0 + BLOCK_Q, T) - 1 + S - T
    need_lo, full_lo, need_hi, full_hi = lo, lo, hi, hi
    if CAUSAL:
        need_hi = tl.minimum(hi, bottom + 1)
        full_hi = tl.minimum(hi, top + 1)
    if window is not None:
        need_lo = tl.maximum(lo, top - window + 1)
        full_lo = tl.maximum(lo, bottom - window + 1)
    return _tiles(need_lo, need_hi, full_lo, full_hi, BLOCK_K)


@triton.jit
def query_tiles(j0, T, S, window, lo, hi, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tiles of queries that see any of keys j0..j0+BLOCK_K-1."""
    left = tl.maximum(j0, lo) - (S - T)  # of the live keys, as positions of queries
    right = tl.minimum(j0 + BLOCK_K, hi) - 1 - (S - T)
    need_lo, full_lo, need_hi, full_hi = tl.zeros_like(T), tl.zeros_like(T), T, T
    if CAUSAL:
        need_lo = tl.maximum(0, left)
        full_lo = tl.maximum(0, right)
    if window is not None:
        need_hi = tl.minimum(T, right + window)
        full_hi = tl.minimum(T, left + window)
    need_hi = tl.where(left <= right, need_hi, 0)
    return _tiles(need_lo, need_hi, full_lo, full_hi, BLOCK_Q)


@triton.jit
def _key_range(kv_start_ptr, kv_len_ptr, b, S):
    """First and one past the last key of sequence b."""
    lo = tl.zeros_like(S)
    hi = S
    if kv_start_ptr is not None:
        lo = tl.load(kv_start_ptr + b).to(tl.int32)
    if kv_len_ptr is not None:
        hi = tl.minimum(S, lo + tl.load(kv_len_ptr + b).to(tl.int32))
    return tl.minimum(tl.maximum(lo, 0), S), hi


# ---- pieces of the kernels ----


@triton.jit
def _load(ptr, rows, stride, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile (rows, BLOCK_D), zero where a row is not live (None: all are) and past the head's width."""
    d = tl.arange(0, BLOCK_D)
    at = ptr + rows[:, None] * stride + d[None, :]
    if live is None and D == BLOCK_D:
        x = tl.load(at)
    elif live is None:
        x = tl.load(at, mask=(d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        x = tl.load(at, mask=live[:, None], other=0.0)
    else:
        x = tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    return x


@triton.jit
def _store(ptr, rows, stride, live, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (d < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _live(i, j, window, CAUSAL: tl.constexpr):
    """Which pairs of query position i (counted from the end, as keys are) and key j of the sequence are live."""
    live = i > j - (1 << 30)  # all: every position is below 2^30
    if CAUSAL:
        live = j <= i
    if window is not None:
        live = live & (j > i - window)
    return live


# ---- kernels ----


@triton.jit
def attention_fwd(
    q_ptr, k_ptr, v_ptr, alibi_ptr, kv_start_ptr, kv_len_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    T, S, H, scale, window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    n_tiles = (T + BLOCK_Q - 1) // BLOCK_Q
    i0 = ((n_tiles - 1 - pid % n_tiles) * BLOCK_Q).to(tl.int32)  # the longest tile of a head first
    h = pid // n_tiles % H
    b = pid // n_tiles // H
    rows, keys = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    i = i0 + rows
    position = i + (S - T)
    lo, hi = _key_range(kv_start_ptr, kv_len_ptr, b, S)
    at = tl.cast(i0, tl.int64)
    q = _load(q_ptr + b * stride_q_b + h * stride_q_h + at * stride_q_t, rows, stride_q_t, i < T, D, BLOCK_D)
    k_ptr += b * stride_k_b + h // GROUP * stride_k_h
    v_ptr += b * stride_v_b + h // GROUP * stride_v_h
    scale *= _LOG2_E
    fold = scale
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + h).to(tl.float32) * _LOG2_E
        fold = 1.0

    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)  # noqa: E741
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    first, full_first, full_end, end = key_tiles(i0, T, S, window, lo, hi, CAUSAL, BLOCK_Q, BLOCK_K)
    left = full_first - first
    for MASKED in tl.static_range(2):
        count = left + end - full_end if MASKED else full_end - full_first
        for t in range(count):
            tile = tl.where(t < left, first + t, full_end + t - left) if MASKED else full_first + t
            j0 = tile * BLOCK_K
            j = j0 + keys
            inside = (j >= lo) & (j < hi) if MASKED else None
            k = _load(k_ptr + tl.cast(j0, tl.int64) * stride_k_s, keys, stride_k_s, inside, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if alibi_ptr is not None:
                s = s * scale + slope * (j[None, :] - position[:, None])
            if MASKED:
                s = tl.where(_live(position[:, None], j[None, :], window, CAUSAL) & inside[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * fold)
            base = m_new
            if MASKED:
                base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row without a live key so far
            p = tl.exp2(s * fold - base[:, None])
            alpha = tl.exp2(m - base)
            l = l * alpha + tl.sum(p, 1)  # noqa: E741
            v = _load(v_ptr + tl.cast(j0, tl.int64) * stride_v_s, keys, stride_v_s, inside, D, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new

    dead = l == 0.0
    acc = acc / tl.where(dead, 1.0, l)[:, None]
    lse = tl.where(dead, float("-inf"), (m + tl.log2(tl.where(dead, 1.0, l))) * _LN_2)
    _store(out_ptr + ((b * T + at) * H + h) * D, rows, H * D, i < T, acc, D, BLOCK_D)
    tl.store(lse_ptr + (b * H + h) * T + i, lse, mask=i < T)


@triton.jit
def attention_bwd_dq(
    q_ptr, k_ptr, v_ptr, alibi_ptr, kv_start_ptr, kv_len_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dq_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_dout_b, stride_dout_t, stride_dout_h, stride_dq_b, stride_dq_t, stride_dq_h,
    T, S, H, scale, window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    n_tiles = (T + BLOCK_Q - 1) // BLOCK_Q
    i0 = ((n_tiles - 1 - pid % n_tiles) * BLOCK_Q).to(tl.int32)
    h = pid // n_tiles % H
    b = pid // n_tiles // H
    rows, keys = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    i = i0 + rows
    position = i + (S - T)
    lo, hi = _key_range(kv_start_ptr, kv_len_ptr, b, S)
    at = tl.cast(i0, tl.int64)
    q = _load(q_ptr + b * stride_q_b + h * stride_q_h + at * stride_q_t, rows, stride_q_t, i < T, D, BLOCK_D)
    dout_ptr += b * stride_dout_b + h * stride_dout_h + at * stride_dout_t
    dout = _load(dout_ptr, rows, stride_dout_t, i < T, D, BLOCK_D)
    out = _load(out_ptr + ((b * T + at) * H + h) * D, rows, H * D, i < T, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * T + i, delta, mask=i < T)
    lse = tl.load(lse_ptr + (b * H + h) * T + i, mask=i < T, other=float("-inf")) * _LOG2_E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row without a live key: p = 0
    k_ptr += b * stride_k_b + h // GROUP * stride_k_h
    v_ptr += b * stride_v_b + h // GROUP * stride_v_h
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + h).to(tl.float32) * _LOG2_E

    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    first, full_first, full_end, end = key_tiles(i0, T, S, window, lo, hi, CAUSAL, BLOCK_Q, BLOCK_K)
    left = full_first - first
    for MASKED in tl.static_range(2):
        count = left + end - full_end if MASKED else full_end - full_first
        for t in range(count):
            tile = tl.where(t < left, first + t, full_end + t - left) if MASKED else full_first + t
            j0 = tile * BLOCK_K
            j = j0 + keys
            inside = (j >= lo) & (j < hi) if MASKED else None
            k = _load(k_ptr + tl.cast(j0, tl.int64) * stride_k_s, keys, stride_k_s, inside, D, BLOCK_D)
            v = _load(v_ptr + tl.cast(j0, tl.int64) * stride_v_s, keys, stride_v_s, inside, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2_E)
            if alibi_ptr is not None:
                s += slope * (j[None, :] - position[:, None])
            p = tl.exp2(s - lse[:, None])
            if MASKED:
                p = tl.where(_live(position[:, None], j[None, :], window, CAUSAL) & inside[None, :], p, 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptr += b * stride_dq_b + h * stride_dq_h + at * stride_dq_t
    _store(dq_ptr, rows, stride_dq_t, i < T, dq * scale, D, BLOCK_D)


@triton.jit
def attention_bwd_dkv(
    q_ptr, k_ptr, v_ptr, alibi_ptr, kv_start_ptr, kv_len_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_dout_b, stride_dout_t, stride_dout_h, stride_dkv_b, stride_dkv_s, stride_dkv_h,
    T, S, H, scale, window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    n_tiles = (S + BLOCK_K - 1) // BLOCK_K
    j0 = (pid % n_tiles * BLOCK_K).to(tl.int32)  # causal: the longest tile of a head first
    kv_head = pid // n_tiles % (H // GROUP)
    b = pid // n_tiles // (H // GROUP)
    rows, keys = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    j = j0 + keys
    lo, hi = _key_range(kv_start_ptr, kv_len_ptr, b, S)
    inside = (j >= lo) & (j < hi)
    at = tl.cast(j0, tl.int64)
    k = _load(k_ptr + b * stride_k_b + kv_head * stride_k_h + at * stride_k_s, keys, stride_k_s, inside, D, BLOCK_D)
    v = _load(v_ptr + b * stride_v_b + kv_head * stride_v_h + at * stride_v_s, keys, stride_v_s, inside, D, BLOCK_D)

    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    first, full_first, full_end, end = query_tiles(j0, T, S, window, lo, hi, CAUSAL, BLOCK_Q, BLOCK_K)
    left = full_first - first
    for MASKED in tl.static_range(2):
        count = left + end - full_end if MASKED else full_end - full_first
        for g in range(GROUP):
            h = kv_head * GROUP + g
            row_ptr = (b * H + h) * T
            q_head = q_ptr + b * stride_q_b + h * stride_q_h
            dout_head = dout_ptr + b * stride_dout_b + h * stride_dout_h
            if alibi_ptr is not None:
                slope = tl.load(alibi_ptr + h).to(tl.float32) * _LOG2_E
            for t in range(count):
                tile = tl.where(t < left, first + t, full_end + t - left) if MASKED else full_first + t
                i0 = tl.cast(tile * BLOCK_Q, tl.int64)
                i = tile * BLOCK_Q + rows
                position = i + (S - T)
                live = i < T if MASKED else None
                q = _load(q_head + i0 * stride_q_t, rows, stride_q_t, live, D, BLOCK_D)
                dout = _load(dout_head + i0 * stride_dout_t, rows, stride_dout_t, live, D, BLOCK_D)
                if MASKED:
                    lse = tl.load(lse_ptr + row_ptr + i, mask=live, other=float("-inf")) * _LOG2_E
                    lse = tl.where(lse == float("-inf"), float("inf"), lse)
                    delta = tl.load(delta_ptr + row_ptr + i, mask=live, other=0.0)
                else:
                    lse = tl.load(lse_ptr + row_ptr + i) * _LOG2_E
                    delta = tl.load(delta_ptr + row_ptr + i)
                s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _LOG2_E)
                if alibi_ptr is not None:
                    s += slope * (j[:, None] - position[None, :])
                p = tl.exp2(s - lse[None, :])
                if MASKED:
                    p = tl.where(_live(position[None, :], j[:, None], window, CAUSAL), p, 0.0)
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
                dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    dk_ptr += b * stride_dkv_b + kv_head * stride_dkv_h + at * stride_dkv_s
    dv_ptr += b * stride_dkv_b + kv_head * stride_dkv_h + at * stride_dkv_s
    # The loops let keys outside the sequence gather anything: a key's sums are its own.
    dk = tl.where(inside[:, None], dk * scale, 0.0)
    dv = tl.where(inside[:, None], dv, 0.0)
    _store(dk_ptr, keys, stride_dkv_s, j < S, dk, D, BLOCK_D)
    _store(dv_ptr, keys, stride_dkv_s, j < S, dv, D, BLOCK_D)


# ---- the backend ----


def _row(q: Tensor) -> tuple[Tiles, int]:
    """The row of the table for q's device, dtype and width, and BLOCK_D: the width padded to a power of two."""
    width = next(w for w in WIDTHS if q.shape[3] <= w)
    precision = "fp32" if q.dtype == torch.float32 else "half"
    return TILES[launch.arch(q), precision, width], max(16, triton.next_power_of_2(q.shape[3]))


def objection(
    q: Tensor, k: Tensor, v: Tensor, alibi=None, bias=None, kv_start=None, kv_len=None, cu_seqlens=None,
    seed=None, *, causal=True, window=None, scale=None, dropout=0.0,
) -> str | None:  # fmt: skip
    if reason := launch.objection(q):
        return reason
    if not 1 <= q.shape[3] <= WIDTHS[-1]:
        return f"takes head widths 1 to {WIDTHS[-1]}, got {q.shape[3]}"
    if any(t.stride(3) != 1 for t in (q, k, v)) and q.shape[3] > 1:
        return "needs q, k and v with a contiguous last axis"
    if default_scale(q.shape[3], scale) <= 0:
        return f"needs a scale above 0, got {scale}"
    if bias is not None:
        return "takes no additive bias yet"
    if cu_seqlens is not None:
        return "takes no packed documents (cu_seqlens) yet"
    return "has no dropout yet" if dropout else None


def _arguments(q, k, v, tile: AttentionTile, BLOCK_D: int, *, alibi, kv_start, kv_len, causal, window, scale) -> dict:
    """The arguments that all kernels share, and their launch options."""
    alibi, kv_start, kv_len = (None if t is None else t.contiguous() for t in (alibi, kv_start, kv_len))
    tokens, keys, heads, width = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    return dict(
        q_ptr=q, k_ptr=k, v_ptr=v, alibi_ptr=alibi, kv_start_ptr=kv_start, kv_len_ptr=kv_len,
        T=tokens, S=keys, H=heads, scale=default_scale(width, scale),
        window=None if window is None or window >= keys else window,
        GROUP=heads // k.shape[2], CAUSAL=causal, D=width, BLOCK_D=BLOCK_D,
        BLOCK_Q=tile.BLOCK_Q, BLOCK_K=tile.BLOCK_K, num_warps=tile.warps, num_stages=tile.stages,
        **_strides("bth", q=q), **_strides("bsh", k=k, v=v),
    )  # fmt: skip


def _strides(axes: str, **tensors: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{axis}": t.stride(n) for name, t in tensors.items() for n, axis in enumerate(axes)}


def fill_forward(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    """Write out (B, T, H, D) contiguous and lse (B, H, T); options as in `_arguments`."""
    tiles, block_d = _row(q)
    batch, tokens, heads, _ = q.shape
    with launch.on(q):
        attention_fwd[(triton.cdiv(tokens, tiles.fwd.BLOCK_Q) * heads * batch,)](
            out_ptr=out, lse_ptr=lse, **_arguments(q, k, v, tiles.fwd, block_d, **options)
        )


def fill_backward(
    dq: Tensor, dkv: tuple[Tensor, Tensor] | None, dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, **options,
) -> None:  # fmt: skip
    """Write dq and, unless dkv is None, dk and dv, which have equal strides; their last axes are contiguous."""
    tiles, block_d = _row(q)
    batch, tokens, heads, _ = q.shape
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    delta = torch.empty_like(lse)
    common = dict(lse_ptr=lse, dout_ptr=dout, delta_ptr=delta, **_strides("bth", dout=dout))
    with launch.on(q):
        attention_bwd_dq[(triton.cdiv(tokens, tiles.dq.BLOCK_Q) * heads * batch,)](
            out_ptr=out, dq_ptr=dq, **_strides("bth", dq=dq), **common,
            **_arguments(q, k, v, tiles.dq, block_d, **options),
        )  # fmt: skip
        if dkv is not None:
            attention_bwd_dkv[(triton.cdiv(k.shape[1], tiles.dkv.BLOCK_K) * k.shape[2] * batch,)](
                dk_ptr=dkv[0], dv_ptr=dkv[1], **_strides("bsh", dkv=dkv[0]), **common,
                **_arguments(q, k, v, tiles.dkv, block_d, **options),
            )  # fmt: skip


def forward(
    outputs, saved, q, k, v, alibi, bias, kv_start, kv_len, cu_seqlens, seed=None, *, dropout, **params
) -> None:
    fill_forward(outputs[0], saved[0], q, k, v, alibi=alibi, kv_start=kv_start, kv_len=kv_len, **params)


def backward(grads, inputs, outputs, saved, needs, *, dropout, **params) -> Sequence[Tensor | None]:
    q, k, v, alibi, _, kv_start, kv_len, *_ = inputs
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = tuple(torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in "kv") if needs[1] or needs[2] else None
    fill_backward(
        dq, dkv, grads[0], outputs[0], saved[0], q, k, v, alibi=alibi, kv_start=kv_start, kv_len=kv_len, **params
    )
    return dq, *(dkv or (None, None)), *[None] * 6


# ---- the static check ----


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Every row for a class of devices: with every option and, in half precision, the plain causal call too."""
    for (row_arch, precision, width), tiles in TILES.items():
        if row_arch == arch:
            for kernel, tile in zip((attention_fwd, attention_bwd_dq, attention_bwd_dkv), tiles, strict=True):
                for every in (True,) if precision == "fp32" else (False, True):
                    yield _case(kernel, "fp32" if precision == "fp32" else "bf16", width, tile, every)


def _case(kernel, dtype: str, width: int, tile: AttentionTile, every: bool) -> AotCase:
    sizes = {"D": width, "BLOCK_D": width, "BLOCK_Q": tile.BLOCK_Q, "BLOCK_K": tile.BLOCK_K}
    absent = {} if every else dict.fromkeys(("alibi_ptr", "kv_start_ptr", "kv_len_ptr", "window"))
    return launch.case(
        kernel, f"{dtype} D={width}" + (" every option" if every else ""), tile, dtype,
        {"GROUP": 4 if every else 1, "CAUSAL": True, **sizes, **absent},
        matmul=dtype != "fp32" and tile.newest_mma, scale="fp32",
        lse_ptr="*fp32", delta_ptr="*fp32", alibi_ptr="*fp32", kv_start_ptr="*i32", kv_len_ptr="*i32",
    )  # fmt: skip
