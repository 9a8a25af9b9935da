"""Attention in Triton: forward by online softmax, and a backward without atomics.

    forward   for each tile of queries, over tiles of keys, with scores s = scale log2(e) q k^T in units of log2:
                  m' = max(m, rowmax s)    alpha = exp2(m - m')    p = exp2(s - m')
                  l = l alpha + rowsum p    acc = acc alpha + p v
              out = acc / l    lse = (m + log2 l) ln 2
    dq        for each tile of queries, over tiles of keys: delta = rowsum(dout * out), stored for dkv; dq += ds k
    dkv       for each tile of keys, over the query heads of its group and tiles of queries:
                  dv += p^T dout    dk += ds^T q
    dbias     for each tile of the bias, over the sequences and heads that share it: dbias += ds

A soft cap replaces s by softcap log2(e) tanh(scale q k^T / softcap), and ds by ds (1 - tanh^2) in dq and dk. With a
sink the online softmax starts with m = sink log2(e) and l = 1.

Each range of tiles is split in two loops: full tiles, which need no mask, and tiles on the diagonal and at the edges.
Kernels: forward.py, backward.py, with device functions in tile_ops.py. Order of the tiles: schedule.py. Launch
parameters: tiles.py.

Dao 2023, "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2; Milakov and Gimelshein 2018,
arXiv:1805.02867.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.attention import schedule
from peakgpt.kernels.gpu.attention.backward import attention_bwd_dbias, attention_bwd_dkv, attention_bwd_dq
from peakgpt.kernels.gpu.attention.forward import attention_documents, attention_fwd
from peakgpt.kernels.gpu.attention.tiles import PRECISIONS, SLOWER, TILES, WIDTHS, AttentionTile, Tiles, key
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.gpu.reduce import empty_partials, sum_partials
from peakgpt.kernels.ops.attention_math import default_scale

DOCUMENTS_BLOCK_T, DOCUMENTS_TILE = 256, Tile(warps=4)  # of attention_documents


def objection(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None, scale=None, **__) -> str | None:
    if reason := launch.objection(q):
        return reason
    if not 1 <= q.shape[3] <= WIDTHS[-1]:
        return f"takes head widths 1 to {WIDTHS[-1]}, got {q.shape[3]}"
    if not q.shape[2]:
        return "takes at least 1 head, got 0"
    return None if default_scale(q.shape[3], scale) > 0 else f"needs a scale above 0, got {scale}"


def declines(
    q: Tensor, k: Tensor, v: Tensor, *optional: Tensor | None, window=None, softcap=None, dropout=0.0, **_
) -> str | None:
    """Return the row of SLOWER that shows torch faster for this plain call, or None.

    Torch has no tiled kernel for calls with other options.
    """
    measured = SLOWER.get(key(q, rich=False))
    plain = window is softcap is None and not dropout and all(tensor is None for tensor in optional)
    return str(measured) if measured and plain and k.shape[1] >= measured.min_keys else None


@functools.cache
def _cache_bytes(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).L2_cache_size


def _section(q: Tensor, streamed: Tensor, group: int) -> int:
    """Return schedule.section_heads; `streamed` (B, ., ., D) is one of the two tensors that a program loops over."""
    # Small in the interpreter, so that tests have several sections.
    cache = _cache_bytes(q.device.index) if q.is_cuda else 1 << 16
    return schedule.section_heads(2 * streamed.shape[1] * streamed.shape[3] * streamed.element_size(), cache, group)


def _tiles(q: Tensor, options, dalibi: Tensor | None = None) -> tuple[Tiles, int]:
    """Return the row of TILES, and BLOCK_D: the head width padded to a power of two."""
    rich = any(options.get(name) is not None for name in ("bias", "softcap")) or dalibi is not None
    rich = rich or options.get("dropout", 0.0) > 0
    return TILES[key(q, rich)], max(16, triton.next_power_of_2(q.shape[3]))


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, BLOCK_D: int, *, causal: bool, window: int | None, scale: float | None,
    softcap: float | None = None, alibi=None, bias=None, kv_start=None, kv_len=None, cu_seqlens=None, seed=None,
    dropout: float = 0.0,
) -> dict:  # fmt: skip
    """Return the arguments that all kernels share."""
    tokens, keys, heads, width = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    bias = None if bias is None else bias.resolve_neg()
    stride_b, stride_h, *stride_bias = (0, 0, 0, 0) if bias is None else bias.stride()
    if bias is not None:  # a stride of zero where sequences or heads share the bias
        stride_b, stride_h = (s if n > 1 else 0 for s, n in zip((stride_b, stride_h), bias.shape[:2], strict=True))
    return dict(
        q_ptr=q, k_ptr=k, v_ptr=v, alibi_ptr=alibi, bias_ptr=bias, kv_start_ptr=kv_start, kv_len_ptr=kv_len,
        document_ptr=None if cu_seqlens is None else _documents(cu_seqlens, tokens), seed_ptr=seed if dropout else None,
        stride_bias_b=stride_b, stride_bias_h=stride_h, stride_bias_t=stride_bias[0], stride_bias_s=stride_bias[1],
        T=tokens, S=keys, H=heads, scale=default_scale(width, scale),
        softcap=None if softcap is None else float(softcap),
        window=None if window is None or window >= keys else window,
        threshold=int(dropout * 2**32) - 2**31, keep_scale=1.0 / (1.0 - dropout),
        GROUP=heads // k.shape[2], CAUSAL=causal, D=width, BLOCK_D=BLOCK_D, **_strides("bth", q=q),
        **_strides("bsh", k=k, v=v),
    )  # fmt: skip


def _strides(axes: str, **tensors: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{axis}": t.stride(n) for name, t in tensors.items() for n, axis in enumerate(axes)}


def _documents(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return (2, tokens) int32: first token of each token's document, and the first token after the document."""
    document = torch.empty((2, tokens), dtype=torch.int32, device=cu_seqlens.device)
    count = cu_seqlens.shape[0] - 1
    attention_documents[(triton.cdiv(tokens, DOCUMENTS_BLOCK_T),)](
        cu_seqlens_ptr=cu_seqlens, document_ptr=document, T=tokens, N=count, steps=count.bit_length(),
        BLOCK_T=DOCUMENTS_BLOCK_T, num_warps=DOCUMENTS_TILE.warps,
    )  # fmt: skip
    return document


