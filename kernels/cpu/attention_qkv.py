"""Attention over one packed projection on the CPU: the kernels of cpu/attention.py on views of qkv and of dqkv."""

from __future__ import annotations

import torch

from peakgpt.kernels.cpu import attention


def objection(qkv, *, n_head, **params) -> str | None:
    return attention.objection(*_split(qkv, n_head), **params)


def forward(outputs, saved, qkv, *, n_head, **params):
    attention.attend(outputs[0], saved[0], *_split(qkv, n_head), **params)


def backward(grads, inputs, outputs, saved, needs, *, n_head, **params):
    (qkv,) = inputs
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    into = dict(zip(("dq", "dk", "dv"), _split(dqkv, n_head), strict=True))
    attention.gradients(into, grads[0], outputs[0], saved[0], *_split(qkv, n_head), **params)
    return (dqkv,)


def _split(qkv, n_head):
    """Views q, k, v."""
    kv_heads = (qkv.shape[2] - n_head) // 2
    return qkv[:, :, :n_head], qkv[:, :, n_head : n_head + kv_heads], qkv[:, :, n_head + kv_heads :]
