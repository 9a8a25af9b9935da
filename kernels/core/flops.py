"""FLOP formulas of all ops for torch's FlopCounterMode, under which a call runs as a library op.

An op counts as its eager function does on the same device: the matrix products that the call or its gradients need, 2
FLOPs for each multiplication with its addition. Elementwise work counts nothing, and causal attention counts all T x S
pairs, as in torch. The cost of a contract differs: it counts elementwise work too, and live pairs only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from peakgpt.kernels.core.autograd import autograd_keys
from peakgpt.kernels.core.spec import OpSpec, Params, Tensors

_formulas: dict[Any, Callable[..., int]] = {}  # by torch.ops.peakgpt.<op>


def add_forward(op: OpSpec, call: Callable[..., tuple[Tensors, Params]]) -> None:
    """Add the formula of the library op. call: its arguments -> (tensors, parameters)."""

    def formula(*args: Any, **_: Any) -> int:
        tensors, params = call(*args)
        params = {**params, **op.counted_as}
        if op.matmul_flops:
            return op.matmul_flops(*tensors, **params)
        return _count(lambda inputs: lambda: op.run_counted(inputs, params), tensors)

    _formulas[getattr(torch.ops.peakgpt, op.name)] = formula
    give_to_counters()


def add_backward(op: OpSpec) -> None:
    """Add the formula of the library op's backward."""

    def formula(grads, inputs, outputs, saved, *rest: Any, **_: Any) -> int:
        *values, _, needs = rest
        params = dict(zip(op.param_names, values, strict=True)) | op.counted_as
        return _count(lambda leaves: _backward(op, leaves, params, grads, needs), inputs)

    _formulas[getattr(torch.ops.peakgpt, f"{op.name}_backward")] = formula
    give_to_counters()


def give_to_counters() -> None:
    """Register all formulas with torch and with the counters that are active, if there can be any.

    Importing torch.utils.flop_counter imports Triton, so peakgpt does not import it.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    _add(module.flop_registry, _formulas)
    for mode in _python_dispatch._get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):  # it has copied the registry
            _add(counter.flop_registry, _formulas | _cpu_attention())


def _add(registry: dict[Any, Callable[..., int]], formulas: dict[Any, Callable[..., int]]) -> None:
    for target, formula in formulas.items():
        registry.setdefault(target, formula)


def _cpu_attention() -> dict[Any, Callable[..., int]]:
    """The formulas of torch's own attention on CPUs: torch 2.13 has them for CUDA only, and counts 0."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:  # (B, H, T, D), twice (B, K, S, D)
        return 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])

    def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:  # 5 products, 1 recomputed
        return 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (3 * q.shape[3] + 2 * v.shape[3])

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def _backward(
    op: OpSpec, inputs: Tensors, params: Params, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> Callable[[], Any]:
    """Run the function that is counted; return its backward as a function that computes the gradients."""
    leaves = [t.requires_grad_() for t, need in zip(inputs, needs, strict=True) if need]
    with torch.enable_grad():
        results = op.run_counted(inputs, params)
    results = results if len(op.outputs) > 1 else (results,)
    used = [r for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
    return lambda: torch.autograd.grad(used, leaves, [torch.empty_like(r) for r in used], allow_unused=True)


def _count(prepare: Callable[[Tensors], Callable[[], Any]], tensors: Tensors) -> int:
    """Return the FLOPs of prepare(fake copies of the tensors)()."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with autograd_keys(), FakeTensorMode():
        run = prepare([None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors])
        counter = FlopCounterMode(display=False)
        _add(counter.flop_registry, _cpu_attention())
        with counter:
            run()
    return counter.get_total_flops()
