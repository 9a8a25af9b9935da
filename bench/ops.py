"""Each op beside PyTorch: forward alone, and forward with backward, checked against eager first, then interleaved."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels import catalogue
from peakgpt.kernels.clock import Result, interleave
from peakgpt.kernels.device import peak_for
from peakgpt.kernels.dispatch import OPS, Op, use_backend

COLD_BYTES = 1 << 26  # inputs rotate through this much, so that none is found in a cache by luck
MAX_SETS = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative L2; only a wrong kernel is outside of it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=sorted(catalogue.__all__), help="repeatable; default all")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="repeatable; default both")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each dtype (default 120)")


def run(args: argparse.Namespace, device: torch.device) -> list[Result]:
    sizes = {name: {} for name in args.op} if args.op else None
    dtypes = [getattr(torch, d) for d in args.dtype or ("float32", "bfloat16")]
    return [r for dtype in dtypes for r in compare_ops(sizes, device, dtype, budget_s=args.seconds)]


def compare_ops(
    sizes: Mapping[str, Mapping[str, int]] | None,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    budget_s: float = 60.0,
    rounds: int = 30,
    extra: Callable[[Op], dict[str, Callable[..., Any]]] = lambda op: {},
) -> list[Result]:
    """Time ops beside eager.

    Args:
        sizes: op name -> sizes of its sample; None takes every op at GPT-2 124M's.
        device, dtype: of the inputs.
        budget_s: seconds in all, shared evenly.
        rounds: timings of each contender at most.
        extra: further contenders of an op, called as the op is.
    Returns:
        Results of "forward" and "forward+backward" with work FLOPs and bytes.
    Raises:
        ValueError: a contender's values are not eager's: nothing wrong is timed.
    """
    sizes = {name: {} for name in sorted(catalogue.__all__)} if sizes is None else sizes
    results = []
    for name, size in sizes.items():
        op = OPS[name]
        params = {**op.typical, **({"n_head": size["heads"]} if name == "attention_qkv" and "heads" in size else {})}
        calls = {"peakgpt": op, "eager": _eager(op), **extra(op)}
        passes = {"forward": _forward} if op.mutates else {"forward": _forward, "forward+backward": _both}
        for direction, make in passes.items():
            results += _time(op, size, params, calls, direction, make, torch.device(device), dtype,
                             budget_s / (len(sizes) * len(passes)), rounds)  # fmt: skip
    return results


def _eager(op: Op) -> Callable[..., Any]:
    def call(*tensors, **params):
        with use_backend("eager"):
            return op(*tensors, **params)

    return call


def _time(op, size, params, calls, direction, make, device, dtype, budget_s, rounds) -> list[Result]:
    sets = _sets(op, size, device, dtype)
    if not op.mutates:
        _check(op.name, sets[0], params, calls, make, dtype)
    cost, peak = op.cost(*sets[0], **params), peak_for(device, dtype)
    whole = direction != "forward"
    contenders = {name: make(call, itertools.cycle(sets), params) for name, call in calls.items()}
    timings = interleave(contenders, rounds=rounds, warmup=2, device=device, budget_s=budget_s)
    backends = {"peakgpt": next(b for b, reason in op.explain(*sets[0], **params).items() if reason is None)}
    return [
        Result.of(
            timing, bench="op", contender=name, backend=backends.get(name, "torch"), device=str(device),
            case={"op": op.name, "pass": direction, **size, **params}, dtype=str(dtype).removeprefix("torch."),
            flops=cost.flops + whole * cost.backward_flops, flops_kind="work",
            bytes=cost.bytes + whole * cost.backward_bytes,
            peak_flops_s=peak.flops_s, peak_bytes_s=peak.bandwidth_bytes_s, peak_source=peak.source,
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def _sets(op: Op, size: Mapping[str, int], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    first = op.sample(**size, device=device, dtype=dtype)
    held = sum(t.numel() * t.element_size() for t in first if t is not None)
    more = min(MAX_SETS - 1, COLD_BYTES // max(1, held))
    sets = [first, *(op.sample(**size, device=device, dtype=dtype) for _ in range(more))]
    return [
        tuple(t if op.mutates or t is None or not t.is_floating_point() else t.requires_grad_() for t in s)
        for s in sets
    ]


def _forward(call, sets: Iterator[tuple[Tensor, ...]], params) -> Callable[[], Any]:
    def run():
        with torch.no_grad():
            return call(*next(sets), **params)

    return run


def _both(call, sets: Iterator[tuple[Tensor, ...]], params) -> Callable[[], Any]:
    ups: list[Tensor] = []

    def run():
        tensors = next(sets)
        results = call(*tensors, **params)
        results = results if isinstance(results, tuple) else (results,)
        if not ups:
            ups.extend(torch.ones_like(r) if r.dim() == 0 else torch.randn_like(r) for r in results)
        return torch.autograd.grad(results, [t for t in tensors if t is not None and t.requires_grad], ups)

    return run


def _check(name, tensors, params, calls, make, dtype) -> None:
    found = {}
    for contender, call in calls.items():
        torch.manual_seed(0)  # the same upstream gradients
        results = make(call, itertools.repeat(tensors), params)()
        found[contender] = results if isinstance(results, tuple) else (results,)
    for contender, results in found.items():
        for ours, eager in zip(results, found["eager"], strict=True):
            error = ((ours.float() - eager.float()).norm() / eager.float().norm().clamp(min=1e-30)).item()
            if not error <= TOLERANCE[dtype]:
                raise ValueError(
                    f"{name}: {contender} is off eager by {error:.2g}, expected at most {TOLERANCE[dtype]}"
                )
