"""MLP: up projection, activation, down projection, with biases. Gated MLP: with a second up projection as a gate.

    pre = x w_up^T + b_up      y = act(pre) w_down^T + b_down
    dh  = dy w_down            dpre = dh * act'(pre)
    dx  = dpre w_up            dw_up = dpre^T x    dw_down = dy^T act(pre)    db = column sums

Gated: gate = x w_gate^T + b_gate, up = x w_up^T + b_up, h = act(gate) * up, y = h w_down^T + b_down

    dgate = dh * up * act'(gate)      dup = dh * act(gate)      dx = dgate w_gate + dup w_up

Forward saves only `pre`, or `gate` and `up`. Backward recomputes the activation from them. With `recompute` forward
saves none of them and backward recomputes them too. Hendrycks, Gimpel 2016, "Gaussian Error Linear Units",
arXiv:1606.08415: gelu_erf = x Phi(x); gelu_tanh = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); silu = x sigmoid(x).
Gates: Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202, eq. 6 (GEGLU with gelu, SwiGLU with silu).
clamped_swiglu bounds both factors: h = a sigmoid(1.702 a) (1 + clamp(up, -7, 7)) with a = min(gate, 7); OpenAI 2025,
"gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925, section 2.2, and the published code.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op, short_lived

ACTIVATIONS = {"gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "gelu_erf": F.gelu, "relu": F.relu}
SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702


def _clamped_swiglu(gate: Tensor) -> Tensor:
    gate = gate.clamp(max=SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate)


def _clamped_up(up: Tensor) -> Tensor:
    return up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1


GATES = {**ACTIVATIONS, "silu": F.silu, "clamped_swiglu": _clamped_swiglu}
UPS = {"clamped_swiglu": "clamped_up"}  # activation of a gate -> that of the other factor, if it has one
OUTPUT_ACTIVATIONS = {**GATES, "clamped_up": _clamped_up}  # of one product


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """Return the hidden layer of a gated MLP, act(gate) * up, from the products of its two weights."""
    other = UPS.get(activation)
    return GATES[activation](gate) * (up if other is None else OUTPUT_ACTIVATIONS[other](up))


def _check(x, w_up, b_up, w_down, b_down, *, activation, recompute):
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    check.shape("mlp", "w_up", w_up, None, check.width("mlp", "x", x))
    check.shape("mlp", "b_up", b_up, w_up.shape[0])
    check.shape("mlp", "w_down", w_down, None, w_up.shape[0])
    check.shape("mlp", "b_down", b_down, w_down.shape[0])
    check.same("mlp", "x", x, w_up=w_up, b_up=b_up, w_down=w_down, b_down=b_down)


def _cost(x, w_up, b_up, w_down, b_down, **_):
    """2 FLOPs per weight and token, twice that backward (activation: under 1 %). Moves every operand once."""
    tokens, weights, size = x.numel() // x.shape[-1], w_up.numel() + w_down.numel(), x.element_size()
    hidden, out = tokens * w_up.shape[0], tokens * w_down.shape[0]
    biases = sum(b.numel() for b in (b_up, b_down) if b is not None)
    read, backward_read = x.numel() + weights + biases, x.numel() + out + hidden + weights
    backward_written = x.numel() + weights + biases + hidden
    return Cost(
        2 * tokens * weights, (read + out) * size, 4 * tokens * weights, (backward_read + backward_written) * size,
        out * size, backward_written * size,
    )  # fmt: skip


def _sample(rows: int = 1024, width: int = 768, hidden: int = 3072, **like):
    w_up, w_down = torch.randn(hidden, width, **like), torch.randn(width, hidden, **like)
    b_up, b_down = torch.randn(hidden, **like), torch.randn(width, **like)
    return torch.randn(rows, width, **like), w_up * width**-0.5, b_up, w_down * hidden**-0.5, b_down


def _alloc(x, w_up, b_up, w_down, b_down, *, needs, activation, recompute):
    out = short_lived(x, *x.shape[:-1], w_down.shape[0])
    return (out,), (x.new_empty((*x.shape[:-1], w_up.shape[0])),) if any(needs) and not recompute else ()


@op(
    cost=_cost, sample=_sample, check=_check, alloc=_alloc, saved_for_backward=("x", "w_up", "b_up", "w_down"),
    strided=("x", "w_up", "w_down", "out"), autocast="lower",
)  # fmt: skip
def mlp(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    recompute: bool = False,
) -> Tensor:
    """Apply a two-layer perceptron to the last axis of x.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w_up: (F, C), dtype of x, as F.linear takes it; any strides; copied if none is 1 (Conv1D passes `w.t()`).
        b_up: (F,) or None.
        w_down: (C_out, F).
        b_down: (C_out,) or None.
        activation: "gelu_tanh", "gelu_erf" or "relu".
        recompute: save no tensor of the hidden layer's size. Backward recomputes the first product, with the same bits.
            The eager backend ignores it.
    Returns:
        (..., C_out), dtype of x. Gradients of the weights have the weights' strides.
    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    return F.linear(ACTIVATIONS[activation](F.linear(x, w_up, b_up)), w_down, b_down)


