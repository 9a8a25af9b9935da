"""Causal attention with online softmax.

    u = scale q k^T      c = softcap tanh(u / softcap), or u without a softcap      s = c + alibi_h (j - i) + bias
    lse = log(e^sink_h + sum of e^s over the live keys)      p = e^(s - lse)      y = p v      delta = rowsum(dy * y)
    dv = p^T dy      ds = p * (dy v^T - delta)      du = ds, times 1 - (c / softcap)^2 with a softcap
    dq = scale du k      dk = scale du^T q      dbias = ds      dalibi_h = sum of ds (j - i)
    dsinks_h = -sum of e^(sink_h - lse) delta

With dropout y = (m * p) v, dv = (m * p)^T dy, ds = p * (m * dy v^T - delta). m is 0 or 1 / (1 - dropout), from
`dropout_mask`.

Key j is live for query i if all of these hold: j <= i (if causal), j > i - window, kv_start <= j < kv_start + kv_len,
both are in the same document, and the bias is not -inf. If T != S, i stands for i + S - T: queries align with the last
keys. The output and the gradients of a query without a live key are zero. Dao 2023, "FlashAttention-2",
arXiv:2307.08691, algorithms 1 and 2; ALiBi: Press, Smith, Lewis 2022, arXiv:2108.12409; grouped queries: Ainslie et
al. 2023, arXiv:2305.13245; soft cap: Gemma Team 2024, "Gemma 2", arXiv:2408.00118; sinks: OpenAI 2025,
"gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925. More than 300 lines: `attention` and `attention_qkv` share
the checks and the costs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op
from peakgpt.kernels.ops.attention_math import attend, default_scale, live_pairs, matmul_attention
from peakgpt.kernels.ops.qk_norm import check_norms, qk_norm, sample_norms, statistics
from peakgpt.kernels.ops.qkv_heads import rotated_heads, split_heads
from peakgpt.kernels.ops.rotary import check_tables, rotary, sample_tables


def check_scores(
    op: str, heads: int, device: torch.device, window: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    """Check the options of the scores that all ops of attention share."""
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}, expected at least 1")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}, expected a finite number above 0")
    check.shape(op, "sinks", sinks, heads)
    check.floats(op, "sinks", sinks, device)


def _check(
    q, k, v, alibi, bias, sinks, kv_start, kv_len, cu_seqlens, seed, *, causal, window, scale, softcap, dropout
):  # fmt: skip
    check.shape("attention", "q", q, None, None, None, None)
    check.shape("attention", "k", k, q.shape[0], None, None, q.shape[3])
    check.shape("attention", "v", v, *k.shape)
    check.same("attention", "q", q, k=k, v=v)
    check.same("attention", "q", q, mixed=True, alibi=alibi, bias=bias)
    check.integers("attention", "kv_start", kv_start, q.device)
    check.integers("attention", "kv_len", kv_len, q.device)
    check.integers("attention", "seed", seed, q.device)
    check.shape("attention", "seed", seed, 1)
    batch, tokens, heads, _ = q.shape
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"attention: {heads} query heads over {k.shape[2]} key heads, expected a whole multiple")
    check_scores("attention", heads, q.device, window, softcap, sinks)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"attention: dropout is {dropout}, expected 0 <= dropout < 1")
    check.shape("attention", "alibi", alibi, heads)
    check.shape("attention", "kv_start", kv_start, batch)
    check.shape("attention", "kv_len", kv_len, batch)
    if bias is not None:
        check.shape("attention", "bias", bias, None, None, tokens, k.shape[1])
        if bias.shape[0] not in (1, batch) or bias.shape[1] not in (1, heads):
            raise ValueError(
                f"attention: bias has shape {tuple(bias.shape)}, "
                f"expected (1 or {batch}, 1 or {heads}, {tokens}, {k.shape[1]})"
            )
    if cu_seqlens is not None:
        check.offsets("attention", "cu_seqlens", cu_seqlens, tokens, q.device)
        if batch != 1 or tokens != k.shape[1]:
            raise ValueError(
                f"attention: packed documents with q {tuple(q.shape)} and k {tuple(k.shape)}, expected B = 1 and T = S"
            )


def _cost(q, k, v, alibi=None, bias=None, sinks=None, *_, causal=True, window=None, **__):
    """2 products of 2 D FLOPs per live pair forward, 5 backward. Moves q, k, v, y, sinks and their gradients once."""
    batch, tokens, heads, width = q.shape
    pairs = batch * heads * live_pairs(tokens, k.shape[1], causal, window)
    size, lse = q.element_size(), 4 * batch * tokens * heads
    y, inputs = q.numel() * size, (q.numel() + k.numel() + v.numel()) * size
    inputs += 0 if sinks is None else sinks.numel() * sinks.element_size()
    written = inputs + lse  # backward
    return Cost(4 * width * pairs, inputs + y, 10 * width * pairs, inputs + 2 * y + lse + written, y, written)


def _sample(
    batch: int = 4, tokens: int = 256, heads: int = 12, head_dim: int = 64, keys: int | None = None,
    kv_heads: int | None = None, slopes: int | None = None, sinks: int | None = None, padded: int | None = None,
    documents: int | None = None, **like,
):  # fmt: skip
    """Return random inputs: q, k and v, then the options that are asked for.

    `slopes` and `sinks` add ALiBi slopes and sinks; `padded` is the number of keys that each sequence has less than the
    one before, as left padding; `documents` adds their starts, with batch 1.
    """
    keys, kv_heads = keys or tokens, kv_heads or heads
    q = torch.randn(batch, tokens, heads, head_dim, **like)
    tensors = q, *(torch.randn(batch, keys, kv_heads, head_dim, **like) for _ in range(2))
    if slopes is sinks is padded is documents is None:
        return tensors
    alibi = None if slopes is None else torch.arange(1, heads + 1, device=q.device).to(q.dtype) / 8
    sink = None if sinks is None else sample_sinks(heads, **like)
    start = None if padded is None else torch.arange(batch, device=q.device) * padded
    return *tensors, alibi, None, sink, start, None, None if documents is None else _starts(q, tokens, documents)


def sample_sinks(heads: int, **like) -> Tensor:
    """Sinks (H,) whose weight is large enough to be seen in a test."""
    return 2.0 + torch.randn(heads, **like)


def _starts(like: Tensor, tokens: int, documents: int) -> Tensor:
    return torch.arange(documents + 1, device=like.device) * tokens // documents


def _alloc(q, *_, needs, **__):
    """Saves lse (B, H, T) float32, natural logarithm, with the sink; -inf for a query without live key and sink."""
    batch, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return (out,), (q.new_empty((batch, heads, tokens), dtype=torch.float32),)


def _differentiable(q, k, v, **options):
    """The values of `attention`, by `matmul_attention`."""
    return attend(matmul_attention, q, k, v, **options)


@op(
    cost=_cost, sample=_sample, check=_check, alloc=_alloc, autocast="lower", autocast_exempt=("sinks",),
    saved_for_backward=("q", "k", "v", "alibi", "bias", "sinks", "kv_start", "kv_len", "cu_seqlens", "seed", "out"),
    strided=("q", "k", "v", "bias", "out"), random_param="dropout", differentiable=_differentiable,
)  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    alibi: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Attend from each query to its live keys.

    Args:
        q: (B, T, H, D) float32, bfloat16 or float16, any strides; copied if the last one is not 1.
        k, v: (B, S, K, D), K divides H: grouped or single key heads by shape.
        causal: query i attends to keys 0 .. i + S - T.
        window: query i attends to at most this many keys: i - window + 1 .. i.
        alibi: (H,) slopes; adds slope * (j - i).
        bias: (B or 1, H or 1, T, S), added to the scores; -inf masks a key. It gets a gradient.
        sinks: (H,) of any floating dtype, a logit of each query head that takes part in the softmax and has no value.
            The window and the other masks do not cover it. Not cast by autocast. It gets a gradient.
        scale: factor on q k^T. Default: 1 / sqrt(D).
        softcap: limit of the scaled scores: softcap * tanh(score / softcap), before alibi, bias and masks.
        dropout: probability of dropping an attention weight.
        kv_start, kv_len: (B,) integers; sequence b's keys are kv_start[b] .. kv_start[b] + kv_len[b] - 1.
        cu_seqlens: (N + 1,) integers, the starts of N documents packed into one sequence (B = 1), then its length.
        seed: (1,) int64 seed of dropout. Default: drawn from torch's generator. With one seed all backends drop the
            same weights. Without a seed the eager backend uses torch's dropout.
    Returns:
        (B, T, H, D), dtype of q, contiguous; zero for a query without a live key.
    Raises:
        ValueError: shapes, dtypes, devices or parameters do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    optional = {"alibi": alibi, "bias": bias, "sinks": sinks, "kv_start": kv_start, "kv_len": kv_len,
                "cu_seqlens": cu_seqlens}  # fmt: skip
    masked = window is not None or any(t is not None for t in optional.values()) or (dropout > 0 and seed is not None)
    if not masked and softcap is None and (not causal or q.shape[1] == k.shape[1]):
        grouped = {"enable_gqa": True} if k.shape[2] != q.shape[2] else {}
        operands = (t.transpose(1, 2) for t in (q, k, v))
        scale = default_scale(q.shape[-1], scale)
        y = F.scaled_dot_product_attention(*operands, is_causal=causal, dropout_p=dropout, scale=scale, **grouped)
        return y.transpose(1, 2).contiguous()
    return attend(
        F.scaled_dot_product_attention, q, k, v, causal=causal, window=window, scale=scale, softcap=softcap,
        dropout=dropout, seed=seed, **optional,
    )  # fmt: skip


def _check_qkv(qkv, cos, sin, cu_seqlens, q_norm, k_norm, sinks, *, n_head, window, softcap, **_):
    check.shape("attention_qkv", "qkv", qkv, None, None, None, None)
    rest = qkv.shape[2] - n_head
    if n_head < 1 or rest < 2 or rest % 2 or n_head % (rest // 2):
        raise ValueError(
            f"attention_qkv: {qkv.shape[2]} heads in total and {n_head} query heads, expected H + 2 K with K dividing H"
        )
    check_scores("attention_qkv", n_head, qkv.device, window, softcap, sinks)
    check.both("attention_qkv", "cos", cos, "sin", sin)
    if cos is not None:
        check_tables("attention_qkv", "qkv", qkv, cos, sin)
    check.both("attention_qkv", "q_norm", q_norm, "k_norm", k_norm)
    if q_norm is not None:
        check_norms("attention_qkv", "qkv", qkv, q_norm, k_norm, n_head, rest // 2)
    if cu_seqlens is not None:
        check.offsets("attention_qkv", "cu_seqlens", cu_seqlens, qkv.shape[1], qkv.device)
        if qkv.shape[0] != 1:
            raise ValueError(f"attention_qkv: packed documents with qkv {tuple(qkv.shape)}, expected B = 1")


def _cost_qkv(
    qkv, cos=None, sin=None, cu_seqlens=None, q_norm=None, k_norm=None, sinks=None, *, n_head, interleaved=False,
    norm_eps=None, norm_offset=0.0, **params,
):  # fmt: skip
    """Attention's cost. With rotary or norms, forward also writes the heads as attention takes them.

    Backward also reads queries and keys before the norms.
    """
    plain, heads = attention.cost(*split_heads(qkv, n_head), sinks=sinks, **params), rotated_heads(qkv, n_head)
    if q_norm is not None:
        more = qk_norm.cost(qkv[:, :, :heads], q_norm, k_norm, cos, sin, n_head=n_head)
    elif cos is not None:
        more = rotary.cost(qkv, cos, sin, heads=heads)
    else:
        return plain
    return Cost(
        plain.flops + more.flops, plain.bytes + more.bytes - 2 * more.written,
        plain.backward_flops + more.backward_flops, plain.backward_bytes + more.backward_bytes - more.written,
        plain.written, plain.backward_written + more.backward_written,
    )  # fmt: skip


def _sample_qkv(
    batch: int = 4, tokens: int = 256, heads: int = 12, head_dim: int = 64, kv_heads: int | None = None,
    pairs: int | None = None, documents: int | None = None, norms: int | None = None, sinks: int | None = None,
    **like,
):  # fmt: skip
    """Return random inputs.

    `pairs`, the rotated feature pairs per head, adds the rotary tables; `documents` adds their starts, with batch 1;
    `norms` adds norms of queries and keys, of the kinds of `sample_norms`; `sinks` adds sinks.
    """
    kv_heads = kv_heads or heads
    qkv = torch.randn(batch, tokens, heads + 2 * kv_heads, head_dim, **like)
    tables = (None, None) if pairs is None else sample_tables(tokens, pairs, **like)
    starts = None if documents is None else _starts(qkv, tokens, documents)
    weights = (None, None) if norms is None else sample_norms(norms, heads, kv_heads, head_dim, **like)
    return qkv, *tables, starts, *weights, None if sinks is None else sample_sinks(heads, **like)


def _alloc_qkv(qkv, cos, sin, cu_seqlens, q_norm, k_norm, sinks, *, needs, n_head, **_):
    """Saves attention's lse and the prepared heads (kernels/ops/qkv_heads.py)."""
    outputs, saved = _alloc(qkv[:, :, :n_head], needs=needs)
    if q_norm is not None:
        qk = qkv[:, :, : rotated_heads(qkv, n_head)]
        prepared = torch.empty(qk.shape, dtype=qkv.dtype, device=qkv.device)
        return outputs, (*saved, prepared, statistics(qk, q_norm, k_norm))
    rotated = () if cos is None else (torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),)
    return outputs, (*saved, *rotated)


