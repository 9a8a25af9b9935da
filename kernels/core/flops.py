"""FLOP formulas of all ops for torch's FlopCounterMode, under which a call runs as a library op.

An op counts as its eager function does on the same device: the matrix products that the call or its gradients need, 2
FLOPs for each multiplication with its addition. Elementwise work counts nothing, and causal attention counts all T x S
pairs, as in torch. The cost of a contract differs: it counts elementwise work too, and live pairs only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from peakgpt.kernels.core.autograd import autograd_keys
from peakgpt.kernels.core.spec import OpSpec, Params, Tensors

Call = tuple[Tensors, Params]


def register_cpu_attention() -> None:
    """Register the formulas of torch's own attention on CPUs: torch 2.13 has them for CUDA only, and counts 0."""

    def pairs(q: Sequence[int], k: Sequence[int]) -> int:
        return q[0] * q[1] * q[2] * k[2]

    def forward(q, k, v, *_: Any, **__: Any) -> int:  # (B, H, T, D), (B, K, S, D), (B, K, S, D)
        return 2 * pairs(q, k) * (q[3] + v[3])

    def backward(dy, q, k, v, *_: Any, **__: Any) -> int:  # 5 products, 1 of them recomputed
        return 2 * pairs(q, k) * (3 * q[3] + 2 * v[3])

    name = "_scaled_dot_product_flash_attention_for_cpu"
    for packet, formula in ((name, forward), (f"{name}_backward", backward)):
        target = getattr(torch.ops.aten, packet)
        if target not in flop_registry:
            register_flop_formula(target)(formula)


def register_forward(op: OpSpec, call: Callable[..., Call]) -> None:
    """Register the formula of `torch.ops.peakgpt.<op>`. call: the op's arguments -> (tensors, parameters)."""

    def formula(*args: Any, **_: Any) -> int:
        tensors, params = call(*args)
        params = {**params, **op.counted_as}
        if op.matmul_flops:
            return op.matmul_flops(*tensors, **params)
        return _count(lambda inputs: lambda: op.run_eager(inputs, params), tensors)

    register_flop_formula(getattr(torch.ops.peakgpt, op.name), get_raw=True)(formula)


def register_backward(op: OpSpec) -> None:
    """Register the formula of `torch.ops.peakgpt.<op>_backward`."""

    def formula(grads, inputs, outputs, saved, *rest: Any, **_: Any) -> int:
        *values, _, needs = rest
        params = dict(zip(op.param_names, values, strict=True)) | op.counted_as
        return _count(lambda leaves: _backward(op, leaves, params, grads, needs), inputs)

    register_flop_formula(getattr(torch.ops.peakgpt, f"{op.name}_backward"), get_raw=True)(formula)


def _backward(
    op: OpSpec, inputs: Tensors, params: Params, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> Callable[[], Any]:
    """Run the eager function, and return a function that computes its gradients."""
    leaves = [t.requires_grad_() for t, need in zip(inputs, needs, strict=True) if need]
    with torch.enable_grad():
        results = op.run_eager(inputs, params)
    results = results if len(op.outputs) > 1 else (results,)
    used = [r for r, g in zip(results, grads, strict=True) if g is not None]
    return lambda: torch.autograd.grad(used, leaves, [torch.empty_like(r) for r in used], allow_unused=True)


def _count(prepare: Callable[[Tensors], Callable[[], Any]], tensors: Tensors) -> int:
    """Return the FLOPs of prepare(fake copies of the tensors)()."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second, so not when peakgpt is imported

    with autograd_keys(), FakeTensorMode():
        run = prepare([None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors])
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops()
