"""Mixture of experts on the GPU: choices.py sorts and combines, grouped_gemm.py multiplies.

    forward   sort, h (gate and pre for backward), h w_down^T, combine: 4 launches
    backward  g and all of the hidden layer, dx of the rows, combine, 3 weight gradients
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.experts import grouped_gemm
from peakgpt.kernels.gpu.experts.choices import combine_choices, sort_choices
from peakgpt.kernels.ops.experts import down_bias_gradients


def objection(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *parameters: Tensor | None, **_) -> str | None:
    return launch.objection(x, parameters[2], parameters[4])


def forward(
    outputs, saved, x, topk_ids, topk_weights, w_gate, b_gate, w_up, b_up, w_down, b_down, *, activation, recompute
):  # fmt: skip
    if not topk_ids.numel():
        for out in (*outputs, *saved):
            out.zero_()
        return
    flat, choices = x.view(-1, x.shape[-1]), topk_ids.shape[-1]
    order, position, offsets = saved[:3] or _routing(topk_ids, w_up.shape[0])
    gate, pre = saved[3:] if len(saved) == 5 else (None, *saved[3:]) if len(saved) == 4 else (None, None)
    h = x.new_empty(len(order), w_up.shape[1])
    ys = x.new_empty(len(order), w_down.shape[1])
    with launch.device_of(x):
        sort_choices(topk_ids, order, position, offsets)
        grouped_gemm.up_forward(flat, order, offsets, w_gate, b_gate, w_up, b_up, gate, pre, h, choices, activation)
        grouped_gemm.product(h, w_down, offsets, ys, bias=b_down, by_n=True)
        combine_choices(ys, position, topk_weights.float(), outputs[0].view(-1, w_down.shape[1]), choices)


def backward(grads, inputs, outputs, saved, needs, *, activation, recompute):
    x, topk_ids, topk_weights, w_gate, b_gate, w_up, b_up, w_down, b_down = inputs
    if not topk_ids.numel():
        return [torch.zeros_like(t) if need else None for t, need in zip(inputs, needs, strict=True)]
    need_x, _, need_weights, need_gate, need_b_gate, need_up, need_b_up, need_down, need_b_down = needs
    dy, flat, choices = grads[0].view(-1, w_down.shape[1]), x.view(-1, x.shape[-1]), topk_ids.shape[-1]
    (order, position, offsets), kept, weights = saved[:3], saved[3:], topk_weights.float()
    shape = len(order), w_up.shape[1]
    dgate, dpre, h, *again = (x.new_empty(shape) for _ in range(3 if kept else 5))
    gate, pre = kept if len(kept) == 2 else (None, *kept) if kept else again
    gate, dgate = (None, None) if w_gate is None else (gate, dgate)
    dx = dweights = db_down = None
    with launch.device_of(x):
        if not kept:
            grouped_gemm.up_forward(flat, order, offsets, w_gate, b_gate, w_up, b_up, gate, pre, h, choices, activation)
        dots = grouped_gemm.hidden_backward(
            dy, order, offsets, w_down, weights, gate, pre, dgate, dpre, h if need_down else None, choices, activation
        )
        if need_x:
            dxs, dx = x.new_empty(len(order), flat.shape[1]), torch.empty_like(flat)
            second = (None, None) if gate is None else (dgate, w_gate)
            grouped_gemm.product(dpre, w_up, offsets, dxs, second=second, by_n=False)
            combine_choices(dxs, position, None, dx, choices)
            dx = dx.view(x.shape)
        routing = order, offsets, choices
        dw_gate = grouped_gemm.weight_gradient(dgate, flat, w_gate, *routing, gather="b") if need_gate else None
        dw_up = grouped_gemm.weight_gradient(dpre, flat, w_up, *routing, gather="b") if need_up else None
        dw_down = grouped_gemm.weight_gradient(dy, h, w_down, *routing, gather="a") if need_down else None
        db_gate = grouped_gemm.column_sums(dgate, offsets, torch.empty_like(b_gate)) if need_b_gate else None
        db_up = grouped_gemm.column_sums(dpre, offsets, torch.empty_like(b_up)) if need_b_up else None
    if need_weights:
        dweights = dots[position].view(topk_ids.shape)
    if b_down is not None and (need_b_down or need_weights):
        ids, weights = topk_ids.reshape(-1, choices), weights.view(-1, choices)
        of_bias, db_down = down_bias_gradients(dy, ids, weights, b_down)
        dweights = dweights + of_bias.view(dweights.shape) if need_weights else None
    dweights = dweights.to(topk_weights.dtype) if need_weights else None
    return dx, None, dweights, dw_gate, db_gate, dw_up, db_up, dw_down, db_down if need_b_down else None


def _routing(topk_ids: Tensor, count: int) -> list[Tensor]:
    """Allocate order, position and offsets; see kernels/ops/experts.py."""
    return [topk_ids.new_empty(n, dtype=torch.int64) for n in (topk_ids.numel(), topk_ids.numel(), count + 1)]
