"""The MLPs of a GPT on the fused ops, with GPT-2's parameter names."""

from __future__ import annotations

from torch import Tensor, nn

from peakgpt.engine.model.fp8 import fp8_linear
from peakgpt.engine.model.quantized_linear import QuantizedLinear
from peakgpt.engine.model.state_dicts import ModuleWithAliases, ModuleWithConv1D
from peakgpt.kernels.ops.mlp import ACTIVATIONS, GATES, gated_mlp, mlp


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
        up, down = self.c_fc, self.c_proj
        if self.fp8 and self.training:
            h = ACTIVATIONS[self.activation](fp8_linear(x, up.weight, up.bias))
            return fp8_linear(h, down.weight, down.bias)
        if isinstance(up, QuantizedLinear):
            return down(up(x, self.activation))
        return mlp(
            x, up.weight, up.bias, down.weight, down.bias, activation=self.activation, recompute=self.recompute
        )


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
