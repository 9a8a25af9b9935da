"""Each op versus PyTorch: forward, backward or both, checked against eager first: `peakgpt bench ops`."""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peakgpt.bench.agreement import expect_close
from peakgpt.bench.case import Case, joined, sizes_text
from peakgpt.bench.check import backends, double
from peakgpt.bench.contenders.op_peers import IN_PLACE, peers
from peakgpt.bench.environment import keep_pages_note
from peakgpt.bench.gpu_memory import peak_allocated_bytes
from peakgpt.bench.interleave import OnFailure, interleave
from peakgpt.bench.op_passes import PASSES, Inputs, as_tuple, make_inputs, replayed, sample
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.run_results import OURS
from peakgpt.bench.schema import Result
from peakgpt.kernels.core.dispatch import BACKENDS, OPS, Op, use_backend
from peakgpt.kernels.hardware.peaks import Streams, rated_peaks
from peakgpt.kernels.ops import catalogue

PRODUCTS = dict.fromkeys(("linear_grouped", "linear_q8", "linear_q4"), "int8")  # not the peak of their inputs' dtype
SECONDS = 20.0  # of a case; the check and compilations come first, up to 15 s with torch.compile on 2 cores

Call = Callable[..., Any]


@dataclass(frozen=True)
class OpCase(Case):
    """One pass of an op at one size.

    On a CPU all contenders use the allocator settings of peakgpt's Trainer, with which eager is fastest.

    Args:
        op: name of the op.
        direction: key of PASSES.
        dtype: of the inputs.
        sizes: arguments of its `sample`; defaults are those of GPT-2 124M at 4 x 256 tokens.
        params: parameters in addition to the typical ones of the op.
        checked: sizes at which values are compared if eager does not fit at `sizes`; eager is then not timed.
    """

    kind: ClassVar[str] = "ops"
    op: str
    direction: str = "forward"
    dtype: str = "float32"
    sizes: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    checked: Mapping[str, int] | None = None

    @property
    def name(self) -> str:
        return joined(self.kind, self.op, sizes_text({**self.sizes, **self.params}), self.direction, self.dtype)

    @property
    def arguments(self) -> dict[str, Any]:
        """Parameters that differ from the defaults of the op."""
        packed = {"n_head": self.sizes["heads"]} if "n_head" in OPS[self.op].typical and "heads" in self.sizes else {}
        return {**OPS[self.op].typical, **packed, **self.params}

    def all_contenders(self, device: torch.device) -> list[str]:
        """Return "peakgpt" as dispatched, "peakgpt, NAME" for each other backend, "eager", and the peers."""
        with FakeTensorMode():  # a backend reads shapes, dtypes and strides only
            tensors = sample(self.op, self.sizes, device, self._torch_dtype)
            return list(self._calls(tensors, device))

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        start = time.perf_counter()
        note = keep_pages_note(device)
        op, params, make = OPS[self.op], self.arguments, PASSES[self.direction][0]
        sets = make_inputs(self.op, self.sizes, params, device, self._torch_dtype)
        calls = self._calls(sets[0][0], device)
        chosen = {name: call for name, (call, _) in calls.items() if self.only is None or name in self.only}
        right = _right(op, chosen, make, self._checked_inputs(sets, device), params, self._torch_dtype, on_failure)
        contenders = {name: make(call, sets, params) for name, call in right.items()}
        if not contenders:
            return []
        work, peaks = self._work(sets, device)
        timings = interleave(contenders, rounds=self.rounds, warmup=2, device=device, budget_s=self.left_s(start),
                             peaks=peaks, on_failure=on_failure)  # fmt: skip
        if make is replayed and device.type == "cuda":
            timings = {name: timing.each(len(sets)) for name, timing in timings.items()}
        notes = {OURS: (note, *self._objections(sets[0][0], device))}
        return [
            Result.of(
                timing.noted(*notes.get(name, (note,))), bench="op", contender=name, backend=calls[name][1],
                device=str(device), case={"op": op.name, "pass": self.direction, **self.sizes, **params},
                dtype=self.dtype, peak_dtype=PRODUCTS.get(op.name), **work,
                memory_bytes=peak_allocated_bytes(contenders[name], device),
            )
            for name, timing in timings.items()
        ]  # fmt: skip

    @property
    def _torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def _calls(self, tensors: Sequence[Tensor | None], device: torch.device) -> dict[str, tuple[Call, str]]:
        """Return name -> (function with the arguments of the op, backend) of every contender."""
        op, params = OPS[self.op], self.arguments
        ours = next(backend for backend, reason in op.explain(*tensors, **params).items() if reason is None)
        calls: dict[str, tuple[Call, str]] = {OURS: (op, ours)}
        for backend in backends(op, tensors, params):
            if backend != ours:
                calls[f"{OURS}, {backend}"] = (_forced(op, backend), backend)
        if self.checked is None and not op.mutates:  # for an in-place op eager is only the reference
            calls["eager"] = (_forced(op, "eager"), "torch")
        others = IN_PLACE.get(op.name, {}) | peers(op, device)
        return calls | {name: (call, "liger" if name == "liger" else "torch") for name, call in others.items()}

    def _objections(self, tensors: Sequence[Tensor | None], device: torch.device) -> list[str]:
        """Return the reason of each backend of this device if eager runs as peakgpt."""
        reasons = OPS[self.op].explain(*tensors, **self.arguments)
        if next(backend for backend, reason in reasons.items() if reason is None) != "eager":
            return []
        return [f"{self.op}: eager ran as peakgpt, {backend} objects: {reasons[backend]}"
                for backend, home in BACKENDS.items() if home == device.type]  # fmt: skip

    def _checked_inputs(self, sets: Sequence[Inputs], device: torch.device) -> Inputs:
        if self.checked is None:
            return sets[0]
        return make_inputs(self.op, self.checked, self.arguments, device, self._torch_dtype)[0]

    def _work(self, sets: Sequence[Inputs], device: torch.device) -> tuple[dict[str, Any], PeakMeter]:
        """Return work FLOPs and bytes of a call as fields of Result, and the meter of what they are divided by."""
        op, (_, forward, backward) = OPS[self.op], PASSES[self.direction]
        cost = op.cost(*sets[0][0], **self.arguments)
        written = forward * cost.written + backward * cost.backward_written
        read = forward * cost.bytes + backward * cost.backward_bytes - written
        # Every call reads another input set, but the allocator reuses the memory of the outputs.
        touched = len(sets) * read + (0 if op.mutates else written)
        streams = Streams.of(read, written, touched, updated_bytes=min(read, written) if op.mutates else 0)
        rated = rated_peaks(device) is not None  # measuring would add nothing, and `bench device` has little time
        peaks = PeakMeter(device) if rated else PeakMeter(device, [PRODUCTS.get(op.name, self.dtype)], streams=streams)
        flops = forward * cost.flops + backward * cost.backward_flops
        return {"flops": flops, "flops_kind": "work", "bytes": read + written}, peaks


