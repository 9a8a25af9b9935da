"""Replacements for single layers: nn.Linear, Conv1D, norms and MLPs."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.dropin.class_swap import (
    CONV1D,
    Replacement,
    class_path,
    has_float_weight,
    layout_of,
    linear_layout,
    linear_weight,
    sample_rows,
)
from peakgpt.dropin.intact import dropout_rate, is_intact, is_plain_tensor
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

    @classmethod
    def _peakgpt_attributes(cls, kind: type) -> dict[str, Any]:
        return {"_peakgpt_layout": layout_of(kind)}

    def _peakgpt_sample(self) -> tuple[Tensor, ...]:
        return sample_rows(self)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight  # read once: a parametrization computes it, and spectral_norm changes its state
        if not is_plain_tensor(w):
            return super().forward(x)
        return linear(x, w.t() if self._peakgpt_layout == CONV1D else w, self.bias)


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
        w = self.weight
        if not is_plain_tensor(w):
            return super().forward(x)
        return layernorm(x, w, self.bias, eps=self.eps)


class RMSNorm(Replacement):
    """RMSNorm of transformers. Each has its own dtype of the result if those of input and weight differ.

    Options: eps: attribute with the epsilon. offset: added to the weight; Gemma's is 1.
    """

    def _peakgpt_sample(self) -> tuple[Tensor, ...]:
        return sample_rows(self)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if not is_plain_tensor(w) or x.dtype != w.dtype:
            return super().forward(x)
        return rmsnorm(x, w, eps=getattr(self, self._peakgpt["eps"]), offset=self._peakgpt["offset"])


class TorchRMSNorm(RMSNorm):
    """nn.RMSNorm."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        return LayerNorm.objection(module, options)


class BareLayerNorm(Replacement):
    """LayerNorm of OLMo, without a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return layernorm(x, x.new_ones(x.shape[-1]), eps=1e-5)


def is_intact_norm(norm: nn.Module) -> bool:
    """Return whether this is a replaced nn.LayerNorm whose forward may be skipped."""
    return isinstance(norm, LayerNorm) and is_intact(norm) and is_plain_tensor(norm.weight)


def sum_and_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x + residual, norm of that sum), in one pass if the norm is an intact replaced LayerNorm."""
    if not is_intact_norm(norm) or torch.promote_types(x.dtype, residual.dtype) != residual.dtype:
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


def _identity(act: Any) -> tuple[Any, ...]:
    """Return what decides the name of an activation, cheaper than `activation_of` in every forward."""
    return (type(act), getattr(act, "approximate", None)) if isinstance(act, nn.Module) else (act,)


class BaseMLP(Replacement):
    """Base of MLP replacements.

    Options: up, act, down: names of the layers. dropout: name of the dropout, or of its rate, after `down`, or None.
    between: name of the dropout before `down`, or None.
    """

    _OPS = ("gelu_tanh", "gelu_erf", "relu")

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        activation = operator.attrgetter(options["act"])(module)
        options["activation"], options["act_identity"] = activation_of(activation), _identity(activation)
        if options["activation"] in cls._OPS:
            return None
        name = type(activation).__name__ if isinstance(activation, nn.Module) else str(activation)
        return f"activation {name}, expected {', '.join(cls._OPS)}"

    def _fused(self, x: Tensor) -> Tensor | None:
        """Return the output of `down`, or None if a part must run its own forward."""
        layers = self._intact_layers("up", "down")
        if layers is None:
            return None
        up, down = layers
        activation = self._peakgpt["activation"]
        return mlp(x, linear_weight(up), up.bias, linear_weight(down), down.bias, activation=activation)

    def _intact_layers(self, *roles: str) -> list[nn.Module] | None:
        """Return the linear layers, or None if a layer, the activation or the dropout between them was changed.

        They are changed if they have hooks, adapters, shards or another class, or if the dropout drops something.
        """
        names = self._peakgpt
        layers = [self.get_submodule(names[role]) for role in roles]
        if None in map(linear_layout, layers) or not same_dtype(*layers):
            return None
        if names["act"] is not None:
            act = getattr(self, names["act"]) if "." not in names["act"] else operator.attrgetter(names["act"])(self)
            if _identity(act) != names["act_identity"] or (isinstance(act, nn.Module) and has_own_call(act)):
                return None
        between = 0.0 if names["between"] is None else getattr(self, names["between"])
        rate = dropout_rate(between) if isinstance(between, nn.Module) else between * self.training
        return layers if rate == 0.0 else None


