"""What takes the place of single layers: linear, Conv1D, norms, perceptrons."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.dropin.swap import Replaced, floating, layout, path, rows, weight
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.mlp import gated_mlp, mlp
from peakgpt.kernels.ops.norm import add_layernorm, layernorm, rmsnorm

# Activation classes by the name that `mlp` has for them; None: its `approximate` says which.
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
FUNCTIONS = {F.gelu: "gelu_erf", F.relu: "relu", torch.relu: "relu"}  # what stands for a module in torch's own layers


class Linear(Replaced):
    """nn.Linear and Conv1D."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        return None if floating(module) else f"its weight is {module.weight.dtype}"

    def _peakgpt_sample(self) -> tuple[Tensor, ...]:
        return rows(self)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, weight(self), self.bias)


class LayerNorm(Replaced):
    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        if len(module.normalized_shape) != 1:
            return f"normalises {len(module.normalized_shape)} axes, expected the last one"
        return None if module.weight is not None else "has no weight"

    def _peakgpt_sample(self) -> tuple[Tensor, ...]:
        return rows(self)

    def forward(self, x: Tensor) -> Tensor:
        return layernorm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(Replaced):
    """Llama's and T5's."""

    def _peakgpt_sample(self) -> tuple[Tensor, ...]:
        return rows(self)

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
    """(x + residual, its norm), in one pass where the norm is a replaced LayerNorm without hooks."""
    if not isinstance(norm, LayerNorm) or norm._forward_hooks or norm._forward_pre_hooks:
        x = x + residual
        return x, norm(x)
    return add_layernorm(x.to(residual.dtype), residual, norm.weight, norm.bias, eps=norm.eps)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """norm(x + residual)."""
    return sum_and_norm(norm, x, residual)[1]


class DropAddNorm(Replaced):
    """BERT's output of attention: a product, dropout, the residual, a norm."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return add_norm(self.LayerNorm, self.dropout(self.dense(hidden_states)), input_tensor)


def activation_of(module: Any) -> str | None:
    """The name that `mlp` has for an activation module or function; None for one that it does not know."""
    if not isinstance(module, nn.Module):
        return FUNCTIONS.get(module)
    kind = path(type(module))
    return ACTIVATIONS.get(kind) or (GELU.get(getattr(module, "approximate", None)) if kind in ACTIVATIONS else None)


class Perceptron(Replaced):
    """Options: up, act, down: names of its layers; dropout: of what follows; between: of a dropout before `down`."""

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
        """The perceptron without what follows; None where a layer of it is more than a product."""
        names = self._peakgpt
        up, down = self.get_submodule(names["up"]), self.get_submodule(names["down"])
        if layout(up) is None or layout(down) is None or self._drops_between() or not same_dtype(up, down):
            return None
        return mlp(x, weight(up), up.bias, weight(down), down.bias, activation=names["activation"])

    def _drops_between(self) -> bool:
        between = self._peakgpt["between"]
        rate = 0.0 if between is None else getattr(self, between)  # a module, or what F.dropout is given
        return self.training and getattr(rate, "p", rate) > 0


class MLP(Perceptron):
    def _peakgpt_sample(self) -> tuple[Tensor, ...] | None:
        up = self.get_submodule(self._peakgpt["up"])
        return rows(up) if layout(up) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        if y is None:
            return super().forward(x)
        return getattr(self, self._peakgpt["dropout"])(y) if self._peakgpt["dropout"] else y


class GatedMLP(MLP):
    """Llama's and T5's of version 1.1. Options: gate as well."""

    _OPS = (*Perceptron._OPS, "silu")

    def _fused(self, x: Tensor) -> Tensor | None:
        names = self._peakgpt
        gate, up, down = (self.get_submodule(names[name]) for name in ("gate", "up", "down"))
        if None in map(layout, (gate, up, down)) or self._drops_between() or not same_dtype(gate, up, down):
            return None
        return gated_mlp(
            x, weight(gate), gate.bias, weight(up), up.bias, weight(down), down.bias, activation=names["activation"]
        )


def same_dtype(*layers: nn.Module) -> bool:
    return len({layer.weight.dtype for layer in layers}) == 1


class BertLayer(Perceptron):
    """BERT's and RoBERTa's second half: a perceptron over two modules, dropout, the residual, a norm."""

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        out = self.output
        hooked = self.intermediate._forward_hooks or out._forward_hooks or out._forward_pre_hooks
        y = None if hooked or self.intermediate._forward_pre_hooks else self._fused(attention_output)
        if y is None:
            return super().feed_forward_chunk(attention_output)
        return add_norm(out.LayerNorm, out.dropout(y), attention_output)


class ChunkedMLP(Perceptron):
    """DistilBERT's."""

    def ff_chunk(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        return super().ff_chunk(x) if y is None else self.dropout(y)


class TorchBlock(Perceptron):
    """The perceptron of nn.TransformerEncoderLayer and nn.TransformerDecoderLayer."""

    def _ff_block(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        return super()._ff_block(x) if y is None else getattr(self, self._peakgpt["dropout"])(y)


class BloomMLP(Perceptron):
    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        if module.pretraining_tp > 1 and module.slow_but_exact:
            return "adds its products up in slices (pretraining_tp, slow_but_exact)"
        return super().objection(module, options)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        y = self._fused(hidden_states)
        if y is None:
            return super().forward(hidden_states, residual)
        return residual + F.dropout(y, self.hidden_dropout, self.training)