# ---- the cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=sorted(catalogue.__all__), help="repeatable; default all")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="repeatable; default both")
    parser.add_argument("--size", action="append", default=[], metavar="NAME=N",
                        help="such as tokens=1024; repeatable; defaults: GPT-2 124M at 4 x 256 tokens")  # fmt: skip
    parser.add_argument("--pass", action="append", dest="passes", choices=tuple(PASSES),
                        help="repeatable; default forward, and forward+backward if the op has a gradient")  # fmt: skip


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    ops = args.op or sorted(catalogue.__all__)
    sizes = _parse_sizes(ops, args.size)
    return op_cases(
        dict.fromkeys(ops, sizes), args.dtype or ("float32", "bfloat16"), args.passes, rounds=30, seconds=SECONDS
    )


def op_cases(
    sizes: Mapping[str, Mapping[str, int]], dtypes: Iterable[str], passes: Sequence[str] | None = None, **fields: Any
) -> list[Case]:
    """Return a case for each op, dtype and pass.

    Args:
        sizes: name of an op -> its sizes.
        dtypes: of the inputs.
        passes: keys of PASSES; None means forward, and forward+backward if the op has a gradient.
        fields: further fields of OpCase.
    """
    return [
        OpCase(op=op, direction=direction, dtype=dtype, sizes=op_sizes, **fields)
        for dtype in dtypes
        for op, op_sizes in sizes.items()
        for direction in passes or (("forward", "forward+backward") if OPS[op].gradient else ("forward",))
    ]


def _parse_sizes(ops: Iterable[str], sizes: Sequence[str]) -> dict[str, int]:
    """Parse "NAME=N", applied to every op.

    Raises:
        ValueError: an op does not have that size, or it is not a positive number.
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
    return chosen


def _forced(op: Op, backend: str) -> Call:
    def call(*tensors, **params):
        with use_backend(backend):
            return op(*tensors, **params)

    return call


# ---- the check before the timing


def _right(op: Op, calls: Mapping[str, Call], make, inputs: Inputs, params, dtype, on_failure: OnFailure
           ) -> dict[str, Call]:  # fmt: skip
    """Return the contenders whose values are eager's or closer to float64; call on_failure for the others."""
    eager, right = _forced(op, "eager"), {}
    reference = _values(op, eager, make, inputs, params)
    truth = None if op.mutates else lambda: _values(op, eager, make, tuple(map(double, inputs)), params)
    for name, call in calls.items():
        try:
            expect_close(f"{op.name}: {name}", _values(op, call, make, inputs, params), reference, dtype, truth)
            right[name] = call
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
