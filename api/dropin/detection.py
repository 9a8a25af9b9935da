"""Detect MLPs and attention in modules of unknown classes.

An MLP is a module with two linear layers that it calls one after the other, if `mlp` with a known activation gives the
same output on a trial input. Attention is a forward that calls `scaled_dot_product_attention`: the same code runs, with
that name bound to a function that calls `peakgpt.attention`.
"""

from __future__ import annotations

import contextlib
import functools
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
# Relative to the largest output. The two forms of GELU differ by at least 1e-4 of it at inputs of this scale.
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
        seen = _trace_calls(module, children, dropouts, x)
        if seen is None:
            return None
        y, order = seen
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
            "between": between[0] if between else None, "activation": matches[0]}  # fmt: skip


def _trace_calls(module: nn.Module, children: dict[str, nn.Module], dropouts: list[str], x: Tensor):
    """Return (output, names of the children in call order), or None if training differs by more than dropout."""
    order: list[str] = []
    hooks = [c.register_forward_hook(lambda *_, n=n: order.append(n)) for n, c in children.items()]
    try:
        with _mode(module, dropouts, False):
            y = module(x)
        first, order[:] = list(order), []
        with _mode(module, dropouts, True):
            same = torch.equal(module(x), y)
    except Exception:  # its forward does not take one tensor, so it is not an MLP
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


class CallsSDPA(Replacement):
    """A module whose forward calls scaled_dot_product_attention; see `sdpa_replacement`."""


@functools.cache
def sdpa_replacement(kind: type) -> type[Replacement] | None:
    """Return the replacement of a class whose forward calls scaled_dot_product_attention, or None."""
    function = vars(kind).get("forward")
    code = getattr(function, "__code__", None)
    if code is None or SDPA not in code.co_names or kind.__module__.split(".")[0] in ("torch", "transformers"):
        return None
    functional = _copy(F, {SDPA: scaled_dot_product_attention})
    stand_ins = {id(F): functional, id(F.scaled_dot_product_attention): scaled_dot_product_attention,
                 id(torch): _copy(torch, {"nn": _copy(nn, {"functional": functional})}),
                 id(nn): _copy(nn, {"functional": functional})}  # fmt: skip
    names = {name: stand_ins.get(id(value), value) for name, value in function.__globals__.items()}
    forward = types.FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    forward.__kwdefaults__ = function.__kwdefaults__
    return type(CallsSDPA.__name__, (CallsSDPA,), {"forward": forward})


def _copy(module: types.ModuleType, changed: dict[str, Any]) -> types.ModuleType:
    twin = types.ModuleType(module.__name__)
    twin.__dict__.update({**vars(module), **changed})
    return twin


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Same as torch's function. Calls `peakgpt.attention` for (B, H, T, D) inputs with a supported mask, else torch."""
    other = query.dim() != 4 or query.shape[-1] != value.shape[-1] or key.shape[0] != query.shape[0]
    if other or (is_causal and (query.shape[2] != key.shape[2] or attn_mask is not None)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    mask = Mask(is_causal) if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    return masked_attention(q, k, v, mask, scale=scale, dropout=dropout_p).transpose(1, 2)
