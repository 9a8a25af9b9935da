"""The MLPs of a GPT on the fused ops, with GPT-2's parameter names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peakgpt.engine.model.fp8 import fp8_linear
from peakgpt.engine.model.plain import fusable, is_plain, plain_parameters, run_linear
from peakgpt.engine.model.quantized_linear import QuantizedLinear
from peakgpt.engine.model.recompute import checkpoint_block
from peakgpt.engine.model.state_dicts import ModuleWithAliases, ModuleWithConv1D
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.mlp import ACTIVATIONS, GATES, UPS, gated, gated_mlp, mlp

Product = Callable[..., Tensor]  # (x, weight, bias) -> x weight^T + bias


@fusable
class GELUMLP(ModuleWithConv1D):
    """GPT-2's MLP: c_fc, activation, c_proj."""

    ALIASES = tuple(
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
            bias: whether both linear layers have a bias.
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
        fp8 = self.fp8 and self.training
        if not fp8 and (parameters := _plain(self.c_fc, self.c_proj)):
            return mlp(x, *parameters, activation=self.activation, recompute=self.recompute)
        return _unfused(self, x, fp8_linear if fp8 else linear)

    def by_layers(self, x: Tensor, product: Product) -> Tensor:
        """Map x, (..., C), layer by layer; a layer that is not plain runs its own forward."""
        if is_plain(self.c_fc, QuantizedLinear):
            h = self.c_fc(x, self.activation)
        else:
            h = ACTIVATIONS[self.activation](run_linear(self.c_fc, x, product))
        return run_linear(self.c_proj, h, product)


@fusable
class GatedMLP(ModuleWithAliases):
    """A gated MLP: c_proj(activation(c_gate(x)) * c_fc(x))."""

    ALIASES = tuple(
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
            bias: whether the three linear layers have a bias.
            activation: "silu", "clamped_swiglu", "gelu_tanh", "gelu_erf" or "relu".
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
        if parameters := _plain(self.c_gate, self.c_fc, self.c_proj):
            return gated_mlp(x, *parameters, activation=self.activation, recompute=self.recompute)
        return _unfused(self, x, linear)

    def by_layers(self, x: Tensor, product: Product) -> Tensor:
        """Map x, (..., C), layer by layer; a layer that is not plain runs its own forward."""
        if is_plain(self.c_gate, QuantizedLinear):
            other = UPS.get(self.activation)
            up = run_linear(self.c_fc, x) if other is None else self.c_fc(x, other)
            hidden = self.c_gate(x, self.activation) * up
        else:
            hidden = gated(self.activation, run_linear(self.c_gate, x, product), run_linear(self.c_fc, x, product))
        return run_linear(self.c_proj, hidden, product)


def _plain(*layers: nn.Module) -> list[Tensor | None] | None:
    """Return weight and bias of each layer if all are plain, else None."""
    parameters: list[Tensor | None] = []
    for layer in layers:
        p = plain_parameters(layer, nn.Linear)
        if p is None:
            return None
        parameters += (p["weight"], p["bias"])
    return parameters


def _unfused(module: GELUMLP | GatedMLP, x: Tensor, product: Product) -> Tensor:
    """Run an MLP layer by layer; with `recompute` backward runs all its layers a second time."""
    if module.recompute and torch.is_grad_enabled():
        return checkpoint_block(module.by_layers, x, product)
    return module.by_layers(x, product)
