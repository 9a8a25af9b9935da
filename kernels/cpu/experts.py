"""Mixture of experts on the CPU: csrc/ops/experts.cpp, with the grouped products of csrc/gemm/grouped_gemm.cpp.

The rows of each expert are gathered, so that a product reads them in order: 2 to 3 % of the bytes of the weights for
1,024 tokens of Mixtral or Qwen3. Only the weights of experts with rows are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, rows, scratch, threads, workspace
from peakgpt.kernels.cpu.gemm import ACTIVATE, ACTIVATIONS, ADD, GATE, STORE
from peakgpt.kernels.ops.experts import down_bias_gradients

ROWS, DEPTH = 0, 1  # Grouping in csrc/gemm/grouped_gemm.h


def objection(x: Tensor, *_, **__) -> str | None:
    return dtype_objection(x)


def forward(
    outputs, saved, x, topk_ids, topk_weights, w_gate, b_gate, w_up, b_up, w_down, b_down, *, activation, recompute
):  # fmt: skip
    x, weights = rows(x), topk_weights.float()
    routing, hidden = saved[:3], saved[3:]
    order, position, offsets = _sort(topk_ids, w_up.shape[0], routing or None)
    xs, h, ys, gate = _scratch(x, len(order), x.shape[1], w_up.shape[1], w_down.shape[1], w_up.shape[1])
    _gather(x, order, topk_ids.shape[-1], xs)
    gate, up = (hidden if w_gate is not None else (None, *hidden)) if hidden else (gate, None)
    if w_gate is None:
        _rows_product(xs, w_up, h, offsets, epilogue=ACTIVATE, bias=b_up, activation=ACTIVATIONS[activation], pre=up)
    else:
        _rows_product(xs, w_gate, gate, offsets, bias=b_gate)
        _rows_product(
            xs, w_up, h, offsets, epilogue=GATE, bias=b_up, activation=ACTIVATIONS[activation], pre=up, gate=gate
        )
    _rows_product(h, w_down, ys, offsets, bias=b_down)
    _combine(ys, position, weights, outputs[0].view(-1, w_down.shape[1]), topk_ids.shape[-1])


def backward(grads, inputs, outputs, saved, needs, *, activation, recompute, into=(None,) * 9):
    x, topk_ids, topk_weights, w_gate, b_gate, w_up, b_up, w_down, b_down = inputs
    need_x, _, need_weights, need_gate, need_b_gate, need_up, need_b_up, need_down, need_b_down = needs
    dy, flat, choices = rows(grads[0]), rows(x), topk_ids.shape[-1]
    (order, position, offsets), kept = saved[:3], saved[3:]
    width, hidden = flat.shape[1], w_up.shape[1]
    xs, dys, dxs, dup, dgate, h, *again = _scratch(
        x, len(order), width, dy.shape[1], width, hidden, hidden, hidden, *(() if kept else (hidden, hidden))
    )
    gate, up = kept if len(kept) == 2 else (None, *kept) if kept else again
    _gather(flat, order, choices, xs)
    _gather(dy, order, choices, dys)
    if not kept:
        _rows_product(xs, w_up, up, offsets, bias=b_up)
        gate = None if w_gate is None else gate
        if gate is not None:
            _rows_product(xs, w_gate, gate, offsets, bias=b_gate)
    _rows_product(dys, w_down.transpose(1, 2), dup, offsets)
    dweights = torch.empty(topk_ids.shape, dtype=torch.float32)
    _C.hidden_backward(
        dtype=DTYPES[x.dtype], rows=len(order), width=hidden, activation=ACTIVATIONS[activation], g=dup, up=up,
        order=order, weights=topk_weights.float(), dweights=dweights, gate=gate,
        dgate=None if gate is None else dgate, hidden=h if need_down else None, threads=threads(),
    )  # fmt: skip
    db_down = None
    if b_down is not None and (need_b_down or need_weights):
        ids, weights = topk_ids.reshape(-1, choices), topk_weights.reshape(-1, choices)
        of_bias, db_down = down_bias_gradients(dy, ids, weights, b_down)
        dweights += of_bias.view(dweights.shape)
    dw_gate, db_gate = _weight_gradient(dgate, xs, w_gate, b_gate, offsets, need_gate, need_b_gate, into[3])
    dw_up, db_up = _weight_gradient(dup, xs, w_up, b_up, offsets, need_up, need_b_up, into[5])
    dw_down, _ = _weight_gradient(dys, h, w_down, None, offsets, need_down, False, into[7])
    dx = None
    if need_x:
        _rows_product(dup, w_up.transpose(1, 2), dxs, offsets)
        if gate is not None:
            _rows_product(dgate, w_gate.transpose(1, 2), dxs, offsets, epilogue=ADD)
        dx = torch.empty_like(flat)
        _combine(dxs, position, None, dx, choices)
        dx = dx.view(x.shape)
    dweights = dweights.to(topk_weights.dtype) if need_weights else None
    return dx, None, dweights, dw_gate, db_gate, dw_up, db_up, dw_down, db_down if need_b_down else None


def _sort(topk_ids: Tensor, count: int, out: list[Tensor] | None) -> list[Tensor]:
    """Return order, position and offsets of the choices; see kernels/ops/experts.py."""
    choices = topk_ids.numel()
    sizes = (choices, choices, count + 1)
    order, position, offsets = out or workspace("experts", torch.int64, sum(sizes)).split(sizes)
    _C.sort_choices(
        choices=choices, experts=count, ids=topk_ids.long(), order=order, position=position, offsets=offsets,
        threads=threads(),
    )  # fmt: skip
    return [order, position, offsets]


def _scratch(x: Tensor, count: int, *widths: int) -> list[Tensor]:
    return scratch(x.dtype, *((count, width) for width in widths))


def _gather(x: Tensor, order: Tensor, choices: int, out: Tensor) -> None:
    """Fill out (S, C) with the row of x (N, C) of each sorted choice."""
    _C.gather_choices(
        dtype=DTYPES[x.dtype], rows=len(order), choices=choices, width=x.shape[1], x=x, order=order, out=out,
        threads=threads(),
    )  # fmt: skip


def _combine(ys: Tensor, position: Tensor, weights: Tensor | None, out: Tensor, choices: int) -> None:
    """Fill out (N, C) with the sums over each token's rows of ys (S, C)."""
    _C.combine_choices(
        dtype=DTYPES[ys.dtype], tokens=out.shape[0], choices=choices, width=ys.shape[1], y=ys, position=position,
        out=out, weights=weights, threads=threads(),
    )  # fmt: skip


