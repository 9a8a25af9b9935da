"""Mixture of experts: E MLPs with stacked weights, of which k compute each token.

    y[n] = sum_j weight[n, j] mlp_e(x[n])   with e = id[n, j]      mlp_e(x) = h w_down[e]^T + b_down[e]
    pre  = x w_up[e]^T + b_up[e]   h = act(pre);   gated: gate = x w_gate[e]^T + b_gate[e]   h = act(gate) pre

The N k choices are rows of grouped matrix products. They are sorted by expert: row s is choice order[s], of token
order[s] // k; `position` is the inverse of `order`; expert e has the rows offsets[e] to offsets[e + 1]. For a row s of
token n and expert e, with its weight w:

    g  = dy[n] w_down[e]      dweight = g . h + dy[n] . b_down[e]      dh = w g      dgate, dpre: as in mlp.py
    dx[n] = sum_j (dgate w_gate[e] + dpre w_up[e])[row of (n, j)]
    dw_up[e] = sum dpre x^T   dw_gate[e] = sum dgate x^T   dw_down[e] = sum w dy h^T   over the rows of e

No choice is dropped. A token's result does not depend on the other tokens, and every sum has a fixed order. The weights
of the choices are applied inside the op, so neither the experts' outputs nor their gradients (S, C) are saved: forward
saves `gate` and `pre`, (S, F) each. Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv:1701.06538, eq. 1;
the grouped products: Gale et al. 2022, "MegaBlocks", arXiv:2211.15841; dweight from g: Guo et al. 2025, "SonicMoE",
arXiv:2512.14080, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.autograd import transformed
from peakgpt.kernels.core.dispatch import Cost, op, short_lived
from peakgpt.kernels.ops.mlp import ACTIVATIONS, GATES, gated


def _check(
    x, topk_ids, topk_weights, w_gate, b_gate, w_up, b_up, w_down, b_down, *, activation, recompute
):  # fmt: skip
    allowed = ACTIVATIONS if w_gate is None else GATES
    if activation not in allowed:
        raise ValueError(f"experts: activation is {activation!r}, expected one of {', '.join(allowed)}")
    width = check.width("experts", "x", x)
    check.shape("experts", "topk_ids", topk_ids, *x.shape[:-1], None)
    check.shape("experts", "topk_weights", topk_weights, *topk_ids.shape)
    check.shape("experts", "w_up", w_up, None, None, width)
    experts, hidden, _ = w_up.shape
    check.shape("experts", "w_gate", w_gate, experts, hidden, width)
    check.shape("experts", "b_gate", b_gate, experts, hidden)
    check.shape("experts", "b_up", b_up, experts, hidden)
    check.shape("experts", "w_down", w_down, experts, None, hidden)
    check.shape("experts", "b_down", b_down, experts, w_down.shape[1])
    if w_gate is None and b_gate is not None:
        raise ValueError("experts: got b_gate without w_gate, expected both or none")
    check.same("experts", "x", x, w_gate=w_gate, b_gate=b_gate, w_up=w_up, b_up=b_up, w_down=w_down, b_down=b_down)
    check.same("experts", "x", x, mixed=True, topk_weights=topk_weights)
    check.indices("experts", "topk_ids", topk_ids, experts, x.device)


def _cost(x, topk_ids, topk_weights, *parameters, **_):
    """2 FLOPs per weight and choice, twice that backward. Moves operands once, weights of min(E, choices) experts."""
    choices, size, experts = topk_ids.numel(), x.element_size(), parameters[2].shape[0]
    share = min(choices, experts) / max(experts, 1)  # of the experts that compute a token, at most
    present = [p for p in parameters if p is not None]
    weights, all_numbers = sum(p.numel() for p in present if p.dim() == 3), sum(p.numel() for p in present)
    w_up, w_down = parameters[2], parameters[4]
    hidden = choices * w_up.shape[1] * (1 if parameters[0] is None else 2)
    out = x.numel() // max(x.shape[-1], 1) * w_down.shape[1]
    routing = choices * (topk_ids.element_size() + topk_weights.element_size())
    flops = 2 * choices * (weights // max(experts, 1))
    read = int(x.numel() + share * all_numbers) * size + routing
    backward_read = int(x.numel() + out + hidden + share * weights) * size + routing
    backward_written = (x.numel() + all_numbers + hidden) * size + choices * topk_weights.element_size()
    backward_written += 8 * (2 * choices + experts + 1)  # order, position and offsets
    return Cost(flops, read + out * size, 2 * flops, backward_read + backward_written, out * size, backward_written)


def _sample(
    rows: int = 1024, width: int = 768, hidden: int = 1024, experts: int = 8, choices: int = 2, gated: int = 1,
    biased: int = 0, spread: float = 1, **like,
):  # fmt: skip
    device, dtype = like.get("device"), like.get("dtype") or torch.get_default_dtype()
    ids = torch.rand(rows, experts, device=device).argsort(1)[:, :choices].contiguous()
    weights = torch.rand(rows, choices, device=device, dtype=torch.promote_types(dtype, torch.float32)) + 0.1

    def make(count: int, out: int, inputs: int) -> tuple[Tensor, Tensor | None]:
        bias = torch.randn(count, out, **like) if biased else None
        return torch.randn(count, out, inputs, **like) * inputs**-0.5, bias

    gate = make(experts, hidden, width) if gated else (None, None)
    up, down = make(experts, hidden, width), make(experts, width, hidden)
    return torch.randn(rows, width, **like) * spread, ids, weights, *gate, *up, *down


def _alloc(
    x, topk_ids, topk_weights, w_gate, b_gate, w_up, b_up, w_down, b_down, *, needs, activation, recompute
):  # fmt: skip
    out = short_lived(x, *x.shape[:-1], w_down.shape[1])
    if not any(needs):
        return (out,), ()
    rows, (experts, hidden, _) = topk_ids.numel(), w_up.shape
    routing = [topk_ids.new_empty(count, dtype=torch.int64) for count in (rows, rows, experts + 1)]
    count = 0 if recompute else 1 if w_gate is None else 2
    return (out,), (*routing, *(x.new_empty(rows, hidden) for _ in range(count)))


def _counted(
    x, topk_ids, topk_weights, w_gate, b_gate, w_up, b_up, w_down, b_down, *, activation, recompute
):  # fmt: skip
    """The same products of fake tensors, whose ids have no values: the first expert computes all choices."""
    first = [None if p is None else p[0] for p in (w_gate, b_gate, w_up, b_up, w_down, b_down)]
    return _combine(_mlp(_choices(x, topk_ids), *first, activation), topk_weights)


@op(
    cost=_cost, sample=_sample, check=_check, alloc=_alloc, counted=_counted, autocast="lower",
    autocast_exempt=("topk_weights",),
    saved_for_backward=("x", "topk_ids", "topk_weights", "w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down"),
)  # fmt: skip
def experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    activation: str = "silu",
    recompute: bool = False,
) -> Tensor:
    """Run each token through its k experts, and add up their results with the token's weights.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        topk_ids: (..., k) int64 or int32, the experts of each token. An id may occur twice.
        topk_weights: (..., k) float32 or dtype of x, their factors.
        w_gate, w_up: (E, F, C), dtype of x. Without w_gate the experts are not gated.
        b_gate, b_up: (E, F) or None.
        w_down: (E, C_out, F).
        b_down: (E, C_out) or None.
        activation: of the gate: "silu", "clamped_swiglu", "gelu_tanh", "gelu_erf" or "relu"; without a gate one of the
            last three.
        recompute: save no tensor of the hidden layer's size; backward computes the first products again. The eager
            backend ignores it.
    Returns:
        (..., C_out), dtype of x. The sum over k is a float32 sum in the order of the choices.
    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit; on a CPU also an id out of range.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    parameters = (w_gate, b_gate, w_up, b_up, w_down, b_down)
    if torch.compiler.is_compiling() or transformed():
        return _all_experts(x, topk_ids, topk_weights, parameters, activation)
    expert, order = topk_ids.flatten().sort(stable=True)
    parts = _choices(x, topk_ids)[order].split(torch.bincount(expert, minlength=w_up.shape[0]).tolist())
    each = zip(parts, *_unbind(parameters, len(parts)), strict=True)
    y = torch.cat([_mlp(*arguments, activation) for arguments in each])
    return _combine(y[order.argsort()], topk_weights)


