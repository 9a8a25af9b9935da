"""Replacements for single layers: nn.Linear, Conv1D, norms and MLPs."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.dropin.class_swap import (
    Replacement,
    class_path,
    has_float_weight,
    linear_layout,
    linear_weight,
    sample_rows,
)
from peakgpt.engine.model.plain import has_own_call
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.mlp import gated_mlp, mlp
from peakgpt.kernels.ops.norm import add_layernorm, layernorm, rmsnorm

# Activation classes and their name in `mlp`. None: depends on the attribute `approximate`.
ACTIVATIONS = {
    "torch.nn.modules.activation.GELU": None,
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu_erf",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.models.bloom.modeling_bloom.BloomGelu": "gelu_tanh",
}
GELU = {"none": "gelu_erf", "tanh": "gelu_tanh"}
# The transformer layers of torch hold functions instead of modules.
FUNCTIONS = {F.gelu: "gelu_erf", F.relu: "relu", torch.relu: "relu"}


class Linear(Replacement):
    """nn.Linear and Conv1D."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        return None if has_float_weight(module) else f"its weight is {module.weight.dtype}"

    def _peakgpt_sample(self) -> tuple[Tensor, ...]:
        return sample_rows(self)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, linear_weight(self), self.bias)


class LayerNorm(Replacement):
    """nn.LayerNorm over the last axis."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        if len(module.normalized_shape) != 1:
            return f"normalizes {len(module.normalized_shape)} axes, expected the last one"
        return None if module.weight is not None else "has no weight"

    def _peakgpt_sample(self) -> tuple[Tensor, ...]:
        return sample_rows(self)

    def forward(self, x: Tensor) -> Tensor:
        return layernorm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(Replacement):
    """RMSNorm of Llama and T5."""

    def _peakgpt_sample(self) -> tuple[Tensor, ...]:
        return sample_rows(self)

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, eps=self.variance_epsilon)


class TorchRMSNorm(RMSNorm):
    """nn.RMSNorm."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        return LayerNorm.objection(module, options)

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, eps=torch.finfo(x.dtype).eps if self.eps is None else self.eps)


def sum_and_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x + residual, norm of that sum), in one pass if the norm is a replaced LayerNorm without hooks."""
    if not isinstance(norm, LayerNorm) or has_own_call(norm):
        x = x + residual
        return x, norm(x)
    return add_layernorm(x.to(residual.dtype), residual, norm.weight, norm.bias, eps=norm.eps)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """Return norm(x + residual)."""
    return sum_and_norm(norm, x, residual)[1]


class DropAddNorm(Replacement):
    """Replaces BERT's module after attention: norm(dropout(linear(x)) + residual)."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return add_norm(self.LayerNorm, self.dropout(self.dense(hidden_states)), input_tensor)


def activation_of(module: Any) -> str | None:
    """Return the name in `mlp` of an activation module or function, or None for an unknown one."""
    if not isinstance(module, nn.Module):
        return FUNCTIONS.get(module)
    kind = class_path(type(module))
    return ACTIVATIONS.get(kind) or (GELU.get(getattr(module, "approximate", None)) if kind in ACTIVATIONS else None)


class BaseMLP(Replacement):
    """Base of MLP replacements.

    Options: up, act, down: names of the layers. dropout: name of the dropout after `down`, or None. between: name of
    the dropout before `down`, or None.
    """

    _OPS = ("gelu_tanh", "gelu_erf", "relu")

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        activation = operator.attrgetter(options["act"])(module)
        options["activation"] = activation_of(activation)
        if options["activation"] in cls._OPS:
            return None
        name = type(activation).__name__ if isinstance(activation, nn.Module) else str(activation)
        return f"activation {name}, expected {', '.join(cls._OPS)}"

    def _fused(self, x: Tensor) -> Tensor | None:
        """Return the output of `down`, or None if a layer has hooks, an adapter or shards, or dropout is active."""
        names = self._peakgpt
        up, down = self.get_submodule(names["up"]), self.get_submodule(names["down"])
        if None in (linear_layout(up), linear_layout(down)) or self._drops_between() or not same_dtype(up, down):
            return None
        return mlp(x, linear_weight(up), up.bias, linear_weight(down), down.bias, activation=names["activation"])

    def _drops_between(self) -> bool:
        between = self._peakgpt["between"]
        rate = 0.0 if between is None else getattr(self, between)  # a module, or the rate as a number
        return self.training and getattr(rate, "p", rate) > 0


class MLP(BaseMLP):
    """A module that is an MLP and nothing else."""

    def _peakgpt_sample(self) -> tuple[Tensor, ...] | None:
        up = self.get_submodule(self._peakgpt["up"])
        return sample_rows(up) if linear_layout(up) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        if y is None:
            return super().forward(x)
        return getattr(self, self._peakgpt["dropout"])(y) if self._peakgpt["dropout"] else y


class GatedMLP(MLP):
    """The gated MLP of Llama and T5 1.1. More options: gate: name of the gate projection."""

    _OPS = (*BaseMLP._OPS, "silu")

    def _fused(self, x: Tensor) -> Tensor | None:
        names = self._peakgpt
        gate, up, down = (self.get_submodule(names[name]) for name in ("gate", "up", "down"))
        if None in map(linear_layout, (gate, up, down)) or self._drops_between() or not same_dtype(gate, up, down):
            return None
        return gated_mlp(
            x, linear_weight(gate), gate.bias, linear_weight(up), up.bias, linear_weight(down), down.bias,
            activation=names["activation"],
        )  # fmt: skip


def same_dtype(*layers: nn.Module) -> bool:
    return len({layer.weight.dtype for layer in layers}) == 1


class BertLayer(BaseMLP):
    """The second half of a BERT or RoBERTa layer: an MLP over two modules, dropout, residual, norm."""

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        out = self.output
        y = None if has_own_call(self.intermediate) or has_own_call(out) else self._fused(attention_output)
        if y is None:
            return super().feed_forward_chunk(attention_output)
        return add_norm(out.LayerNorm, out.dropout(y), attention_output)


class ChunkedMLP(BaseMLP):
    """The MLP of DistilBERT."""

    def ff_chunk(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        return super().ff_chunk(x) if y is None else self.dropout(y)


class TorchBlock(BaseMLP):
    """The MLP inside nn.TransformerEncoderLayer and nn.TransformerDecoderLayer."""

    def _ff_block(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        return super()._ff_block(x) if y is None else getattr(self, self._peakgpt["dropout"])(y)


class BloomMLP(BaseMLP):
    """The MLP of BLOOM, with dropout and residual."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        if module.pretraining_tp > 1 and module.slow_but_exact:
            return "sums partial products in slices (pretraining_tp, slow_but_exact)"
        return super().objection(module, options)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        y = self._fused(hidden_states)
        if y is None:
            return super().forward(hidden_states, residual)
        return residual + F.dropout(y, self.hidden_dropout, self.training)
