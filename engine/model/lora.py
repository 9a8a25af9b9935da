"""LoRA: low-rank updates of linear layers, the only weights that train while those of the layers stay frozen.

    y = base(x) + s (dropout(x) A^T) B^T        A (r, C), B (F, r), s = alpha / r, or alpha / sqrt(r) with rsLoRA

B starts at zero. Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1;
Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732. Over a quantized
base this is QLoRA: Dettmers et al. 2023, arXiv:2305.14314.

A layer of ours may be several modules of transformers, such as the projections to queries, keys and values. Each of
them that has an adapter is a part, with an A and a B of its own: A is the A of all parts, one below the other, and so
is B. A model may have several adapters, of which one is active.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.model.plain import fusable, plain_parameters, run_linear
from peakgpt.engine.model.quantized_linear import QuantizedLinear
from peakgpt.kernels.ops.dropout import dropout
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.linear_lora import linear_lora

DEFAULT_ADAPTER = "default"
ALL_LINEAR = "all-linear"
Rows = tuple[tuple[int, int], ...]  # first row of each part and the row after its last one


@dataclass(kw_only=True, frozen=True)
class LoraConfig:
    """An adapter's settings, under the names and with the defaults of PEFT's LoraConfig.

    Args:
        r: rank.
        target_modules: modules of the family's model in transformers that get an adapter: the ends of their names, such
            as ("q_proj", "v_proj"); one regular expression for the whole name; or "all-linear", all linear layers but
            the head. None: the projections to queries and values, or the one to queries, keys and values.
        lora_alpha: the numerator of the scale s.
        lora_dropout: probability of dropping an input of the adapter, in training.
        use_rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
        exclude_modules: modules that get none, as target_modules.
        layers_to_transform: the layers that get one, counted from 0. None: all.
    Raises:
        ValueError: a value of another type or out of range.
    """

    r: int = 8
    target_modules: Sequence[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None

    def __post_init__(self) -> None:
        self._require("r", _is_number(self.r, int) and self.r >= 1, "a whole number of at least 1")
        self._require("lora_alpha", _is_number(self.lora_alpha, int, float) and self.lora_alpha > 0, "a number above 0")
        rate = self.lora_dropout
        self._require("lora_dropout", _is_number(rate, int, float) and 0 <= rate < 1, "a rate of 0 to below 1")
        self._require("use_rslora", isinstance(self.use_rslora, bool), "true or false")
        for name in ("target_modules", "exclude_modules"):
            names = self._listed(name, str)
            self._require(name, names is None or len(names) > 0, "names of modules, or one regular expression")
        self._listed("layers_to_transform", int)

    def _listed(self, name: str, kind: type) -> Any:
        """Make a list of a field a tuple; return it."""
        value = getattr(self, name)
        if isinstance(value, list | set | frozenset):
            value = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
            object.__setattr__(self, name, value)
        items = value if isinstance(value, tuple) else () if value is None else (value,)
        self._require(name, all(_is_number(item, kind) for item in items), f"{kind.__name__} or a list of them")
        return value

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"LoraConfig: {name} is {getattr(self, name)!r:.60}, expected {expected}")

    @property
    def scale(self) -> float:
        """The factor s on the low-rank product."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


