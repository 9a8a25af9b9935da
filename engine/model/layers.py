"""The layers of a GPT on the fused ops, with the parameter names of torch and GPT-2.

Weights are in Linear layout, [out, in]. GPT-2 checkpoints of transformers hold them as Conv1D, [in, out]: pass
`conv1d=True` to `load_state_dict` for those. It is never guessed, a square weight fits either way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.experts import Experts
from peakgpt.engine.model.fp8 import fp8_linear
from peakgpt.engine.model.kv_cache import AttentionCache
from peakgpt.engine.model.positions import Positions
from peakgpt.engine.model.quantized import QuantizedLinear, project
from peakgpt.engine.model.recompute import checkpointed, forgettable, forgetting
from peakgpt.engine.model.relative_positions import RELATIVE
from peakgpt.kernels.ops.attention import attention, attention_qkv, default_scale
from peakgpt.kernels.ops.dropout import dropout
from peakgpt.kernels.ops.mlp import ACTIVATIONS, GATES, gated_mlp, mlp
from peakgpt.kernels.ops.norm import add_layernorm, add_rmsnorm, layernorm, rmsnorm
from peakgpt.kernels.ops.rotary import rotary

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
NOWHERE = Positions()


def swap_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the weights that GPT-2 holds as Conv1D from [in, out] to [out, in], or back; the rest as it is."""
    return {name: tensor.t() if name.endswith(CONV1D) else tensor for name, tensor in state.items()}


class Renaming(nn.Module):
    """A module that also takes the state dicts of its counterparts in torch and transformers, by itself or in a model.

    `COUNTERPARTS` has a row of their names for each of our modules, in one order; several of theirs are stacked.
    """

    COUNTERPARTS: tuple[Mapping[str, tuple[str, ...]], ...] = ()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for row in self.COUNTERPARTS:
            for kind in ("weight", "bias"):
                _rename(state_dict, prefix, row, kind)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _rename(state: dict[str, Tensor], prefix: str, row: Mapping[str, tuple[str, ...]], kind: str) -> None:
    """Put what is there under the names of a row under ours."""
    for ours, names in row.items():
        theirs = [f"{prefix}{name}{kind}" for name in names]
        if all(name in state for name in theirs):
            parts = [state.pop(name) for name in theirs]
            state[f"{prefix}{ours}.{kind}"] = parts[0] if len(parts) == 1 else torch.cat(parts)


