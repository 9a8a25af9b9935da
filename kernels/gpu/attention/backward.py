"""Attention's backward kernels, without atomics: dq with delta, dslope and dsinks, then dk and dv, then dbias."""

import triton
import triton.language as tl

from peakgpt.kernels.gpu.attention.tile_ops import (
    LOG2_E,
    SIZES,
    add_alibi_and_bias,
    assignment,
    cap_scores,
    dropout_mask,
    key_range,
    key_tiles,
    live_pairs,
    load,
    query_tiles,
    store,
)
from peakgpt.kernels.gpu.rotary import rotate_back


@triton.jit
def _load_lse(ptr, live):
    """Load lse in units of log2. Rows that are not live or have no live key get +inf, so that p = exp2(s - lse) = 0."""
    lse = tl.load(ptr) if live is None else tl.load(ptr, mask=live, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_dq(
    q_ptr, k_ptr, v_ptr, alibi_ptr, bias_ptr, kv_start_ptr, kv_len_ptr, document_ptr, seed_ptr,
    sinks_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dq_ptr, dslope_ptr, dsinks_ptr, cos_ptr, sin_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_dout_b, stride_dout_t, stride_dout_h, stride_dq_b, stride_dq_t, stride_dq_h,
    T, S, H, heads, section, scale, softcap, window, threshold, keep_scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dq and delta of one tile of queries of one head, and its part of dslope and dsinks."""
    blocks = (T + BLOCK_Q - 1) // BLOCK_Q
    head, turn = assignment(tl.program_id(0), blocks, heads, section)
    i0 = (blocks - 1 - turn) * BLOCK_Q
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows, keys = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    i = i0 + rows
    position = i + (S - T)
    lo, hi = key_range(kv_start_ptr, kv_len_ptr, b, S)
    at = tl.cast(i0, tl.int64)
    q = load(q_ptr + b * stride_q_b + h * stride_q_h + at * stride_q_t, rows, stride_q_t, i < T, D, BLOCK_D)
    dout_ptr += b * stride_dout_b + h * stride_dout_h + at * stride_dout_t
    dout = load(dout_ptr, rows, stride_dout_t, i < T, D, BLOCK_D)
    out = load(out_ptr + ((b * T + at) * H + h) * D, rows, H * D, i < T, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * T + i, delta, mask=i < T)
    lse = _load_lse(lse_ptr + (b * H + h) * T + i, i < T)
    k_ptr += b * stride_k_b + h // GROUP * stride_k_h
    v_ptr += b * stride_v_b + h // GROUP * stride_v_h
    if bias_ptr is not None:
        bias_ptr += b * stride_bias_b + h * stride_bias_h
    if document_ptr is not None:
        begin = tl.load(document_ptr + i, mask=i < T, other=0)
        end_ = tl.load(document_ptr + T + i, mask=i < T, other=0)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr).to(tl.int64)

    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    dslope = tl.zeros((BLOCK_Q,), tl.float32)
    ds_sum, mean_distance = dslope, dslope
    if sinks_ptr is not None:  # the sum of a row of ds starts with the gradient of the sink
        natural_lse = tl.load(lse_ptr + (b * H + h) * T + i, mask=i < T, other=float("inf"))
        ds_sum = -tl.exp2((tl.load(sinks_ptr + h).to(tl.float32) - natural_lse) * LOG2_E) * delta
        if dsinks_ptr is not None:
            tl.store(dsinks_ptr + (b * blocks + turn) * H + h, tl.sum(ds_sum, 0))
    first, full_first, full_end, end = key_tiles(i0, T, S, window, lo, hi, document_ptr, CAUSAL, BLOCK_Q, BLOCK_K)
    left = full_first - first
    for MASKED in tl.static_range(2):
        count = left + end - full_end if MASKED else full_end - full_first
        for t in range(count):
            tile = tl.where(t < left, first + t, full_end + t - left) if MASKED else full_first + t
            j0 = tile * BLOCK_K
            j = j0 + keys
            inside = (j >= lo) & (j < hi) if MASKED else None
            k = load(k_ptr + tl.cast(j0, tl.int64) * stride_k_s, keys, stride_k_s, inside, D, BLOCK_D)
            v = load(v_ptr + tl.cast(j0, tl.int64) * stride_v_s, keys, stride_v_s, inside, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if softcap is None:
                s *= scale * LOG2_E
            else:
                s, cap_slope = cap_scores(s, scale, softcap, PRECISE=q.dtype == tl.float32)
            s = add_alibi_and_bias(
                s, i[:, None], j[None, :], T, S, alibi_ptr, h, bias_ptr, stride_bias_t, stride_bias_s
            )
            p = tl.exp2(s - lse[:, None])
            if MASKED:
                live = live_pairs(position[:, None], j[None, :], window, CAUSAL) & inside[None, :]
                if document_ptr is not None:
                    live = live & (j[None, :] >= begin[:, None]) & (j[None, :] < end_[:, None])
                p = tl.where(live, p, 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            if seed_ptr is not None:
                dp = tl.where(dropout_mask(seed, threshold, b, h, i, j0, BLOCK_K), dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if dslope_ptr is not None:
                distance = j[None, :] - position[:, None]
                dslope += tl.sum(ds * distance, 1)
                ds_sum += tl.sum(ds, 1)
                mean_distance += tl.sum(p * distance, 1)
            if softcap is not None:
                ds *= cap_slope
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptr += b * stride_dq_b + h * stride_dq_h + at * stride_dq_t
    dq *= scale
    if cos_ptr is not None:
        dq = rotate_back(dq, rows, i < T, cos_ptr + at * PAIRS, sin_ptr + at * PAIRS, PAIRS, INTERLEAVED, BLOCK_D)
    store(dq_ptr, rows, stride_dq_t, i < T, dq, D, BLOCK_D)
    if dslope_ptr is not None:
        # Each row of ds, with its sink, would sum to 0 if delta were exact, but out is rounded. Distances of thousands
        # would magnify this error, so the mean distance is subtracted.
        tl.store(dslope_ptr + (b * blocks + turn) * H + h, tl.sum(dslope - ds_sum * mean_distance, 0))


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_dkv(
    q_ptr, k_ptr, v_ptr, alibi_ptr, bias_ptr, kv_start_ptr, kv_len_ptr, document_ptr, seed_ptr,
    lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_dout_b, stride_dout_t, stride_dout_h, stride_dkv_b, stride_dkv_s, stride_dkv_h,
    T, S, H, heads, section, scale, softcap, window, threshold, keep_scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys of one key-value head."""
    blocks = (S + BLOCK_K - 1) // BLOCK_K
    head, turn = assignment(tl.program_id(0), blocks, heads, section)
    j0 = turn * BLOCK_K  # turn 0 takes the first block: under the causal mask it has the most queries
    b, kv_head = (head // (H // GROUP)).to(tl.int64), (head % (H // GROUP)).to(tl.int64)
    rows, keys = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    j = j0 + keys
    lo, hi = key_range(kv_start_ptr, kv_len_ptr, b, S)
    inside = (j >= lo) & (j < hi)
    at = tl.cast(j0, tl.int64)
    k = load(k_ptr + b * stride_k_b + kv_head * stride_k_h + at * stride_k_s, keys, stride_k_s, inside, D, BLOCK_D)
    v = load(v_ptr + b * stride_v_b + kv_head * stride_v_h + at * stride_v_s, keys, stride_v_s, inside, D, BLOCK_D)
    if document_ptr is not None:
        begin = tl.load(document_ptr + j, mask=j < T, other=0)
        end_ = tl.load(document_ptr + T + j, mask=j < T, other=0)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr).to(tl.int64)

    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    first, full_first, full_end, end = query_tiles(j0, T, S, window, lo, hi, document_ptr, CAUSAL, BLOCK_Q, BLOCK_K)
    left = full_first - first
    for MASKED in tl.static_range(2):
        count = left + end - full_end if MASKED else full_end - full_first
        for g in range(GROUP):
            h = kv_head * GROUP + g
            row_ptr = (b * H + h) * T
            q_head = q_ptr + b * stride_q_b + h * stride_q_h
            dout_head = dout_ptr + b * stride_dout_b + h * stride_dout_h
            bias_head = bias_ptr
            if bias_ptr is not None:
                bias_head += b * stride_bias_b + h * stride_bias_h
            for t in range(count):
                tile = tl.where(t < left, first + t, full_end + t - left) if MASKED else full_first + t
                i0 = tl.cast(tile * BLOCK_Q, tl.int64)
                i = tile * BLOCK_Q + rows
                live_rows = i < T if MASKED else None
                q = load(q_head + i0 * stride_q_t, rows, stride_q_t, live_rows, D, BLOCK_D)
                dout = load(dout_head + i0 * stride_dout_t, rows, stride_dout_t, live_rows, D, BLOCK_D)
                lse = _load_lse(lse_ptr + row_ptr + i, live_rows)
                if MASKED:
                    delta = tl.load(delta_ptr + row_ptr + i, mask=live_rows, other=0.0)
                else:
                    delta = tl.load(delta_ptr + row_ptr + i)
                s = tl.dot(k, tl.trans(q), input_precision="ieee")
                if softcap is None:
                    s *= scale * LOG2_E
                else:
                    s, cap_slope = cap_scores(s, scale, softcap, PRECISE=q.dtype == tl.float32)
                s = add_alibi_and_bias(
                    s, i[None, :], j[:, None], T, S, alibi_ptr, h, bias_head, stride_bias_t, stride_bias_s
                )
                p = tl.exp2(s - lse[None, :])
                if MASKED:
                    live = live_pairs(i[None, :] + (S - T), j[:, None], window, CAUSAL)
                    if document_ptr is not None:
                        live = live & (i[None, :] >= begin[:, None]) & (i[None, :] < end_[:, None])
                    p = tl.where(live, p, 0.0)
                dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
                dropped = p
                if seed_ptr is not None:
                    keep = tl.trans(dropout_mask(seed, threshold, b, h, i, j0, BLOCK_K))
                    dropped = tl.where(keep, p, 0.0)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision="ieee")
                ds = p * (dp - delta[None, :])
                if softcap is not None:
                    ds *= cap_slope
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    dk_ptr += b * stride_dkv_b + kv_head * stride_dkv_h + at * stride_dkv_s
    dv_ptr += b * stride_dkv_b + kv_head * stride_dkv_h + at * stride_dkv_s
    if seed_ptr is not None:
        dv *= keep_scale
    # The loops do not mask keys outside the sequence: their sums are wrong but do not affect other keys.
    dk = tl.where(inside[:, None], dk * scale, 0.0)
    dv = tl.where(inside[:, None], dv, 0.0)
    store(dv_ptr, keys, stride_dkv_s, j < S, dv, D, BLOCK_D)  # before dk is rotated back, which needs dv's registers
    if cos_ptr is not None:
        dk = rotate_back(dk, keys, j < S, cos_ptr + at * PAIRS, sin_ptr + at * PAIRS, PAIRS, INTERLEAVED, BLOCK_D)
    store(dk_ptr, keys, stride_dkv_s, j < S, dk, D, BLOCK_D)


@triton.jit(do_not_specialize=(*SIZES, "B"))
def attention_bwd_dbias(
    q_ptr, k_ptr, v_ptr, alibi_ptr, bias_ptr, kv_start_ptr, kv_len_ptr, document_ptr, seed_ptr,
    lse_ptr, dout_ptr, delta_ptr, dbias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, stride_dout_b, stride_dout_t, stride_dout_h,
    B, T, S, H, scale, softcap, window, threshold, keep_scale,
    SHARED_B: tl.constexpr, SHARED_H: tl.constexpr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one tile of dbias, summed in a fixed order over the sequences and heads that share it."""
    pair = tl.program_id(0).to(tl.int64)  # (sequence, head) of dbias, which is (B or 1, H or 1, T, S), contiguous
    j0, i0 = tl.program_id(1) * BLOCK_K, tl.program_id(2) * BLOCK_Q
    first_b, first_h = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    if not SHARED_H:
        first_h = pair % H
    if not SHARED_B:
        first_b = pair if SHARED_H else pair // H
    rows, keys = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    i, j = i0 + rows, j0 + keys
    position = i + (S - T)
    live = (i < T)[:, None] & live_pairs(position[:, None], j[None, :], window, CAUSAL)
    if document_ptr is not None:
        live = live & (j[None, :] >= tl.load(document_ptr + i, mask=i < T, other=0)[:, None])
        live = live & (j[None, :] < tl.load(document_ptr + T + i, mask=i < T, other=0)[:, None])
    if seed_ptr is not None:
        seed = tl.load(seed_ptr).to(tl.int64)
    first, _, _, end = key_tiles(i0, T, S, window, 0, S, document_ptr, CAUSAL, BLOCK_Q, BLOCK_K)
    visible = (tl.program_id(1) >= first) & (tl.program_id(1) < end)
    batches, heads = B if SHARED_B else 1, H if SHARED_H else 1

    dbias = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for n in range(tl.where(visible, batches * heads, 0)):
        b, h = first_b + n // heads, first_h + n % heads
        lo, hi = key_range(kv_start_ptr, kv_len_ptr, b, S)
        inside = (j >= lo) & (j < hi)
        q_at = q_ptr + b * stride_q_b + h * stride_q_h + tl.cast(i0, tl.int64) * stride_q_t
        q = load(q_at, rows, stride_q_t, i < T, D, BLOCK_D)
        k_at = k_ptr + b * stride_k_b + h // GROUP * stride_k_h + tl.cast(j0, tl.int64) * stride_k_s
        k = load(k_at, keys, stride_k_s, inside, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if softcap is None:
            s *= scale * LOG2_E
        else:
            s = cap_scores(s, scale, softcap, PRECISE=q.dtype == tl.float32)[0]
        bias_at = bias_ptr + b * stride_bias_b + h * stride_bias_h
        s = add_alibi_and_bias(s, i[:, None], j[None, :], T, S, alibi_ptr, h, bias_at, stride_bias_t, stride_bias_s)
        p = tl.exp2(s - _load_lse(lse_ptr + (b * H + h) * T + i, i < T)[:, None])
        p = tl.where(live & inside[None, :], p, 0.0)
        dout_at = dout_ptr + b * stride_dout_b + h * stride_dout_h + tl.cast(i0, tl.int64) * stride_dout_t
        dout = load(dout_at, rows, stride_dout_t, i < T, D, BLOCK_D)
        v_at = v_ptr + b * stride_v_b + h // GROUP * stride_v_h + tl.cast(j0, tl.int64) * stride_v_s
        v = load(v_at, keys, stride_v_s, inside, D, BLOCK_D)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if seed_ptr is not None:
            dp = tl.where(dropout_mask(seed, threshold, b, h, i, j0, BLOCK_K), dp * keep_scale, 0.0)
        delta = tl.load(delta_ptr + (b * H + h) * T + i, mask=i < T, other=0.0)
        dbias += p * (dp - delta[:, None])

    at = dbias_ptr + (pair * T + i.to(tl.int64)[:, None]) * S + j[None, :]
    tl.store(at, dbias.to(dbias_ptr.dtype.element_ty), mask=(i < T)[:, None] & (j < S)[None, :])
