"""Check an op against float64, by one rule for the tests and for `bench device`.

    |ours - truth| <= 2 |torch - truth| + floor * |truth|        |.| is the largest absolute value of a result

`truth` is the eager function of the op in float64, and `torch` the same function in the dtype of the op. The rule holds
for every output, for every gradient under random upstream gradients, and for every tensor that an op changes in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.core.dispatch import BACKENDS, OPS, Op, use_backend
from peakgpt.kernels.ops import catalogue  # noqa: F401  fills OPS
from peakgpt.kernels.ops.adamw import join

# Relative to the largest value: a few ulp of float32, half an ulp of the other dtypes.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}

# Names of floating-point tensors without a gradient, by op.
CONSTANT = {"rotary": ("cos", "sin"), "attention_qkv": ("cos", "sin"), "linear_cross_entropy": ("weight",)}


def sample(
    name: str, sizes: Mapping[str, int | None], dtype: torch.dtype, device: torch.device | str = "cpu", *,
    grad: bool = True,
) -> list[Tensor | None]:  # fmt: skip
    """Return the tensors of a call from a fixed seed. Floating-point ones require grad if the op has a backward."""
    grad = grad and OPS[name].gradient
    torch.manual_seed(len(name) + sum(v for v in sizes.values() if v))
    tensors = OPS[name].sample(**sizes, dtype=dtype, device=device)
    constant = CONSTANT.get(name, ())
    return [
        leaf(t) if grad and t is not None and t.is_floating_point() and n not in constant else t
        for n, t in zip(OPS[name].tensor_names, tensors, strict=False)
    ]


def leaf(tensor: Tensor) -> Tensor:
    """Return a copy that requires a gradient."""
    return tensor.detach().clone().requires_grad_()


def double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the tensors in float64."""
    return [
        t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for t in tensors
    ]


def run(backend: str, op: Callable[..., Any], tensors: Sequence[Tensor | None], params: Mapping[str, Any]):
    """Return the outputs, then the gradient of each input that requires one. Upstream gradients have a fixed seed."""
    with use_backend(backend):
        results = op(*tensors, **params)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    ups = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return [*results, *(torch.autograd.grad(results, leaves, ups) if leaves else ())]


def run_mutating(backend: str, op: Op, tensors: Sequence[Tensor | None], params: Mapping[str, Any]) -> list[Tensor]:
    """Run the op on copies of `tensors` and return the copies that it changed."""
    copies = [None if t is None else t.detach().clone() for t in tensors]
    with use_backend(backend):
        op(*copies, **params)
    named = zip(op.tensor_names, join_master(op, copies), strict=False)
    return [t for name, t in named if name in op.mutates and t is not None]


def join_master(op: Op, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Join `param` and `remainder` to float32 among the tensors: the rule holds for both together, not for each."""
    named = dict(zip(op.tensor_names, tensors, strict=False))
    if named.get("remainder") is not None:
        named |= {"param": join(named["param"], named["remainder"]), "remainder": None}
    return list(named.values())


@dataclass(frozen=True)
class Verdict:
    """Errors of one result, ours and of torch, against float64, and the limit of ours: largest absolute values."""

    error: float
    torch_error: float
    limit: float
    finite: bool

    @property
    def passed(self) -> bool:
        return self.finite and self.error <= self.limit

    def __str__(self) -> str:
        finite = "" if self.finite else ", not finite"
        return f"error {self.error:.3e}, torch's {self.torch_error:.3e}, limit {self.limit:.3e}{finite}"


def judge(
    ours: Sequence[Tensor], torch_results: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> list[Verdict]:
    """Apply the rule to each result.

    Raises:
        ValueError: a shape differs from that of the truth, or a dtype from that of torch.
    """
    verdicts = []
    for i, (a, b, t) in enumerate(zip(ours, torch_results, truth, strict=True)):
        if a.shape != t.shape or a.dtype != b.dtype:
            raise ValueError(f"result {i}: got {tuple(a.shape)} {a.dtype}, expected {tuple(t.shape)} {b.dtype}")
        error, allowed, largest = (
            x.abs().max().item() if x.numel() else 0.0 for x in (a.double() - t, b.double() - t, t)
        )
        finite = bool(torch.isfinite(a).all() or not torch.isfinite(t).all())
        verdicts.append(Verdict(error, allowed, 2 * allowed + FLOOR[dtype] * largest, finite))
    return verdicts


@dataclass(frozen=True, kw_only=True)
class Check:
    """One case on one backend. The errors are those of the result with the largest error relative to its limit."""

    op: str
    case: dict[str, Any]
    backend: str
    device: str
    dtype: str
    passed: bool
    error: float | None
    torch_error: float | None
    limit: float | None
    message: str = ""


def backends(op: Op, tensors: Sequence[Tensor | None], params: Mapping[str, Any]) -> list[str]:
    """Return the backends of this device that accept the call when forced."""
    accepting = []
    for name, home in BACKENDS.items():
        with use_backend(name):
            if home == tensors[0].device.type and op.explain(*tensors, **params)[name] is None:
                accepting.append(name)
    return accepting


def check(
    name: str, sizes: Mapping[str, int | None], params: Mapping[str, Any], dtype: torch.dtype,
    device: torch.device | str,
) -> list[Check]:  # fmt: skip
    """Check one case on every backend that accepts it: the error rule, and equal bits in two runs."""
    op = OPS[name]
    tensors = sample(name, sizes, dtype, device, grad=op.gradient)
    execute = run_mutating if op.mutates else run
    truth = execute("eager", op, double(join_master(op, tensors)), params)
    torch_results = execute("eager", op, tensors, params)
    checks = []
    for backend in backends(op, tensors, params):
        ours = execute(backend, op, tensors, params)
        verdicts = judge(ours, torch_results, truth, dtype)
        worst = max(verdicts, key=lambda v: (not v.passed, v.error / v.limit if v.limit else 0.0))
        faults = [f"result {i}: {v}" for i, v in enumerate(verdicts) if not v.passed]
        if not all(torch.equal(a, b) for a, b in zip(ours, execute(backend, op, tensors, params), strict=True)):
            faults.append("a second run gave different bits")
        checks.append(
            Check(
                op=name, case={**sizes, **params}, backend=backend, device=str(device),
                dtype=str(dtype).removeprefix("torch."), passed=not faults, error=_number(worst.error),
                torch_error=_number(worst.torch_error), limit=_number(worst.limit), message="; ".join(faults),
            )
        )  # fmt: skip
    return checks


def _number(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON lacks."""
    return value if abs(value) < float("inf") else None