class Conv1DLoading(Renaming):
    """A module that loads state dicts in either layout."""

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False, *, conv1d: bool = False):
        """Load as torch does; `conv1d=True` says that c_attn, c_proj and c_fc come as [in, out]."""
        return super().load_state_dict(swap_layout(state_dict) if conv1d else state_dict, strict, assign)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, with torch's parameters."""

    recompute = False  # set by engine/model/recompute.py

    def __init__(self, n_embd: int, eps: float = 1e-5, bias: bool = True, *, device=None, dtype=None):
        super().__init__(n_embd, eps=eps, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (..., C)."""
        y = layernorm(x, self.weight, self.bias, eps=self.eps)
        return forgettable(y, self.forward, x) if self.recompute else y

    def add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add x to the residual stream, both (..., C); returns (sum, normed).

        Under autocast a branch ends in the lower precision while the stream stays wide, hence the cast.
        """
        total, y = add_layernorm(x.to(residual.dtype), residual, self.weight, self.bias, eps=self.eps)
        return total, forgettable(y, self.forward, total) if self.recompute else y


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis, with torch's parameter."""

    recompute = False  # set by engine/model/recompute.py

    def __init__(self, n_embd: int, eps: float = 1e-5, *, device=None, dtype=None):
        super().__init__(n_embd, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (..., C)."""
        y = rmsnorm(x, self.weight, eps=self.eps)
        return forgettable(y, self.forward, x) if self.recompute else y

    def add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add x to the residual stream, both (..., C); returns (sum, normed)."""
        total, y = add_rmsnorm(x.to(residual.dtype), residual, self.weight, eps=self.eps)
        return total, forgettable(y, self.forward, total) if self.recompute else y


def norm(config: GPTConfig) -> LayerNorm | RMSNorm:
    """The norm that a model uses everywhere."""
    if config.norm == "rms":
        return RMSNorm(config.n_embd, config.layer_norm_epsilon)
    return LayerNorm(config.n_embd, config.layer_norm_epsilon, config.has_bias("norm"))


class GELUMLP(Conv1DLoading):
    """GPT-2's MLP: c_fc, activation, c_proj."""

    COUNTERPARTS = tuple(
        {"c_fc": (up,), "c_proj": (down,)}
        for up, down in (
            ("0.", "2."), ("fc1.", "fc2."), ("fc_in.", "fc_out."), ("dense_h_to_4h.", "dense_4h_to_h."),
            ("lin1.", "lin2."), ("wi.", "wo."),
        )
    )  # fmt: skip

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
        self.activation, self.recompute, self.fp8 = activation, False, False

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (..., C), to (..., C)."""
        if self.fp8 and self.training:
            h = ACTIVATIONS[self.activation](fp8_linear(x, self.c_fc.weight, self.c_fc.bias))
            return fp8_linear(h, self.c_proj.weight, self.c_proj.bias)
        up, down, choices = self.c_fc, self.c_proj, {"activation": self.activation, "recompute": self.recompute}
        if isinstance(up, QuantizedLinear):
            return down(up(x, self.activation))
        return mlp(x, up.weight, up.bias, down.weight, down.bias, **choices)


class GatedMLP(Renaming):
    """A gated MLP: c_gate and its activation times c_fc, then c_proj."""

    COUNTERPARTS = tuple(
        {"c_gate": (gate,), "c_fc": (up,), "c_proj": (down,)}
        for gate, up, down in (("gate_proj.", "up_proj.", "down_proj."), ("wi_0.", "wi_1.", "wo."))
    )

    def __init__(
        self, n_embd: int, n_inner: int | None = None, *, bias: bool = False, activation: str = "silu",
        device=None, dtype=None,
    ):  # fmt: skip
        """
        Args:
            n_embd: C.
            n_inner: F; None means 4 C.
            activation: "silu", "gelu_tanh", "gelu_erf" or "relu".
        Raises:
            ValueError: an unknown activation.
        """
        super().__init__()
        if activation not in GATES:
            raise ValueError(f"GatedMLP: activation is {activation!r}, expected one of {', '.join(GATES)}")
        n_inner = n_inner or 4 * n_embd
        self.c_gate = nn.Linear(n_embd, n_inner, bias=bias, device=device, dtype=dtype)
        self.c_fc = nn.Linear(n_embd, n_inner, bias=bias, device=device, dtype=dtype)
        self.c_proj = nn.Linear(n_inner, n_embd, bias=bias, device=device, dtype=dtype)
        self.activation, self.recompute = activation, False

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (..., C), to (..., C)."""
        if isinstance(self.c_fc, QuantizedLinear):
            return self.c_proj(self.c_gate(x, self.activation) * self.c_fc(x))
        parameters = (p for part in (self.c_gate, self.c_fc, self.c_proj) for p in (part.weight, part.bias))
        return gated_mlp(x, *parameters, activation=self.activation, recompute=self.recompute)


class CausalSelfAttention(Conv1DLoading):
    """GPT-2's attention: c_attn makes queries, keys and values in one product, c_proj mixes the heads."""

    COUNTERPARTS = (
        {"c_attn": ("in_proj_",), "c_proj": ("out_proj.",)},
        {"c_attn": ("q_proj.", "k_proj.", "v_proj."), "c_proj": ("out_proj.",)},
        {"c_attn": ("q_proj.", "k_proj.", "v_proj."), "c_proj": ("o_proj.",)},
    )

    def __init__(
        self, n_embd: int, n_head: int, *, n_kv_head: int | None = None, head_dim: int | None = None,
        bias: bool = True, out_bias: bool | None = None, window: int | None = None, scale: float | None = None,
        dropout: float = 0.0, relative: nn.Module | None = None, device=None, dtype=None,
    ):  # fmt: skip
        """
        Args:
            n_embd: C.
            n_head: H query heads.
            n_kv_head: K key heads, dividing H; None means H.
            head_dim: D; None means C / H.
            bias: whether c_attn has one. out_bias: whether c_proj has; None means as c_attn.
            window: keys that a query sees, itself counted; None for all.
            scale: factor on q k^T; None means 1 / sqrt(D).
            dropout: probability of dropping an attention weight while training.
            relative: one of engine/model/relative_positions.py, where positions are relative.
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
        self.head_dim, self.dropout, self.fp8 = head_dim or n_embd // n_head, dropout, False
        self.window, self.scale = window, scale
        if relative is not None:
            self.relative = relative
        packed = (n_head + 2 * self.n_kv_head) * self.head_dim
        out_bias = bias if out_bias is None else out_bias
        self.c_attn = nn.Linear(n_embd, packed, bias=bias, device=device, dtype=dtype)
        self.c_proj = nn.Linear(n_head * self.head_dim, n_embd, bias=out_bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, cache: AttentionCache | None = None, layer: int = 0, positions: Positions = NOWHERE
    ) -> Tensor:
        """Mix each token with those before it.

        Args:
            x: (B, T, C).
            cache: holds the keys and values of the tokens before x, and takes those of x.
            layer: whose part of the cache.
            positions: where the tokens of x stand, if attention is to know.
        Returns:
            (B, T, C)
        """
        qkv = self._project(self.c_attn, x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 K, D)
        dropout = self.dropout if self.training and cache is None else 0.0
        beside = positions.alibi, positions.start, positions.relative
        if cache is None and dropout == 0.0 and all(t is None for t in beside):
            y = attention_qkv(
                qkv, *(positions.rotary or (None, None)), n_head=self.n_head, interleaved=positions.interleaved,
                window=self.window, scale=self.scale,
            )  # fmt: skip
        else:
            if positions.rotary is not None:
                turned = self.n_head + self.n_kv_head
                qkv = rotary(qkv, *positions.rotary, heads=turned, interleaved=positions.interleaved)
            q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
            bias = None
            if positions.relative is not None:
                q, bias = self.relative(q, positions.relative, default_scale(self.head_dim, self.scale))
            options = {"window": self.window, "scale": self.scale, "alibi": positions.alibi, "bias": bias,
                       "kv_start": positions.start}  # fmt: skip
            if cache is None:
                y = attention(q, k, v, dropout=dropout, **options)
            else:
                y = cache.attend(layer, q, k, v, **options)
        return self._project(self.c_proj, y.flatten(2))  # (B, T, H D) -> (B, T, C)

    def _project(self, layer: nn.Module, x: Tensor) -> Tensor:
        return fp8_linear(x, layer.weight, layer.bias) if self.fp8 and self.training else project(layer, x)


class Block(nn.Module):
    """The parts of one layer; the model chains them, since each norm takes in the add before it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        c = config
        self.ln_1 = norm(c)
        self.attn = CausalSelfAttention(
            c.n_embd, c.n_head, n_kv_head=c.n_kv_head, head_dim=c.head_dim, bias=c.has_bias("qkv"),
            out_bias=c.has_bias("out"), window=c.windows[layer], scale=c.scale(layer), dropout=c.attention_dropout,
            relative=RELATIVE[c.position](c) if c.position in RELATIVE else None,
        )  # fmt: skip
        if c.residual != "parallel":
            self.ln_2 = norm(c)
        shape = {"bias": c.has_bias("mlp"), "activation": c.activation}
        if c.has_experts(layer):
            self.mlp = Experts(c.n_embd, c.experts, c.experts_per_token, lambda: GELUMLP(c.n_embd, c.n_inner, **shape))
        else:
            self.mlp = (GatedMLP if c.gated_mlp else GELUMLP)(c.n_embd, c.n_inner, **shape)
        self.dropout, self.layer, self.residual = c.dropout, layer, c.residual
        self.recompute = self.forgets_norms = False  # set by engine/model/recompute.py

    def forward(
        self, x: Tensor, h: Tensor, next_norm: LayerNorm | RMSNorm | None, cache: AttentionCache | None = None,
        positions: Positions = NOWHERE, balance: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Run one layer.

        Args:
            x: (B, T, C) the residual stream.
            h: (B, T, C) its norm by ln_1; x itself where norms come after the branches.
            next_norm: the next layer's ln_1, or ln_f; not looked at where norms come after the branches.
            balance: gets what the experts of this layer add to the loss.
        Returns:
            (x, h): the same for the next layer.
        """
        drop = self.dropout if self.training and cache is None else 0.0

        def attend(h: Tensor) -> Tensor:
            return _dropped(self.attn(h, cache, self.layer, positions), drop)

        def think(h: Tensor) -> Tensor:
            y = self.mlp(h, balance, positions.start) if isinstance(self.mlp, Experts) else self.mlp(h)
            return _dropped(y, drop)

        run = RESIDUALS[self.residual]
        if self.recompute and cache is None and torch.is_grad_enabled():
            return checkpointed(run, self, x, h, next_norm, attend, think)
        if self.forgets_norms and cache is None and torch.is_grad_enabled():
            with forgetting():
                return run(self, x, h, next_norm, attend, think)
        return run(self, x, h, next_norm, attend, think)


def _pre_norm(block, x, h, next_norm, attend, think):
    x, h = block.ln_2.add_norm(attend(h), x)
    return next_norm.add_norm(think(h), x)


def _post_norm(block, x, h, next_norm, attend, think):
    _, h = block.ln_1.add_norm(attend(h), h)
    _, h = block.ln_2.add_norm(think(h), h)
    return h, h


def _parallel(block, x, h, next_norm, attend, think):
    return next_norm.add_norm(attend(h) + think(h), x)


def _parallel_two_norms(block, x, h, next_norm, attend, think):
    return next_norm.add_norm(attend(h) + think(block.ln_2(x)), x)


RESIDUALS = {
    "pre_norm": _pre_norm,
    "post_norm": _post_norm,
    "parallel": _parallel,
    "parallel_two_norms": _parallel_two_norms,
}


def _dropped(x: Tensor, probability: float) -> Tensor:
    return dropout(x, p=probability) if probability else x