def _check_gated(x, w_gate, b_gate, w_up, b_up, w_down, b_down, *, activation, recompute):
    if activation not in GATES:
        raise ValueError(f"gated_mlp: activation is {activation!r}, expected one of {', '.join(GATES)}")
    check.shape("gated_mlp", "w_up", w_up, None, check.width("gated_mlp", "x", x))
    check.shape("gated_mlp", "w_gate", w_gate, *w_up.shape)
    check.shape("gated_mlp", "b_gate", b_gate, w_up.shape[0])
    check.shape("gated_mlp", "b_up", b_up, w_up.shape[0])
    check.shape("gated_mlp", "w_down", w_down, None, w_up.shape[0])
    check.shape("gated_mlp", "b_down", b_down, w_down.shape[0])
    weights = {"w_gate": w_gate, "b_gate": b_gate, "w_up": w_up, "b_up": b_up, "w_down": w_down, "b_down": b_down}
    check.same("gated_mlp", "x", x, **weights)


def _cost_gated(x, *parameters, **_):
    """2 FLOPs per weight and token, twice that backward. Moves operands once, and writes gate and up for backward."""
    w_up, w_down = parameters[2], parameters[4]
    tokens, size = x.numel() // x.shape[-1], x.element_size()
    weights, parameter_count = 2 * w_up.numel() + w_down.numel(), sum(p.numel() for p in parameters if p is not None)
    saved, out = 2 * tokens * w_up.shape[0], tokens * w_down.shape[0]
    backward_read, backward_written = x.numel() + out + saved + weights, x.numel() + parameter_count + saved
    return Cost(
        2 * tokens * weights, (x.numel() + parameter_count + out) * size,
        4 * tokens * weights, (backward_read + backward_written) * size, out * size, backward_written * size,
    )  # fmt: skip


def _sample_gated(rows: int = 1024, width: int = 768, hidden: int = 3072, spread: float = 1, **like):
    x, w_up, b_up, w_down, b_down = _sample(rows, width, hidden, **like)
    w_gate, b_gate = torch.randn(hidden, width, **like) * width**-0.5, torch.randn(hidden, **like)
    return x * spread, w_gate, b_gate, w_up, b_up, w_down, b_down


def _alloc_gated(x, w_gate, b_gate, w_up, b_up, w_down, b_down, *, needs, activation, recompute):
    out = short_lived(x, *x.shape[:-1], w_down.shape[0])
    shape = (*x.shape[:-1], w_up.shape[0])
    return (out,), (x.new_empty(shape), x.new_empty(shape)) if any(needs) and not recompute else ()


@op(
    cost=_cost_gated, sample=_sample_gated, check=_check_gated, alloc=_alloc_gated,
    saved_for_backward=("x", "w_gate", "b_gate", "w_up", "b_up", "w_down"),
    strided=("x", "w_gate", "w_up", "w_down", "out"), autocast="lower",
)  # fmt: skip
def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    activation: str = "silu",
    recompute: bool = False,
) -> Tensor:
    """Apply a gated two-layer perceptron to the last axis of x.

    Gate and up are two weights. A model that stores them in one tensor passes its halves.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w_gate, w_up: (F, C), dtype of x, as F.linear takes it; any strides; copied if none is 1.
        b_gate, b_up: (F,) or None.
        w_down: (C_out, F).
        b_down: (C_out,) or None.
        activation: of the gate: "silu", "clamped_swiglu", "gelu_tanh", "gelu_erf" or "relu".
        recompute: as in `mlp`. Backward recomputes the products of gate and up.
    Returns:
        (..., C_out), dtype of x. Gradients of the weights have the weights' strides.
    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    hidden = gated(activation, F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up))
    return F.linear(hidden, w_down, b_down)