def _rows_product(a: Tensor, w: Tensor, out: Tensor, offsets: Tensor, *, epilogue: int = STORE, **more) -> None:
    """Compute out = epilogue(a w[e]^T) for the rows of a (S, K) of each expert; w is (E, N, K)."""
    _C.grouped_gemm(
        dtype=DTYPES[a.dtype], out_dtype=DTYPES[a.dtype], m=a.shape[0], n=w.shape[1], k=w.shape[2], a=a,
        a_row=a.stride(0), a_k=1, c=out, c_row=out.stride(0), b=w, b_col=w.stride(1), b_k=w.stride(2),
        epilogue=epilogue, grouping=ROWS, groups=w.shape[0], offsets=offsets, b_group=w.stride(0), threads=threads(),
        **more,
    )  # fmt: skip


def _weight_gradient(
    d: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, offsets: Tensor, need_w: bool, need_b: bool,
    into: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of w (E, F, C) and b (E, F), None if not needed, from d (S, F) and x (S, C)."""
    if not need_w and not need_b:
        return None, None
    dw = torch.empty_like(w) if into is None or not need_w else into
    sums = torch.zeros(w.shape[:2], dtype=torch.float32) if need_b else None  # a group without rows adds none
    _C.grouped_gemm(
        dtype=DTYPES[d.dtype], out_dtype=DTYPES[dw.dtype], m=w.shape[1], n=w.shape[2], k=d.shape[0], a=d, a_row=1,
        a_k=d.stride(0), c=dw, c_row=dw.stride(1), b=x, b_col=1, b_k=x.stride(0),
        epilogue=STORE if dw is not into else ADD, a_sums=sums, grouping=DEPTH, groups=w.shape[0], offsets=offsets,
        c_group=dw.stride(0), threads=threads(),
    )  # fmt: skip
    return dw if need_w else None, None if sums is None else sums.to(b.dtype)