def _launch_options(tile: AttentionTile) -> dict[str, int]:
    return {"BLOCK_Q": tile.BLOCK_Q, "BLOCK_K": tile.BLOCK_K, "num_warps": tile.warps, "num_stages": tile.stages}


def _rotary_arguments(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> dict:
    if cos is None or not cos.shape[1]:
        return {"cos_ptr": None, "sin_ptr": None, "PAIRS": 0, "INTERLEAVED": False}
    return {"cos_ptr": cos, "sin_ptr": sin, "PAIRS": cos.shape[1], "INTERLEAVED": interleaved}


def fill_forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, **options
) -> None:
    """Fill out (B, T, H, D), contiguous, and lse (B, H, T); the options are those of `_arguments`."""
    tiles, block_d = _tiles(q, options)
    q, k, v = map(launch.unit_last, (q, k, v))
    batch, tokens, heads, _ = q.shape
    with launch.device_of(q):
        attention_fwd[(triton.cdiv(tokens, tiles.fwd.BLOCK_Q) * heads * batch,)](
            sinks_ptr=sinks, out_ptr=out, lse_ptr=lse, heads=batch * heads, section=_section(q, k, heads // k.shape[2]),
            **_launch_options(tiles.fwd), **_arguments(q, k, v, block_d, **options),
        )  # fmt: skip


def fill_backward(
    dq: Tensor, dkv: tuple[Tensor, Tensor] | None, dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, dalibi: Tensor | None = None, dbias: Tensor | None = None,
    dsinks: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = False,
    sinks: Tensor | None = None, **options,
) -> None:  # fmt: skip
    """Fill dq, and each of (dk, dv), dalibi (H,), dbias and dsinks (H,) unless it is None; the last three contiguous.

    dk and dv have equal strides; the last axes of dq, dk and dv are contiguous. With cos and sin, q and k are rotated
    (see the op `rotary`), and dq and dk are the gradients with respect to q and k before rotation.
    """
    tiles, block_d = _tiles(q, options, dalibi)
    batch, tokens, heads, _ = q.shape
    group = heads // k.shape[2]
    q, k, v, dout = map(launch.unit_last, (q, k, v, dout))
    delta = torch.empty_like(lse)
    with launch.device_of(q):
        common = dict(
            lse_ptr=lse, dout_ptr=dout, delta_ptr=delta, **_strides("bth", dout=dout),
            **_arguments(q, k, v, block_d, **options),
        )  # fmt: skip
        tables = _rotary_arguments(cos, sin, interleaved)
        blocks = triton.cdiv(tokens, tiles.dq.BLOCK_Q)
        dslope, dsink = (None if total is None else empty_partials(q, 1, batch * blocks, heads)
                         for total in (dalibi, dsinks))  # fmt: skip
        attention_bwd_dq[(blocks * heads * batch,)](
            sinks_ptr=sinks, out_ptr=out, dq_ptr=dq, dslope_ptr=dslope, dsinks_ptr=dsink, heads=batch * heads,
            section=_section(q, k, group),
            **_strides("bth", dq=dq), **_launch_options(tiles.dq), **tables, **common,
        )  # fmt: skip
        for partial, total in ((dslope, dalibi), (dsink, dsinks)):
            if total is not None:
                sum_partials(partial, total)
        if dkv is not None:
            attention_bwd_dkv[(triton.cdiv(k.shape[1], tiles.dkv.BLOCK_K) * k.shape[2] * batch,)](
                dk_ptr=dkv[0], dv_ptr=dkv[1], heads=batch * k.shape[2], section=_section(q, q, 1),
                **_strides("bsh", dkv=dkv[0]), **_launch_options(tiles.dkv), **tables, **common,
            )  # fmt: skip
        if dbias is not None:
            shared = [size == 1 for size in dbias.shape[:2]]
            blocks = triton.cdiv(k.shape[1], tiles.dbias.BLOCK_K), triton.cdiv(tokens, tiles.dbias.BLOCK_Q)
            attention_bwd_dbias[(dbias.shape[0] * dbias.shape[1], *blocks)](
                dbias_ptr=dbias, B=batch, SHARED_B=shared[0], SHARED_H=shared[1], **_launch_options(tiles.dbias),
                **common,
            )  # fmt: skip


_OPTIONAL = ("alibi", "bias", "sinks", "kv_start", "kv_len", "cu_seqlens", "seed")


def forward(outputs, saved, q, k, v, *optional, **params) -> None:
    fill_forward(outputs[0], saved[0], q, k, v, **dict(zip(_OPTIONAL, optional, strict=True)), **params)


def backward(grads, inputs, outputs, saved, needs, **params) -> Sequence[Tensor | None]:
    q, k, v, *optional = inputs
    dq, *dkv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dkv = tuple(dkv) if needs[1] or needs[2] else None
    terms = [torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else None
             for t, need in zip(optional[:3], needs[3:6], strict=True)]  # fmt: skip
    fill_backward(
        dq, dkv, grads[0], outputs[0], saved[0], q, k, v, *terms, **dict(zip(_OPTIONAL, optional, strict=True)),
        **params,
    )  # fmt: skip
    return dq, *(dkv or (None, None)), *terms, *[None] * 4


# ---- the static check ----


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases: every row of an architecture with all options that it serves.

    Rows of "half" also compile the plain call. The backward rows that attention_qkv takes also compile with the rotary
    embedding of real models.
    """
    yield launch.case(attention_documents, "int32", DOCUMENTS_TILE, "i32", {"BLOCK_T": DOCUMENTS_BLOCK_T})
    for precision in PRECISIONS:
        for width in WIDTHS:
            tiles = TILES[arch, precision, width]
            kernels = (attention_fwd, tiles.fwd), (attention_bwd_dq, tiles.dq), (attention_bwd_dkv, tiles.dkv)
            if precision == "half":
                yield from (_case(kernel, precision, width, tile, _PLAIN) for kernel, tile in kernels)
                yield from (_case(kernel, precision, width, tile, _RICH) for kernel, tile in kernels)
                yield from (_case(kernel, precision, width, tile, _SINKS) for kernel, tile in kernels[:2])
            else:
                kernels = *kernels, (attention_bwd_dbias, tiles.dbias)
                yield from (_case(kernel, precision, width, tile, _UNCAPPED) for kernel, tile in kernels)
            if precision == "half_rich":
                yield from (_case(kernel, precision, width, tile, _CAPPED) for kernel, tile in kernels[:3])
            for rotary in (_CAPPED_PAIRS if precision == "half_rich" else _ROTARY)[width]:
                absent = _CAPPED_ROTARY if precision == "half_rich" else _WITH_ROTARY
                yield _case(attention_bwd_dq, precision, width, tiles.dq, absent, *rotary)
                yield _case(attention_bwd_dkv, precision, width, tiles.dkv, absent, *rotary)


_ROTARY_TABLES = ("cos_ptr", "sin_ptr")
_SINK, _LENGTHS = ("sinks_ptr", "dsinks_ptr"), ("kv_start_ptr", "kv_len_ptr")
# Absent in every call that a row of "half" serves.
_HALF = ("bias_ptr", "softcap", "seed_ptr", "dslope_ptr", *_ROTARY_TABLES)
_RICH, _SINKS = (*_HALF, *_SINK), (*_HALF, "alibi_ptr", *_LENGTHS, "document_ptr")
_PLAIN = (*_RICH, "alibi_ptr", *_LENGTHS, "document_ptr", "window")
_WITH_ROTARY = tuple(name for name in _PLAIN if name not in _ROTARY_TABLES)
_UNCAPPED = ("softcap", *_SINK, *_ROTARY_TABLES)
# Gemma 2's calls. With float32, or with other options too, a soft cap spills up to ten instructions on some chips.
_CAPPED = (*(name for name in _HALF if name != "softcap"), "alibi_ptr", *_LENGTHS, *_SINK)
_CAPPED_ROTARY = tuple(name for name in _WITH_ROTARY if name != "softcap")
# (head width, rotary pairs, interleaved): Pythia, the whole head, GPT-NeoX-20B, the whole head, GPT-J.
_ROTARY = {64: ((64, 8, False), (64, 32, False)), 128: ((96, 12, False), (128, 64, False)), 256: ((256, 32, True),)}
_CAPPED_PAIRS = {width: ((width, width // 2, False),) for width in WIDTHS}  # Gemma 2: the whole head


def _case(
    kernel, precision: str, block: int, tile: AttentionTile, absent: Sequence[str], width: int | None = None,
    pairs: int = 0, interleaved: bool = False,
) -> AotCase:  # fmt: skip
    dtype, width = "fp32" if precision == "fp32" else "bf16", width or block
    sizes = {"D": width, "BLOCK_D": block, "BLOCK_Q": tile.BLOCK_Q, "BLOCK_K": tile.BLOCK_K}
    shared = {"SHARED_B": True, "SHARED_H": True} if kernel is attention_bwd_dbias else {}
    rotary = {"PAIRS": pairs, "INTERLEAVED": interleaved} if kernel in (attention_bwd_dq, attention_bwd_dkv) else {}
    group = 4 if absent in (_RICH, _SINKS, _UNCAPPED, _CAPPED) else 1
    given = {"GROUP": group, "CAUSAL": True, **sizes, **shared, **rotary}
    missing = {name: None for name in absent if name in kernel.arg_names}
    labels = {_PLAIN: "", _RICH: " alibi, lengths, documents", _SINKS: " sinks, window",
              _UNCAPPED: " every option", _CAPPED: " soft cap, documents",
              _CAPPED_ROTARY: f" soft cap, {pairs} pairs"}  # fmt: skip
    label = labels.get(absent, f" {pairs} pairs")
    hot = absent is _PLAIN or (kernel is attention_bwd_dbias and (precision, width) == ("half_rich", 64))
    floats = ("lse_ptr", "delta_ptr", "alibi_ptr", "sinks_ptr", "dslope_ptr", "dsinks_ptr", *_ROTARY_TABLES)
    integers = ("kv_start_ptr", "kv_len_ptr", "document_ptr")
    return launch.case(
        kernel, f"{dtype} D={width}{label}", tile, dtype, {**given, **missing},
        matmul=dtype != "fp32" and tile.warpgroup_mma, hot=hot, scale="fp32", softcap="fp32", keep_scale="fp32",
        seed_ptr="*i64", **dict.fromkeys(floats, "*fp32"), **dict.fromkeys(integers, "*i32"),
    )  # fmt: skip