def _saved_for_backward_qkv(qkv, cos, sin, cu_seqlens, q_norm, k_norm, sinks, **_):
    rotated_only = cos is not None and q_norm is None
    return (*(() if rotated_only else ("qkv",)), "cos", "sin", "cu_seqlens", "q_norm", "k_norm", "sinks", "out")


def _prepare(qkv, cos, sin, q_norm, k_norm, *, n_head, interleaved, norm_eps, norm_offset):
    """Return q, k and v as attention takes them: normalized and rotated."""
    q, k, v = split_heads(qkv, n_head)
    if q_norm is None and cos is None:
        return q, k, v
    if q_norm is None:
        rotated = rotary.eager(qkv, cos, sin, heads=rotated_heads(qkv, n_head), interleaved=interleaved)
        return split_heads(rotated, n_head)
    qk = qk_norm.eager(
        qkv[:, :, : rotated_heads(qkv, n_head)], q_norm, k_norm, cos, sin, n_head=n_head, interleaved=interleaved,
        eps=norm_eps, offset=norm_offset,
    )  # fmt: skip
    return *qk.split((n_head, k.shape[2]), 2), v


def _differentiable_qkv(
    qkv, cos, sin, cu_seqlens, q_norm, k_norm, sinks, *, n_head, interleaved, norm_eps, norm_offset, **params
):  # fmt: skip
    heads = _prepare(
        qkv, cos, sin, q_norm, k_norm, n_head=n_head, interleaved=interleaved, norm_eps=norm_eps,
        norm_offset=norm_offset,
    )  # fmt: skip
    tensors, params = attention.bind(heads, {"cu_seqlens": cu_seqlens, "sinks": sinks, **params})
    return attention.run_differentiable(tensors, params)