@fusable
class LoraWeights(nn.Module):
    """One adapter of one layer."""

    def __init__(
        self, inputs: int, outputs: int, rows: Rows, config: LoraConfig, *, lora_A: nn.Parameter | None = None
    ):  # fmt: skip
        """
        Args:
            inputs, outputs: C and F.
            rows: of the parts, in the output of the layer.
            config: of the adapter.
            lora_A: A of another layer, which is this one's too.
        """
        super().__init__()
        self.rows, self.scale, self.rate = rows, config.scale, config.lora_dropout
        self.row_numbers = None if rows == ((0, outputs),) else tuple(chain.from_iterable(rows))
        self.lora_A = nn.Parameter(torch.empty(len(rows) * config.r, inputs)) if lora_A is None else lora_A
        self.lora_B = nn.Parameter(torch.empty(sum(end - begin for begin, end in rows), config.r))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A as nn.Linear draws its weight, as PEFT does, and set B to zero."""
        bound = self.lora_A.shape[1] ** -0.5
        self.lora_A.uniform_(-bound, bound)
        self.lora_B.zero_()

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Return base(x), (..., F), plus the low-rank product of x, (..., C)."""
        dropped = dropout(x, p=self.rate) if self.training and self.rate else None
        parameters = plain_parameters(base, nn.Linear)
        if parameters is not None:
            return linear_lora(
                x, parameters["weight"], parameters["bias"], self.lora_A, self.lora_B, dropped, scale=self.scale,
                rows=self.row_numbers,
            )  # fmt: skip
        return self._add_product(base(x), x if dropped is None else dropped)

    def _add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y plus the low-rank product, for a base layer of another kind."""
        z = linear(x.to(self.lora_A.dtype), self.lora_A).mul(self.scale)
        pieces, at = [], 0
        parts = zip(self.rows, z.chunk(len(self.rows), -1), self._split_B(), strict=True)
        for (begin, end), part, b in parts:
            pieces += [y[..., at:begin], y[..., begin:end] + linear(part.contiguous(), b).to(y.dtype)]
            at = end
        pieces = [piece for piece in (*pieces, y[..., at:]) if piece.shape[-1]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    def delta(self) -> Tensor:
        """Return what the adapter adds to the layer's weight, for all parts: (rows of all parts, C) float32."""
        r = self.lora_B.shape[1]
        parts = zip(self.lora_A.detach().float().split(r), self._split_B(), strict=True)
        return torch.cat([b.detach().float() @ a * self.scale for a, b in parts])

    def _split_B(self) -> Sequence[Tensor]:
        return self.lora_B.split([end - begin for begin, end in self.rows])


@fusable
class LoraLinear(nn.Module):
    """A linear layer with adapters, of which one may be active."""

    def __init__(self, base_layer: nn.Linear | QuantizedLinear):
        super().__init__()
        self.base_layer, self.adapters, self.active = base_layer, nn.ModuleDict(), None

    @property
    def in_features(self) -> int:
        """C."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """F."""
        return self.base_layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (..., C), to (..., F)."""
        adapter = None if self.active is None else self.adapters._modules.get(self.active)
        return run_linear(self.base_layer, x) if adapter is None else adapter(self.base_layer, x)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the layer without adapters, whose weight has the active one's low-rank product added to it.

        The sum is formed in float32 and rounded once. The weight is a new tensor: the old one may be a map of a file.
        """
        layer = self.base_layer
        if self.active in self.adapters:
            adapter = self.adapters[self.active]
            weight, delta = layer.weight.detach().float(), adapter.delta()
            weight = weight.clone() if weight.data_ptr() == layer.weight.data_ptr() else weight
            for (begin, end), part in zip(adapter.rows, delta.split([e - b for b, e in adapter.rows]), strict=True):
                weight[begin:end] += part
            layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
        return layer


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the layers that have adapters, and their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model has layers with adapters."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


def with_adapters(model: nn.Module, name: str) -> LoraLinear:
    """Return a linear layer of a model, made one that has adapters unless it is one."""
    layer = model.get_submodule(name)
    if not isinstance(layer, LoraLinear):
        layer = LoraLinear(layer).train(layer.training)
        model.set_submodule(name, layer)
    return layer


def replace_layers(model: nn.Module, *, merge: bool) -> None:
    """Replace all layers with adapters by their base layers; with `merge` the active adapter becomes part of them.

    Raises:
        ValueError: an active adapter is over a quantized weight, which cannot take it in.
    """
    layers = list(lora_layers(model))
    for name, layer in layers:
        if merge and layer.active in layer.adapters and isinstance(layer.base_layer, QuantizedLinear):
            raise ValueError(
                f"merge: {name} has a quantized weight, expected floats: load the model with dequantize=True, or the "
                "checkpoint that `peakgpt quantize` read"
            )
    for name, layer in layers:
        model.set_submodule(name, layer.merged() if merge else layer.base_layer)


def freeze_base(model: nn.Module) -> None:
    """Let no parameter of a model train but those of adapters, which keep what they are."""
    own = {p for _, layer in lora_layers(model) for p in layer.adapters.parameters()}
    for parameter in model.parameters():
        if parameter not in own:
            parameter.requires_grad_(False)


@torch.no_grad()
def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating parameters that do not train."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
