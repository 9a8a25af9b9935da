"""What takes the place of single layers: linear, Conv1D, LayerNorm, two-layer perceptrons, attention modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peakgpt.dropin.swap import Replaced, floating, layout, path, rows, weight
from peakgpt.kernels.layernorm import layernorm
from peakgpt.kernels.linear import linear
from peakgpt.kernels.mlp import mlp

# Activation classes by the name that `mlp` has for them; None: its `approximate` says which.
ACTIVATIONS = {
    "torch.nn.modules.activation.GELU": None,
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.GELUActivation": "gelu_erf",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.models.bloom.modeling_bloom.BloomGelu": "gelu_tanh",
}
GELU = {"none": "gelu_erf", "tanh": "gelu_tanh"}


class Linear(Replaced):
    """nn.Linear and Conv1D."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        return None if floating(module) else f"its weight is {module.weight.dtype}"

    def sample(self) -> tuple[Tensor, ...]:
        return rows(self)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, weight(self), self.bias)


class LayerNorm(Replaced):
    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        if len(module.normalized_shape) != 1:
            return f"normalises {len(module.normalized_shape)} axes, expected the last one"
        return None if module.weight is not None else "has no weight"

    def sample(self) -> tuple[Tensor, ...]:
        return rows(self)

    def forward(self, x: Tensor) -> Tensor:
        return layernorm(x, self.weight, self.bias, eps=self.eps)


def activation_of(module: nn.Module) -> str | None:
    """The name that `mlp` has for an activation module; None for one that it does not know."""
    kind = path(type(module))
    return ACTIVATIONS.get(kind) or (GELU.get(getattr(module, "approximate", None)) if kind in ACTIVATIONS else None)


def perceptron(module: nn.Module, x: Tensor, up: nn.Module, down: nn.Module) -> Tensor | None:
    """`mlp` of x by two layers of a module; None where one of them is more than a product."""
    if layout(up) is None or layout(down) is None:
        return None
    activation = module._peakgpt["activation"]
    return mlp(x, weight(up), up.bias, weight(down), down.bias, activation=activation)


class Attention(Replaced):
    """Attention modules of transformers' models that do not ask AttentionInterface."""


class MLP(Replaced):
    """Options: up, act, down: names of its layers; dropout: of what follows, or None."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        return known_activation(getattr(module, options["act"]), options)

    def sample(self) -> tuple[Tensor, ...] | None:
        up = getattr(self, self._peakgpt["up"])
        return rows(up) if layout(up) else None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = self._peakgpt
        y = None
        if not args and not kwargs:
            y = perceptron(self, x, getattr(self, names["up"]), getattr(self, names["down"]))
        if y is None:
            return super().forward(x, *args, **kwargs)
        return getattr(self, names["dropout"])(y) if names["dropout"] else y


def known_activation(module: nn.Module, options: dict[str, Any]) -> str | None:
    """Note the activation among the options, or say that it is unknown."""
    options["activation"] = activation_of(module)
    return None if options["activation"] else f"activation {type(module).__name__} is not gelu or relu"