class MLP(BaseMLP):
    """A module that is an MLP and nothing else."""

    def _peakgpt_sample(self) -> tuple[Tensor, ...] | None:
        up = self.get_submodule(self._peakgpt["up"])
        return sample_rows(up) if linear_layout(up) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        if y is None:
            return super().forward(x)
        if not self._peakgpt["dropout"]:
            return y
        dropout = getattr(self, self._peakgpt["dropout"])
        return dropout(y) if isinstance(dropout, nn.Module) else F.dropout(y, dropout, self.training)


class GatedMLP(MLP):
    """The gated MLP of Llama and T5 1.1. More options: gate: name of the gate projection."""

    _OPS = (*BaseMLP._OPS, "silu")

    def _fused(self, x: Tensor) -> Tensor | None:
        layers = self._intact_layers("gate", "up", "down")
        if layers is None:
            return None
        gate, up, down = layers
        return gated_mlp(
            x, linear_weight(gate), gate.bias, linear_weight(up), up.bias, linear_weight(down), down.bias,
            activation=self._peakgpt["activation"],
        )  # fmt: skip


class PackedGatedMLP(GatedMLP):
    """The gated MLP of Phi-3: `up` computes the gate, then the rest."""

    def _fused(self, x: Tensor) -> Tensor | None:
        layers = self._intact_layers("up", "down")
        if layers is None:
            return None
        packed, down = layers
        gate, up = linear_weight(packed).chunk(2)
        biases = (None, None) if packed.bias is None else packed.bias.chunk(2)
        return gated_mlp(
            x, gate, biases[0], up, biases[1], linear_weight(down), down.bias, activation=self._peakgpt["activation"]
        )


def same_dtype(*layers: nn.Module) -> bool:
    return len({layer.weight.dtype for layer in layers}) == 1


class BertLayer(BaseMLP):
    """The second half of a BERT or RoBERTa layer: an MLP over two modules, dropout, residual, norm."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        options["kinds"] = type(module.intermediate), type(module.output)
        return super().objection(module, options)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        up, out = self.intermediate, self.output
        intact = (type(up), type(out)) == self._peakgpt["kinds"] and not has_own_call(up) and not has_own_call(out)
        y = self._fused(attention_output) if intact else None
        if y is None:
            return super().feed_forward_chunk(attention_output)
        return add_norm(out.LayerNorm, out.dropout(y), attention_output)


class ChunkedMLP(BaseMLP):
    """The MLP of DistilBERT."""

    def ff_chunk(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        return super().ff_chunk(x) if y is None else self.dropout(y)


class TorchBlock(BaseMLP):
    """The MLP inside nn.TransformerDecoderLayer and nn.TransformerEncoderLayer."""

    def _ff_block(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        return super()._ff_block(x) if y is None else getattr(self, self._peakgpt["dropout"])(y)


class EncoderLayer(TorchBlock):
    """nn.TransformerEncoderLayer. Its fast path in eval() reads the weights of its children and skips their forward."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        if src.is_nested:  # nn.TransformerEncoder makes such tensors for the fast path only
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x, masks = src, (src_mask, src_key_padding_mask)
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *masks, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = add_norm(self.norm1, self._sa_block(x, *masks, is_causal=is_causal), x)
        return add_norm(self.norm2, self._ff_block(x), x)


class ResidualMLP(BaseMLP):
    """The MLP of BLOOM and MPT, with dropout and residual."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        if getattr(module, "pretraining_tp", 1) > 1 and module.slow_but_exact:
            return "sums partial products in slices (pretraining_tp, slow_but_exact)"
        return super().objection(module, options)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        y = self._fused(hidden_states)
        if y is None:
            return super().forward(hidden_states, residual)
        return residual + F.dropout(y, self.hidden_dropout, self.training)
