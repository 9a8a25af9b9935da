"""Each op versus PyTorch: forward, backward or both, checked against eager first: `peakgpt bench ops`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peakgpt.bench.agreement import expect_close
from peakgpt.bench.check import backends, double
from peakgpt.bench.contenders.op_peers import IN_PLACE, peers
from peakgpt.bench.environment import keep_pages_note
from peakgpt.bench.gpu_memory import peak_allocated_bytes
from peakgpt.bench.interleave import OnFailure, interleave, raise_failure
from peakgpt.bench.op_cases import PASSES, Inputs, OpCase, as_tuple, choose_cases, make_inputs, replayed
from peakgpt.bench.run_results import Emit, Unsupported, record_failures
from peakgpt.bench.schema import Result
from peakgpt.kernels.command_line import number
from peakgpt.kernels.core.dispatch import BACKENDS, OPS, Op, use_backend
from peakgpt.kernels.hardware.peaks import peak_for, stream_peak
from peakgpt.kernels.ops import catalogue

PRODUCTS = {"linear_q8": torch.int8, "linear_q4": torch.int8}  # ops whose peak is not that of their input dtype


Peers = Callable[[Op, torch.device], dict[str, Callable[..., Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=sorted(catalogue.__all__), help="repeatable; default all")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="repeatable; default both")
    parser.add_argument("--size", action="append", default=[], metavar="NAME=N",
                        help="such as tokens=1024; repeatable; defaults: GPT-2 124M at 4 x 256 tokens")  # fmt: skip
    parser.add_argument("--pass", action="append", dest="passes", choices=tuple(PASSES),
                        help="repeatable; default forward, and forward+backward if the op has a gradient")  # fmt: skip
    parser.add_argument("--seconds", type=number(), default=120.0, help="for each dtype (default 120)")


def run(args: argparse.Namespace, device: torch.device, emit: Emit) -> None:
    """Time the chosen ops. On a CPU all contenders use the allocator settings of peakgpt's Trainer, eager's fastest."""
    cases = choose_cases(args.op or sorted(catalogue.__all__), args.size, args.passes)
    note = keep_pages_note(device)
    for dtype in args.dtype or ("float32", "bfloat16"):
        for row in compare_ops(cases, device, getattr(torch, dtype), budget_s=args.seconds, peers=peers,
                               on_failure=record_failures(emit)):  # fmt: skip
            emit(row.noted(note))


def compare_ops(
    cases: Sequence[OpCase],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    budget_s: float = 60.0,
    rounds: int = 30,
    peers: Peers = lambda op, device: {},
    on_failure: OnFailure = raise_failure,
) -> Iterator[Result]:
    """Time ops versus eager, one after the other.

    Args:
        cases: ops and sizes; each is timed in all its passes.
        device, dtype: of the inputs.
        budget_s: seconds for all cases, shared evenly.
        rounds: maximum number of timings of each contender.
        peers: see `compare`.
        on_failure: called with a contender that raises or has wrong values, or with a case that cannot be timed; all
            other rows are measured.
    Yields:
        Results with work FLOPs and bytes.
    Raises:
        ValueError: by default, if our values differ from eager's.
    """
    todo = [(case, direction) for case in cases for direction in case.directions]
    for case, direction in todo:
        try:
            yield from compare(case, direction, device, dtype, budget_s=budget_s / len(todo), rounds=rounds,
                               peers=peers, on_failure=on_failure)  # fmt: skip
        except Exception as error:
            on_failure(f"peakgpt {case.op} {direction}", error)


def compare(
    case: OpCase,
    direction: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    budget_s: float,
    rounds: int = 30,
    peers: Peers = lambda op, device: {},
    on_failure: OnFailure = raise_failure,
) -> list[Result]:
    """Time one pass of one case.

    Args:
        direction: one of PASSES.
        budget_s: seconds, including the check; see `interleave`.
        peers: more contenders, with the arguments of the op.
        on_failure: called with a contender that raises or whose values differ from eager's; the others are timed.
    Returns:
        A result for each contender: "peakgpt" as dispatched, "peakgpt, NAME" for each other backend, "eager", peers.
    Raises:
        ValueError: by default, if the values of a contender differ from eager's.
    """
    start = time.perf_counter()
    op, device, params = OPS[case.op], torch.device(device), case.arguments
    make, forward, backward = PASSES[direction]
    sets = make_inputs(case, device, dtype)
    tensors = sets[0][0]
    reasons = op.explain(*tensors, **params)
    chosen = {"peakgpt": next(b for b, reason in reasons.items() if reason is None)}
    fell_back = [f"{op.name}: eager ran as peakgpt, {b} objects: {reasons[b]}"
                 for b, home in BACKENDS.items() if chosen["peakgpt"] == "eager" and home == device.type]  # fmt: skip
    chosen |= {f"peakgpt, {b}": b for b in backends(op, tensors, params) if b != chosen["peakgpt"]}
    calls = {"peakgpt": op, "eager": _forced(op, "eager")}
    calls |= {name: _forced(op, backend) for name, backend in chosen.items() if name not in calls}
    calls |= IN_PLACE.get(op.name, {}) | peers(op, device)
    small = sets if case.checked is None else make_inputs(replace(case, sizes=case.checked), device, dtype)
    calls = _right(op, calls, make, small[0], params, dtype, on_failure)
    if case.checked is not None or op.mutates:  # for an in-place op eager is only the reference
        calls.pop("eager", None)
    contenders = {name: make(call, sets, params) for name, call in calls.items()}
    left_s = max(0.0, budget_s - (time.perf_counter() - start))  # the check includes all compilation
    timings = interleave(contenders, rounds=rounds, warmup=2, device=device, budget_s=left_s,
                         on_failure=on_failure)  # fmt: skip
    if make is replayed and device.type == "cuda":
        timings = {name: timing.each(len(sets)) for name, timing in timings.items()}
    cost, peak = op.cost(*tensors, **params), peak_for(device, PRODUCTS.get(op.name, dtype))
    written = forward * cost.written + backward * cost.backward_written
    read = forward * cost.bytes + backward * cost.backward_bytes - written
    # Every call reads another input set, but the allocator reuses the memory of the outputs.
    touched = len(sets) * read + (0 if op.mutates else written)
    updated = min(read, written) if op.mutates else 0
    ceiling, streams = stream_peak(device, read, written, touched, updated_bytes=updated)
    return [
        Result.of(
            timing.noted(*fell_back if name == "peakgpt" else ()), bench="op", contender=name,
            backend=chosen.get(name, "liger" if name == "liger" else "torch"),
            device=str(device), case={"op": op.name, "pass": direction, **case.sizes, **params},
            dtype=str(dtype).removeprefix("torch."),
            flops=forward * cost.flops + backward * cost.backward_flops, flops_kind="work",
            bytes=read + written, memory_bytes=peak_allocated_bytes(contenders[name], device),
            peak_flops_s=peak.flops_s, peak_bytes_s=ceiling, peak_source=f"{peak.source}; bytes: {streams}",
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def _forced(op: Op, backend: str) -> Callable[..., Any]:
    def call(*tensors, **params):
        with use_backend(backend):
            return op(*tensors, **params)

    return call


# ---- the check before the timing


def _right(op: Op, calls, make, inputs: Inputs, params, dtype, on_failure: OnFailure) -> dict[str, Callable[..., Any]]:
    """Return the contenders whose values are eager's or closer to float64; call on_failure for the others."""
    eager = calls["eager"]
    reference, right = _values(op, eager, make, inputs, params), {}
    truth = None if op.mutates else lambda: _values(op, eager, make, tuple(map(double, inputs)), params)
    for name, call in calls.items():
        try:
            expect_close(f"{op.name}: {name}", _values(op, call, make, inputs, params), reference, dtype, truth)
            right[name] = call
        except Unsupported:
            continue
        except Exception as error:  # a failing peer must not prevent the timing of the others
            on_failure(name, error)
    return right


def _values(op: Op, call, make, inputs: Inputs, params) -> tuple[Tensor, ...]:
    if not op.mutates:
        return as_tuple(make(call, [inputs], params)())
    copies = [None if t is None else t.clone() for t in inputs[0]]
    call(*copies, **params)
    named = zip(op.tensor_names, copies, strict=False)
    return tuple(t for name, t in named if name in op.mutates and t is not None)