def _all_experts(x, topk_ids, topk_weights, parameters, activation):
    """Run every expert on every token: for torch.compile and torch.func, which cannot read the ids."""
    count = parameters[2].shape[0]
    is_chosen = topk_ids[..., None] == torch.arange(count, device=x.device)  # (..., k, E)
    weights = (is_chosen * topk_weights[..., None]).sum(-2)
    each = zip(*_unbind(parameters, count), strict=True)
    y = torch.stack([_mlp(x, *arguments, activation) for arguments in each], -2)  # (..., E, C_out)
    return (y * weights[..., None]).sum(-2).to(y.dtype)


def _unbind(parameters, count: int):
    """Return the tensors of each expert. An index w[e] would have a gradient of the size of w for each expert."""
    return [[None] * count if p is None else p.unbind() for p in parameters]


def _choices(x: Tensor, topk_ids: Tensor) -> Tensor:
    """Return the row of x of each choice, (N k, C)."""
    return x.unsqueeze(-2).expand(*topk_ids.shape, x.shape[-1]).reshape(-1, x.shape[-1])


def _mlp(x, w_gate, b_gate, w_up, b_up, w_down, b_down, activation):
    up = F.linear(x, w_up, b_up)
    hidden = GATES[activation](up) if w_gate is None else gated(activation, F.linear(x, w_gate, b_gate), up)
    return F.linear(hidden, w_down, b_down)


def _combine(y: Tensor, topk_weights: Tensor) -> Tensor:
    """Add up the rows of each token, in float32 or wider."""
    weights = topk_weights.to(torch.promote_types(topk_weights.dtype, torch.float32))
    return (y.view(*weights.shape, y.shape[-1]) * weights[..., None]).sum(-2).to(y.dtype)


# ---- the bias of the last layer, whose gradients need no sorted rows; for the backends ----


def down_bias_gradients(
    dy: Tensor, topk_ids: Tensor, topk_weights: Tensor, b_down: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute what b_down adds to backward.

    Args:
        dy: (N, C_out).
        topk_ids, topk_weights: (N, k).
        b_down: (E, C_out).
    Returns:
        (dy . b_down of each choice, (N, k) float32; db_down, (E, C_out) in its dtype).
    """
    wide, ids = dy.float(), topk_ids.long()
    shares = wide.new_zeros(dy.shape[0], b_down.shape[0]).scatter_add_(1, ids, topk_weights.float())
    return (wide @ b_down.float().t()).gather(1, ids), (shares.t() @ wide).to(b_down.dtype)
