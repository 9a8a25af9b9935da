"""Each op beside PyTorch: forward, backward, or both, checked against eager first, then interleaved."""

from __future__ import annotations

import argparse
import inspect
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peakgpt.bench.check import backends
from peakgpt.bench.findings import Findings, NotTaken
from peakgpt.bench.peers import IN_PLACE, peers
from peakgpt.kernels.core.dispatch import BACKENDS, OPS, Op, use_backend
from peakgpt.kernels.cpu.memory import keep_pages
from peakgpt.kernels.hardware.clock import Result, interleave
from peakgpt.kernels.hardware.device import peak_for, stream_peak
from peakgpt.kernels.ops import catalogue

MAX_SETS = 8
PRODUCTS = {"linear_q8": torch.int8, "linear_q4": torch.int8}  # whose peak is not that of their inputs' dtype
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative L2; only a wrong kernel is outside of it

OnFailure = Callable[[str, Exception], None]  # contender, what it raised


Peers = Callable[[Op, torch.device], dict[str, Callable[..., Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=sorted(catalogue.__all__), help="repeatable; default all")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="repeatable; default both")
    parser.add_argument("--size", action="append", default=[], metavar="NAME=N",
                        help="as tokens=1024; repeatable, the others are GPT-2 124M's at 4 x 256 tokens")  # fmt: skip
    parser.add_argument("--pass", action="append", dest="passes", choices=tuple(PASSES),
                        help="repeatable; default forward, and forward+backward where there is a gradient")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=120.0, help="for each dtype (default 120)")


def run(args: argparse.Namespace, device: torch.device) -> Findings:
    """On a CPU all contenders run under the allocator that peakgpt trains with, which is eager's at its best."""
    cases = choose_cases(args.op or sorted(catalogue.__all__), args.size, args.passes)
    reason = keep_pages() if device.type == "cpu" else None
    found = Findings()
    for dtype in args.dtype or ("float32", "bfloat16"):
        found.results += compare_ops(cases, device, getattr(torch, dtype), budget_s=args.seconds, peers=peers)
    if device.type == "cpu":
        said = f"the allocator is left as it is: {reason}" if reason else "freed memory is kept, for every contender"
        found.results = [replace(r, note="; ".join(filter(None, [r.note, said]))) for r in found.results]
    return found


def choose_cases(ops: Sequence[str], sizes: Sequence[str] = (), passes: Sequence[str] | None = None) -> list[Case]:
    """Read what was asked for.

    Args:
        ops: names.
        sizes: "NAME=N", for every op.
        passes: keys of PASSES; None means those of Case.
    Raises:
        ValueError: a size that an op does not have, or that is no positive number.
    """
    chosen = {}
    for size in sizes:
        name, _, value = size.partition("=")
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"bench ops: got --size {size!r}, expected NAME=N with N at least 1")
        chosen[name] = int(value)
    for op in ops:
        known = [n for n, p in inspect.signature(OPS[op].sample).parameters.items() if p.kind != p.VAR_KEYWORD]
        if unknown := [name for name in chosen if name not in known]:
            raise ValueError(f"bench ops: got size {unknown[0]!r} for {op}, expected {', '.join(known)}")
    return [Case(op, chosen, passes=tuple(passes) if passes else None) for op in ops]


@dataclass(frozen=True)
class Case:
    """An op at one size.

    Args:
        op: its name.
        sizes: of its sample; what is left out is GPT-2 124M's at 4 x 256 tokens.
        params: parameters beside the op's typical ones.
        passes: which directions are timed; None means forward, and both where the op has a gradient.
        checked: sizes at which the values are compared, where eager does not fit at `sizes`; it is then not timed.
    """

    op: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    passes: tuple[str, ...] | None = None
    checked: Mapping[str, int] | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        return self.passes or (("forward",) if not OPS[self.op].gradient else ("forward", "forward+backward"))

    @property
    def arguments(self) -> dict[str, Any]:
        """Every parameter that differs from the op's defaults."""
        packed = {"n_head": self.sizes["heads"]} if self.op == "attention_qkv" and "heads" in self.sizes else {}
        return {**OPS[self.op].typical, **packed, **self.params}


def compare_ops(
    cases: Sequence[Case],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    budget_s: float = 60.0,
    rounds: int = 30,
    peers: Peers = lambda op, device: {},
) -> list[Result]:
    """Time ops beside eager.

    Args:
        cases: what is timed, in every direction of theirs.
        device, dtype: of the inputs.
        budget_s: seconds in all, shared evenly.
        rounds: timings of each contender at most.
        peers: see `compare`.
    Returns:
        Results with work FLOPs and bytes.
    Raises:
        ValueError: our values are not eager's: nothing wrong is timed.
    """
    todo = [(case, direction) for case in cases for direction in case.directions]
    return [
        result
        for case, direction in todo
        for result in compare(case, direction, device, dtype, budget_s=budget_s / len(todo), rounds=rounds, peers=peers)
    ]


def raise_it(contender: str, error: Exception) -> None:
    """What happens by default when a contender fails."""
    raise error


