"""Detect MLPs and attention in modules of unknown classes.

A module is an MLP if it calls two linear layers one after the other, and if `mlp` with a known activation gives the
same output on a trial input. A module is attention if its forward calls `scaled_dot_product_attention`. The replacement
runs the same code, with that name bound to a function that calls `peakgpt.attention`.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.dropin.attention_function import Mask, masked_attention
from peakgpt.dropin.class_swap import LAYOUTS, Replacement, class_path, linear_weight, original_class, sample_rows
from peakgpt.dropin.replacements import layers
from peakgpt.kernels.ops.mlp import mlp

SDPA = "scaled_dot_product_attention"
DROPOUT = "torch.nn.modules.dropout.Dropout"
# TOLERANCE is relative to the largest output. At inputs of SCALE, the two forms of GELU differ by at least 1e-4 of it.
SCALE, TOLERANCE = 3.0, {torch.float32: 1e-5, torch.float64: 1e-5}
LOWER = 2e-2


def detect_mlp(module: nn.Module) -> dict[str, Any] | None:
    """Return the options of `layers.MLP` if the module is an MLP, else None."""
    children = dict(module.named_children())
    kinds = {name: class_path(original_class(child)) for name, child in children.items()}
    linear = [name for name, kind in kinds.items() if kind in LAYOUTS]
    acts = [name for name, child in children.items() if layers.activation_of(child)]
    dropouts = [name for name, kind in kinds.items() if kind == DROPOUT]
    plain = not (module._parameters or module._buffers or module._forward_hooks or module._forward_pre_hooks)
    if not plain or len(linear) != 2 or len(acts) > 1 or len(linear) + len(acts) + len(dropouts) != len(children):
        return None
    up, down = (children[name] for name in linear)
    if linear_weight(up).shape[0] != linear_weight(down).shape[1] or up.weight.device.type == "meta":
        return None
    x = sample_rows(up)[0] * SCALE
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        trace = _trace_calls(module, children, dropouts, x)
        if trace is None:
            return None
        y, order = trace
        known = [layers.activation_of(children[acts[0]])] if acts else list(layers.MLP._OPS)
        matches = [name for name in known if name in layers.MLP._OPS and _close(_fused_output(x, up, down, name), y)]
    middle, end = order[1 : order.index(linear[1])] if linear[1] in order else [], order[-1]
    if order[0] != linear[0] or len(matches) != 1 or [n for n in middle if n not in dropouts] != acts:
        return None
    between = [n for n in middle if n in dropouts]
    final = end if end in dropouts else None
    if len(between) > 1 or order != [linear[0], *middle, linear[1], *([final] if final else [])]:
        return None
    return {"up": linear[0], "act": acts[0] if acts else None, "down": linear[1], "dropout": final,
            "between": between[0] if between else None, "activation": matches[0],
            "children": list(children)}  # fmt: skip


def _trace_calls(module: nn.Module, children: dict[str, nn.Module], dropouts: list[str], x: Tensor):
    """Return (output, names of the children in call order).

    Returns None if the forward needs other inputs, or if training mode differs by more than dropout.
    """
    order: list[str] = []
    hooks = [c.register_forward_hook(lambda *_, n=n: order.append(n)) for n, c in children.items()]
    try:
        with _mode(module, dropouts, False):
            y = module(x)
        first, order[:] = list(order), []
        with _mode(module, dropouts, True):
            same = torch.equal(module(x), y)
    except Exception:  # the forward does not take one tensor, so the module is not an MLP
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return (y, first) if same and first and first == order else None


@contextlib.contextmanager
def _mode(module: nn.Module, dropouts: list[str], training: bool) -> Iterator[None]:
    """Set train() or eval() with dropout rates of 0; restore modes and rates at the end."""
    before = {m: m.training for m in module.modules()}
    rates = {name: getattr(module, name).p for name in dropouts}
    for name in dropouts:
        getattr(module, name).p = 0.0
    module.train(training)
    try:
        yield
    finally:
        for m, mode in before.items():
            m.training = mode
        for name, rate in rates.items():
            getattr(module, name).p = rate


def _fused_output(x: Tensor, up: nn.Module, down: nn.Module, activation: str) -> Tensor:
    return mlp(x, linear_weight(up), up.bias, linear_weight(down), down.bias, activation=activation)


def _close(got: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or got.shape != expected.shape:
        return False
    limit = TOLERANCE.get(got.dtype, LOWER)
    return bool((got - expected).abs().max() <= limit * expected.abs().max())


# ---- forwards that call scaled_dot_product_attention


def calls_sdpa(kind: type) -> bool:
    """Return whether the forward of a class of the user calls scaled_dot_product_attention."""
    code = getattr(vars(kind).get("forward"), "__code__", None)
    return code is not None and SDPA in code.co_names and kind.__module__.split(".")[0] not in ("torch", "transformers")


class CallsSDPA(Replacement):
    """A module whose forward calls scaled_dot_product_attention."""

    @classmethod
    def _peakgpt_attributes(cls, kind: type) -> dict[str, Any]:
        """Return a forward with the same code, in which that name is bound to our function."""
        function = vars(kind)["forward"]
        functional = _copy(F, {SDPA: scaled_dot_product_attention})
        stand_ins = {id(F): functional, id(F.scaled_dot_product_attention): scaled_dot_product_attention,
                     id(torch): _copy(torch, {"nn": _copy(nn, {"functional": functional})}),
                     id(nn): _copy(nn, {"functional": functional})}  # fmt: skip
        names = {name: stand_ins.get(id(value), value) for name, value in function.__globals__.items()}
        forward = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        forward.__kwdefaults__ = function.__kwdefaults__
        return {"forward": forward}


def _copy(module: types.ModuleType, changed: dict[str, Any]) -> types.ModuleType:
    copied = types.ModuleType(module.__name__)
    copied.__dict__.update({**vars(module), **changed})
    return copied


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Replace the function of torch: call `peakgpt.attention` for supported (B, H, T, D) inputs, else torch."""
    unsupported = query.dim() != 4 or query.shape[-1] != value.shape[-1] or key.shape[0] != query.shape[0]
    if unsupported or (is_causal and (query.shape[2] != key.shape[2] or attn_mask is not None)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    mask = Mask(is_causal) if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    return masked_attention(q, k, v, mask, scale=scale, dropout=dropout_p)[0].transpose(1, 2)
