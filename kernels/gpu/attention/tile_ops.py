"""Device functions of attention's kernels: ranges of tiles, loads and stores, masks, ALiBi and bias, dropout."""

import math

import triton
import triton.language as tl

from peakgpt.kernels.gpu.attention import schedule
from peakgpt.kernels.ops.philox import ROUNDS

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
_ROUNDS = tl.constexpr(ROUNDS)

_key_bounds = triton.jit(schedule.key_bounds)
_query_bounds = triton.jit(schedule.query_bounds)
_tiles = triton.jit(schedule.tiles)
assignment = triton.jit(schedule.assignment)
# Integer arguments that Triton should not specialize: a variant for 1 or for multiples of 16 would not be faster.
SIZES = ("T", "S", "H", "heads", "section", "window", "threshold")


@triton.jit
def key_range(kv_start_ptr, kv_len_ptr, b, S):
    """Return (lo, hi): sequence b has the keys lo..hi-1."""
    lo, hi = tl.cast(0, tl.int32), S
    if kv_start_ptr is not None:
        lo = tl.load(kv_start_ptr + b).to(tl.int32)
    if kv_len_ptr is not None:
        hi = tl.minimum(S, lo + tl.load(kv_len_ptr + b).to(tl.int32))
    return tl.minimum(tl.maximum(lo, 0), S), hi


@triton.jit
def key_tiles(i0, T, S, window, lo, hi, document_ptr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr):
    """Return schedule.tiles for queries i0..i0+BLOCK_Q-1: the tiles of keys they attend to, among keys lo..hi-1."""
    last = tl.minimum(i0 + BLOCK_Q, T) - 1
    full_lo, full_hi = lo, hi
    if document_ptr is not None:  # of the documents in the tile, the first query's begins first and ends first
        full_lo = tl.maximum(lo, tl.load(document_ptr + last))
        full_hi = tl.minimum(hi, tl.load(document_ptr + T + i0))
        lo = tl.maximum(lo, tl.load(document_ptr + i0))
        hi = tl.minimum(hi, tl.load(document_ptr + T + last))
    need_lo, need_hi, full_lo, full_hi = _key_bounds(i0, last, S - T, window, lo, hi, full_lo, full_hi, CAUSAL)
    return _tiles(need_lo, need_hi, full_lo, full_hi, BLOCK)


@triton.jit
def query_tiles(
    j0, T, S, window, lo, hi, document_ptr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return schedule.tiles for keys j0..j0+BLOCK_K-1 within lo..hi-1: the tiles of queries that attend to them."""
    first, last = tl.maximum(j0, lo), tl.minimum(j0 + BLOCK_K, hi) - 1
    begin, full_begin, end, full_end = 0, 0, T, T
    if document_ptr is not None:
        nonempty = first <= last
        begin = tl.load(document_ptr + first, mask=nonempty, other=0)
        full_begin = tl.load(document_ptr + last, mask=nonempty, other=0)
        end = tl.load(document_ptr + T + last, mask=nonempty, other=0)
        full_end = tl.load(document_ptr + T + first, mask=nonempty, other=0)
    need_lo, need_hi, full_lo, full_hi = _query_bounds(
        first, last, S - T, window, begin, end, full_begin, full_end, CAUSAL
    )
    return _tiles(need_lo, need_hi, full_lo, full_hi, BLOCK)


@triton.jit
def load(ptr, rows, stride, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a tile (len(rows), BLOCK_D), with zeros in rows that are not live (None: all are live) and past column D."""
    d = tl.arange(0, BLOCK_D)
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
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
def store(ptr, rows, stride, live, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the live rows of tile x (len(rows), BLOCK_D), up to column D."""
    d = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (d < D)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def live_pairs(i, j, window, CAUSAL: tl.constexpr):
    """Return which pairs of query position i and key position j are inside the causal mask and the window.

    Positions of queries are aligned with those of keys: the last query has the position of the last key.
    """
    live = i > j - (1 << 30)  # True for all: positions are below 2^30
    if CAUSAL:
        live = j <= i
    if window is not None:
        live = live & (j > i - window)
    return live


@triton.jit
def cap_scores(s, scale, softcap, PRECISE: tl.constexpr):
    """Return the capped scores of products s, in units of log2, and the derivative of the cap.

    PRECISE computes a small tanh without the cancellation of 1 - 2 / (e^2x + 1). Half precision does not need it: the
    error of 1e-7 softcap in a score is far below that of a rounded weight.
    """
    x = s * (scale / softcap)
    t = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    if PRECISE:  # the polynomial of S. Moshier's Cephes, tanhf
        z = x * x
        p = -5.70498872745e-3 * z + 2.06390887954e-2
        p = p * z - 5.37397155531e-2
        p = p * z + 1.33314422036e-1
        p = p * z - 3.33332819422e-1
        t = tl.where(tl.abs(x) < 0.625, p * z * x + x, t)
    return t * (softcap * LOG2_E), 1.0 - t * t


@triton.jit
def add_alibi_and_bias(s, i, j, T, S, alibi_ptr, h, bias_ptr, stride_bias_t, stride_bias_s):
    """Add head h's ALiBi term and the bias to the scores s, in units of log2; i and j broadcast to the shape of s."""
    if alibi_ptr is not None:
        s += tl.load(alibi_ptr + h).to(tl.float32) * LOG2_E * (j - (i + S - T))
    if bias_ptr is not None:
        at = bias_ptr + i.to(tl.int64) * stride_bias_t + j.to(tl.int64) * stride_bias_s
        s += tl.load(at, mask=(i < T) & (j < S), other=0.0).to(tl.float32) * LOG2_E
    return s


@triton.jit
def dropout_mask(seed, threshold, b, h, i, j0, BLOCK_K: tl.constexpr):
    """Return which weights dropout keeps, boolean (len(i), BLOCK_K), for queries i and keys j0..j0+BLOCK_K-1.

    The mask is that of `dropout_mask` in kernels/ops/attention_math.py. threshold is dropout * 2^32 - 2^31, an int32.
    """
    group = j0 // 4 + tl.arange(0, BLOCK_K // 4)
    w0, w1, w2, w3 = tl.philox(seed, i[:, None], group[None, :], b.to(tl.int32), h.to(tl.int32), n_rounds=_ROUNDS)
    even, odd = tl.join(_at_least(w0, threshold), _at_least(w2, threshold)), tl.join(
        _at_least(w1, threshold), _at_least(w3, threshold)
    )
    return tl.reshape(tl.join(even, odd), (i.shape[0], BLOCK_K)) != 0  # [..., x, y] holds word 2 x + y of the group


@triton.jit
def _at_least(word, threshold):
    """Compare the uint32 word with a threshold that is shifted by 2^31 into int32."""
    return ((word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold).to(tl.int8)
