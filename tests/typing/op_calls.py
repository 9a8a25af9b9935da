"""Calls of all public ops with their types. tests/kernels/ops/test_op_types.py runs `pyright --strict` on this file."""

import torch
from torch import Tensor

import peakgpt
from peakgpt.kernels.core.dispatch import Cost, Op
from peakgpt.kernels.ops.attention_decode import attention_decode
from peakgpt.kernels.ops.cache_store import cache_store
from peakgpt.kernels.ops.norm import layernorm

x, residual, w, b = torch.randn(4, 64), torch.randn(4, 64), torch.ones(64), torch.zeros(64)
matrix, tall = torch.randn(64, 64), torch.randn(10, 64)
q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))

y: Tensor = peakgpt.attention(q, k, v, causal=True, window=4, softcap=50.0, sinks=torch.zeros(2), dropout=0.0)
y = peakgpt.layernorm(x, w, b, eps=1e-6)
y = peakgpt.rmsnorm(x, w)
total, normed = peakgpt.add_layernorm(x, residual, w, b)
y = total + normed
total, normed = peakgpt.add_rmsnorm(x, residual, w, eps=1e-6)
y = peakgpt.linear(x, matrix, b)
y = peakgpt.mlp(x, matrix, b, matrix, None, activation="relu", recompute=True)
y = peakgpt.gated_mlp(x, matrix, None, matrix, None, matrix, None)
stacked, ids = torch.randn(3, 64, 64), torch.tensor([[0, 2]] * 4)
y = peakgpt.experts(x, ids, torch.ones(4, 2), stacked, None, stacked, None, stacked, None, activation="silu")
y = peakgpt.linear_cross_entropy(x, tall, torch.tensor([0, 1, 2, -100]), reduction="sum", z_loss=1e-4)
y = peakgpt.qk_norm(torch.cat([q, k], 2), w[:16], w[:16], n_head=2, eps=1e-6, offset=1.0)
y = peakgpt.rotary(q, torch.ones(8, 8), torch.zeros(8, 8), heads=2, interleaved=True)

k_cache, v_cache = torch.zeros(2, 1, 16, 2, 16)
nothing: None = cache_store(k[0], v[0], k_cache, v_cache, torch.arange(8))
lengths, tables = torch.tensor([8], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
y = attention_decode(q[0, :1], k_cache, v_cache, tables, lengths, window=None)

reasons: dict[str, str | None] = peakgpt.layernorm.explain(x, w, eps=1e-5)
cost: Cost = peakgpt.layernorm.cost(*peakgpt.layernorm.sample(rows=4))
name: str = peakgpt.attention.name
eager: Tensor = peakgpt.layernorm.eager(x, w, b)
typed: Op[..., Tensor] = layernorm

peakgpt.layernorm(x, w, epsilon=1)  # type error: unknown keyword
peakgpt.attention(q, k)  # type error: missing argument
peakgpt.linear(x, 3.0)  # type error: not a Tensor
wrong: int = peakgpt.rmsnorm(x, w)  # type error: the result is a Tensor
