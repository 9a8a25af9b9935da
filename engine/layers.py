"""The layers of a GPT on the fused ops, with the parameter names of torch and GPT-2.

Weights are in Linear layout, [out, in]. GPT-2 checkpoints of transformers hold them as Conv1D, [in, out]: pass
`conv1d=True` to `load_state_dict` for those. It is never guessed, a square weight fits either way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.engine.cache import KVCache
from peakgpt.kernels.attention import attention, attention_qkv
from peakgpt.kernels.layernorm import add_layernorm, layernorm
from peakgpt.kernels.linear import linear
from peakgpt.kernels.mlp import ACTIVATIONS, mlp

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def swap_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the weights that GPT-2 holds as Conv1D from [in, out] to [out, in], or back; the rest as it is."""
    return {name: tensor.t() if name.endswith(CONV1D) else tensor for name, tensor in state.items()}


class Conv1DLoading(nn.Module):
    """A module that loads state dicts in either layout."""

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False, *, conv1d: bool = False):
        """Load as torch does; `conv1d=True` says that c_attn, c_proj and c_fc come as [in, out]."""
        return super().load_state_dict(swap_layout(state_dict) if conv1d else state_dict, strict, assign)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, with torch's parameters."""

    def __init__(self, n_embd: int, eps: float = 1e-5, bias: bool = True, *, device=None, dtype=None):
        super().__init__(n_embd, eps=eps, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (..., C)."""
        return layernorm(x, self.weight, self.bias, eps=self.eps)

    def add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add x to the residual stream, both (..., C); returns (sum, normed).

        Under autocast a branch ends in the lower precision while the stream stays wide, hence the cast.
        """
        return add_layernorm(x.to(residual.dtype), residual, self.weight, self.bias, eps=self.eps)


class GELUMLP(Conv1DLoading):
    """GPT-2's MLP: c_fc, activation, c_proj."""

    def __init__(
        self, n_embd: int, n_inner: int | None = None, *, bias: bool = True, activation: str = "gelu_tanh",
        device=None, dtype=None,
    ):  # fmt: skip
        """
        Args:
            n_embd: C.
            n_inner: F; None means 4 C.
            activation: "gelu_tanh", "gelu_erf" or "relu".
        Raises:
            ValueError: an unknown activation.
        """
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"GELUMLP: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        n_inner = n_inner or 4 * n_embd
        self.c_fc = nn.Linear(n_embd, n_inner, bias=bias, device=device, dtype=dtype)
        self.c_proj = nn.Linear(n_inner, n_embd, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (..., C), to (..., C)."""
        up, down = self.c_fc, self.c_proj
        return mlp(x, up.weight, up.bias, down.weight, down.bias, activation=self.activation)


class CausalSelfAttention(Conv1DLoading):
    """GPT-2's attention: c_attn makes queries, keys and values in one product, c_proj mixes the heads."""

    def __init__(
        self, n_embd: int, n_head: int, *, n_kv_head: int | None = None, head_dim: int | None = None,
        bias: bool = True, dropout: float = 0.0, device=None, dtype=None,
    ):  # fmt: skip
        """
        Args:
            n_embd: C.
            n_head: H query heads.
            n_kv_head: K key heads, dividing H; None means H.
            head_dim: D; None means C / H.
            dropout: probability of dropping an attention weight while training.
        Raises:
            ValueError: sizes that do not fit each other.
        """
        super().__init__()
        self.n_head, self.n_kv_head = n_head, n_kv_head or n_head
        if n_head % self.n_kv_head or (head_dim is None and n_embd % n_head):
            raise ValueError(
                f"CausalSelfAttention: n_embd {n_embd}, n_head {n_head}, n_kv_head {self.n_kv_head}, "
                "expected n_head to divide n_embd and n_kv_head to divide n_head"
            )
        self.head_dim, self.dropout = head_dim or n_embd // n_head, dropout
        packed = (n_head + 2 * self.n_kv_head) * self.head_dim
        self.c_attn = nn.Linear(n_embd, packed, bias=bias, device=device, dtype=dtype)
        self.c_proj = nn.Linear(n_head * self.head_dim, n_embd, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Mix each token with those before it.

        Args:
            x: (B, T, C).
            cache: holds the keys and values of the tokens before x, and takes those of x.
            layer: whose part of the cache.
        Returns:
            (B, T, C)
        """
        qkv = linear(x, self.c_attn.weight, self.c_attn.bias).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 K, D)
        dropout = self.dropout if self.training and cache is None else 0.0
        if cache is None and dropout == 0.0:
            y = attention_qkv(qkv, n_head=self.n_head)
        else:
            q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
            if cache is not None:
                k, v = cache.append(layer, k, v)  # (B, S, K, D)
            # One query sees every key: saying so spares the backends a mask.
            y = attention(q, k, v, causal=q.shape[1] > 1, dropout=dropout)
        return linear(y.flatten(2), self.c_proj.weight, self.c_proj.bias)  # (B, T, H D) -> (B, T, C)


class Block(nn.Module):
    """The parts of one layer; the model chains them, since each norm takes in the add before it."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.ln_1 = LayerNorm(c.n_embd, c.layer_norm_epsilon, c.bias)
        self.attn = CausalSelfAttention(
            c.n_embd, c.n_head, n_kv_head=c.n_kv_head, head_dim=c.head_dim, bias=c.bias, dropout=c.dropout
        )
        self.ln_2 = LayerNorm(c.n_embd, c.layer_norm_epsilon, c.bias)
        self.mlp = GELUMLP(c.n_embd, c.n_inner, bias=c.bias, activation=c.activation)
        self.dropout = c.dropout

    def forward(
        self, x: Tensor, h: Tensor, next_norm: LayerNorm, cache: KVCache | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Run one layer.

        Args:
            x: (B, T, C) the residual stream.
            h: (B, T, C) its norm by ln_1.
            next_norm: the next layer's ln_1, or ln_f.
        Returns:
            (x, h): the stream after this layer and its norm by next_norm.
        """
        drop = self.dropout if self.training and cache is None else 0.0
        a = _dropped(self.attn(h, cache, layer), drop)
        x, h = self.ln_2.add_norm(a, x)
        m = _dropped(self.mlp(h), drop)
        return next_norm.add_norm(m, x)


def _dropped(x: Tensor, probability: float) -> Tensor:
    return F.dropout(x, probability) if probability else x
