"""GELU-MLP: up projection, bias, activation, down projection, bias.

    pre = x w_up^T + b_up      y = act(pre) w_down^T + b_down
    dh  = dy w_down            dpre = dh * act'(pre)
    dx  = dpre w_up            dw_up = dpre^T x    dw_down = dy^T act(pre)    db = column sums

Only `pre` is kept; act(pre) is formed again in backward, and with `recompute` so is pre itself. Hendrycks, Gimpel 2016,
"Gaussian Error Linear Units", arXiv:1606.08415: gelu_erf = x Phi(x); gelu_tanh = x/2 (1 + tanh(sqrt(2/pi) (x +
0.044715 x^3))).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels import check
from peakgpt.kernels.dispatch import Cost, op, short_lived

ACTIVATIONS = {"gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "gelu_erf": F.gelu, "relu": F.relu}


def _check(x, w_up, b_up, w_down, b_down, *, activation, recompute):
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    check.shape("mlp", "w_up", w_up, None, check.width("mlp", "x", x))
    check.shape("mlp", "b_up", b_up, w_up.shape[0])
    check.shape("mlp", "w_down", w_down, None, w_up.shape[0])
    check.shape("mlp", "b_down", b_down, w_down.shape[0])
    check.same("mlp", "x", x, w_up=w_up, b_up=b_up, w_down=w_down, b_down=b_down)


def _cost(x, w_up, b_up, w_down, b_down, **_):
    """2 FLOPs a weight and token, twice that backward; every operand once (the activation's FLOPs are under 1 %)."""
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


@op(cost=_cost, sample=_sample, check=_check, alloc=_alloc, keeps=("x", "w_up", "b_up", "w_down"), autocast="lower")
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
        w_up: (F, C), dtype of x, as F.linear takes it; any strides with one unit stride (Conv1D passes `w.t()`).
        b_up: (F,) or None.
        w_down: (C_out, F).
        b_down: (C_out,) or None.
        activation: "gelu_tanh", "gelu_erf" or "relu".
        recompute: keep nothing of the size of the hidden layer: backward repeats the first product, to the same bits.
            (Eager keeps what torch keeps.)
    Returns:
        (..., C_out), dtype of x. Gradients of the weights come in the weights' strides.
    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit.
        NotImplementedError: a forced backend objects; the message says why.
    """
    return F.linear(ACTIVATIONS[activation](F.linear(x, w_up, b_up)), w_down, b_down)
