"""Attention's forward kernel, and the kernel that finds the document of each token."""

import triton
import triton.language as tl

from peakgpt.kernels.gpu.attention.tile_ops import (
    LN_2,
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
    store,
)


@triton.jit(do_not_specialize=("T", "N", "steps"))
def attention_documents(cu_seqlens_ptr, document_ptr, T, N, steps, BLOCK_T: tl.constexpr):
    """Fill document (2, T): for each token, the first token of its document and the first token after it."""
    i = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    low, high = tl.zeros_like(i), tl.zeros_like(i) + N - 1
    for _ in range(steps):  # binary search for the last document that begins at i or before
        middle = (low + high + 1) // 2
        begun = tl.load(cu_seqlens_ptr + middle) <= i
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle - 1)
    tl.store(document_ptr + i, tl.load(cu_seqlens_ptr + low).to(tl.int32), mask=i < T)
    tl.store(document_ptr + T + i, tl.load(cu_seqlens_ptr + low + 1).to(tl.int32), mask=i < T)


@triton.jit(do_not_specialize=SIZES)
def attention_fwd(
    q_ptr, k_ptr, v_ptr, alibi_ptr, bias_ptr, kv_start_ptr, kv_len_ptr, document_ptr, seed_ptr,
    sinks_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    T, S, H, heads, section, scale, softcap, window, threshold, keep_scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of one tile of queries of one head."""
    blocks = (T + BLOCK_Q - 1) // BLOCK_Q
    head, turn = assignment(tl.program_id(0), blocks, heads, section)
    i0 = (blocks - 1 - turn) * BLOCK_Q  # turn 0 takes the last block: under the causal mask it has the most keys
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows, keys = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    i = i0 + rows
    position = i + (S - T)
    lo, hi = key_range(kv_start_ptr, kv_len_ptr, b, S)
    at = tl.cast(i0, tl.int64)
    q = load(q_ptr + b * stride_q_b + h * stride_q_h + at * stride_q_t, rows, stride_q_t, i < T, D, BLOCK_D)
    k_ptr += b * stride_k_b + h // GROUP * stride_k_h
    v_ptr += b * stride_v_b + h // GROUP * stride_v_h
    exponent_scale = scale * LOG2_E  # applied in the exponent, except if another term follows the scale
    if softcap is not None or alibi_ptr is not None or bias_ptr is not None:
        exponent_scale = 1.0
    if bias_ptr is not None:
        bias_ptr += b * stride_bias_b + h * stride_bias_h
    if document_ptr is not None:
        begin = tl.load(document_ptr + i, mask=i < T, other=0)
        end_ = tl.load(document_ptr + T + i, mask=i < T, other=0)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr).to(tl.int64)

    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)  # noqa: E741
    if sinks_ptr is not None:  # the first weight of each row, without a value
        m = tl.zeros((BLOCK_Q,), tl.float32) + tl.load(sinks_ptr + h).to(tl.float32) * LOG2_E
        l = tl.where(m == float("-inf"), 0.0, 1.0)  # noqa: E741
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
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
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if softcap is not None:
                s = cap_scores(s, scale, softcap, PRECISE=q.dtype == tl.float32)[0]
            elif alibi_ptr is not None or bias_ptr is not None:
                s *= scale * LOG2_E
            if alibi_ptr is not None or bias_ptr is not None:
                s = add_alibi_and_bias(
                    s, i[:, None], j[None, :], T, S, alibi_ptr, h, bias_ptr, stride_bias_t, stride_bias_s
                )
            if MASKED:
                live = live_pairs(position[:, None], j[None, :], window, CAUSAL) & inside[None, :]
                if document_ptr is not None:
                    live = live & (j[None, :] >= begin[:, None]) & (j[None, :] < end_[:, None])
                s = tl.where(live, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * exponent_scale)
            base = m_new
            if MASKED or bias_ptr is not None:
                base = tl.where(m_new == float("-inf"), 0.0, m_new)  # not inf - inf in rows without a live key
            p = tl.exp2(s * exponent_scale - base[:, None])
            alpha = tl.exp2(m - base)
            l = l * alpha + tl.sum(p, 1)  # noqa: E741
            if seed_ptr is not None:
                p = tl.where(dropout_mask(seed, threshold, b, h, i, j0, BLOCK_K), p, 0.0)
            v = load(v_ptr + tl.cast(j0, tl.int64) * stride_v_s, keys, stride_v_s, inside, D, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new

    dead = l == 0.0
    acc = acc / tl.where(dead, 1.0, l)[:, None]
    if seed_ptr is not None:
        acc *= keep_scale
    lse = tl.where(dead, float("-inf"), (m + tl.log2(tl.where(dead, 1.0, l))) * LN_2)
    store(out_ptr + ((b * T + at) * H + h) * D, rows, H * D, i < T, acc, D, BLOCK_D)
    tl.store(lse_ptr + (b * H + h) * T + i, lse, mask=i < T)
