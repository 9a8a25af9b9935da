"""Attention over one packed projection: `attention`'s kernels on slices; the gradients fill one tensor in place."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peakgpt.kernels.gpu import attention
from peakgpt.kernels.gpu.launch import AotCase


def _split(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = (qkv.shape[2] - n_head) // 2
    return qkv.split((n_head, kv_heads, kv_heads), dim=2)


def objection(qkv: Tensor, *, n_head: int, **params) -> str | None:
    return attention.objection(*_split(qkv, n_head), **params)


def slower(qkv: Tensor, *, n_head: int, **params) -> str | None:
    return attention.slower(*_split(qkv, n_head), **params)


def forward(outputs, saved, qkv: Tensor, *, n_head: int, **params) -> None:
    attention.fill_forward(outputs[0], saved[0], *_split(qkv, n_head), **params)


def backward(grads, inputs, outputs, saved, needs, *, n_head: int, **params) -> Sequence[Tensor | None]:
    (qkv,) = inputs
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, *dkv = _split(dqkv, n_head)
    attention.fill_backward(dq, tuple(dkv), grads[0], outputs[0], saved[0], *_split(qkv, n_head), **params)
    return (dqkv,)


def aot_cases(arch: str) -> Iterator[AotCase]:
    """None: the kernels are attention's."""
    return iter(())