def compare(
    case: Case,
    direction: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    budget_s: float,
    rounds: int = 30,
    peers: Peers = lambda op, device: {},
    on_failure: OnFailure = raise_it,
) -> list[Result]:
    """Time one direction of one case.

    Args:
        direction: one of PASSES.
        budget_s: seconds, the check included; see `clock.interleave`.
        peers: further contenders, called as the op is.
        on_failure: told of a contender that raises or gives other values than eager; the others are timed.
    Returns:
        A result a contender: "peakgpt" as dispatched, "peakgpt, NAME" for a further backend forced, "eager", peers.
    Raises:
        ValueError: by default, a contender's values are not eager's.
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
    if case.checked is not None or op.mutates:  # of an op in place eager is the reference, not what people run
        del calls["eager"]
    contenders = {name: make(call, sets, params) for name, call in calls.items()}
    left_s = max(0.0, budget_s - (time.perf_counter() - start))  # the check has compiled what there is to compile
    timings = interleave(contenders, rounds=rounds, warmup=2, device=device, budget_s=left_s)
    if make is _replayed and device.type == "cuda":
        timings = {name: timing.each(len(sets)) for name, timing in timings.items()}
    cost, peak = op.cost(*tensors, **params), peak_for(device, PRODUCTS.get(op.name, dtype))
    written = forward * cost.written + backward * cost.backward_written
    read = forward * cost.bytes + backward * cost.backward_bytes - written
    # Every call reads another set; what it writes the allocator gives out again.
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
            bytes=read + written, memory_bytes=allocated(contenders[name], device),
            peak_flops_s=peak.flops_s, peak_bytes_s=ceiling, peak_source=f"{peak.source}; bytes: {streams}",
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def allocated(fn: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that a call holds beyond what was there before it; None where torch does not count."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    return torch.cuda.max_memory_allocated(device) - before


def _forced(op: Op, backend: str) -> Callable[..., Any]:
    def call(*tensors, **params):
        with use_backend(backend):
            return op(*tensors, **params)

    return call


# ---- inputs: random, and more of them than a cache holds

Inputs = tuple[tuple[Tensor | None, ...], list[Tensor]]  # tensors of a call, upstream gradients of its results


def _cold_bytes(device: torch.device) -> int:
    """What inputs rotate through, so that none is found in a cache by luck: twice the last-level cache, or 64 MiB."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(2 * cache, 1 << 26)


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> list[Inputs]:
    """Up to MAX_SETS sets of a case's inputs, for PASSES; floating ones want gradients where the op has any."""
    first = _inputs(case, device, dtype)
    held = sum(t.numel() * t.element_size() for t in (*first[0], *first[1]) if t is not None)
    more = min(MAX_SETS - 1, _cold_bytes(device) // max(1, held))
    return [first, *(_inputs(case, device, dtype) for _ in range(more))]


def _inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    op = OPS[case.op]
    tensors = op.sample(**case.sizes, device=device, dtype=dtype)
    bound, params = op.bind(tensors, case.arguments)
    outputs, _ = op.alloc(*bound, needs=(False,) * len(bound), **params)
    ups = [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in outputs]
    if op.gradient:
        tensors = tuple(t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors)
    return tensors, ups


# ---- what is timed: each makes a function without arguments of a call and its sets of inputs


def _forward(call, sets: Sequence[Inputs], params) -> Callable[[], Any]:
    turn = itertools.cycle(sets)

    def run():
        tensors, _ = next(turn)
        with torch.no_grad():
            return call(*tensors, **params)

    return run


def _replayed(call, sets: Sequence[Inputs], params) -> Callable[[], Any]:
    """Forward of every set in one CUDA graph: a kernel of a few microseconds is shorter than what a launch takes."""
    if sets[0][0][0].device.type != "cuda":
        return _forward(call, sets, params)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        for tensors, _ in sets:  # what compiles or allocates once can not be recorded
            call(*tensors, **params)
        with torch.cuda.graph(graph):
            for tensors, _ in sets:
                results = call(*tensors, **params)

    def run():
        graph.replay()
        return results

    return run


def _both(call, sets: Sequence[Inputs], params) -> Callable[[], Any]:
    turn = itertools.cycle(sets)

    def run():
        tensors, ups = next(turn)
        return torch.autograd.grad(_tuple(call(*tensors, **params)), _wanted(tensors), ups)

    return run


def _backward(call, sets: Sequence[Inputs], params) -> Callable[[], Any]:
    turn = itertools.cycle([(_tuple(call(*tensors, **params)), _wanted(tensors), ups) for tensors, ups in sets])
    return lambda: torch.autograd.grad(*next(turn), retain_graph=True)


PASSES = {"forward": (_forward, 1, 0), "replayed": (_replayed, 1, 0), "backward": (_backward, 0, 1),
          "forward+backward": (_both, 1, 1)}  # fmt: skip


def _tuple(results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _wanted(tensors) -> list[Tensor]:
    return [t for t in tensors if t is not None and t.requires_grad]


# ---- the check before the timing


def _right(op: Op, calls, make, inputs: Inputs, params, dtype, on_failure: OnFailure) -> dict[str, Callable[..., Any]]:
    """The contenders whose values are eager's; the others go to on_failure."""
    reference, right = _values(op, calls["eager"], make, inputs, params), {}
    for name, call in calls.items():
        try:
            agree(f"{op.name}: {name}", _values(op, call, make, inputs, params), reference, dtype)
            right[name] = call
        except NotTaken:
            continue
        except Exception as error:  # whatever a peer does must not keep the others from being measured
            on_failure(name, error)
    return right


def _values(op: Op, call, make, inputs: Inputs, params) -> tuple[Tensor, ...]:
    if not op.mutates:
        return _tuple(make(call, [inputs], params)())
    copies = [None if t is None else t.clone() for t in inputs[0]]
    call(*copies, **params)
    named = zip(op.tensor_names, copies, strict=False)
    return tuple(t for name, t in named if name in op.mutates and t is not None)


def agree(who: str, ours: Sequence[Tensor], reference: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Compare results one by one.

    Raises:
        ValueError: one is further off than TOLERANCE, or not finite.
    """
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        error = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item()
        if not error <= TOLERANCE[dtype]:
            raise ValueError(f"{who}: result {i} is off eager by {error:.2g}, expected at most {TOLERANCE[dtype]}")