def _restore_qkv(inputs, outputs):
    if inputs[0] is None:
        raise RuntimeError(
            "attention_qkv: got create_graph=True with cos and sin, expected a call without them: backward keeps the "
            "rotated projection, not qkv. For second derivatives call rotary first, then attention_qkv without them"
        )
    return inputs


@op(
    cost=_cost_qkv, sample=_sample_qkv, typical={"n_head": 12}, check=_check_qkv, alloc=_alloc_qkv,
    autocast="lower", autocast_exempt=("cos", "sin", "q_norm", "k_norm", "sinks"),
    saved_for_backward=_saved_for_backward_qkv, strided=("qkv", "out"), differentiable=_differentiable_qkv,
    restore=_restore_qkv,
)  # fmt: skip
def attention_qkv(
    qkv: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, cu_seqlens: Tensor | None = None,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, sinks: Tensor | None = None, *, n_head: int,
    interleaved: bool = False, causal: bool = True, window: int | None = None, scale: float | None = None,
    softcap: float | None = None, norm_eps: float | None = None, norm_offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention over one packed projection. Its gradient is one tensor too, without a concatenation.

    With cos and sin, queries and keys are first rotated as by `rotary`. Backward rotates their gradients in float32
    inside the attention kernel, without another pass over memory. With q_norm and k_norm, queries and keys are first
    normalized, then rotated, as by `qk_norm`.

    Args:
        qkv: (B, T, H + 2 K, D): H query heads, then K key heads, then K value heads; strides as in `attention`.
        cos, sin: (T, R / 2) dtype of qkv, or float32; both or neither. Fused backends give them no gradient.
        cu_seqlens: (N + 1,) integers, the starts of packed documents, as in `attention`; B = 1.
        q_norm, k_norm: weights, as in `qk_norm`; both or neither.
        sinks: (H,), as in `attention`.
        n_head: H.
        interleaved: the layout of feature pairs, as in `rotary`.
        causal, window, scale, softcap: as in `attention`.
        norm_eps, norm_offset: `eps` and `offset` of `qk_norm`.
    Returns:
        (B, T, H, D), dtype of qkv, contiguous.
    Raises:
        ValueError: shapes or parameters do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    heads = _prepare(
        qkv, cos, sin, q_norm, k_norm, n_head=n_head, interleaved=interleaved, norm_eps=norm_eps,
        norm_offset=norm_offset,
    )  # fmt: skip
    return attention.eager(
        *heads, causal=causal, window=window, scale=scale, softcap=softcap, cu_seqlens=cu_seqlens, sinks=sinks
    )
