"""A step recorded once and replayed: no Python between its kernels, and nothing in it waits for the host.

    calls 1 .. WARMUP      run as they are: libraries set themselves up, kernels compile
    the next one           recorded over tensors that stay where they are, and replayed
    later ones             inputs copied to where the recording reads them, replayed, results copied out

What differs from call to call must come from device memory: batches, the learning rate, step counts, random seeds.
Where a step can not be recorded, `obstacle` says why and every call runs as it is. On a CPU there is nothing to record;
`Rehearsal` stands in there: it runs the step again where a graph would be replayed, and fails where a graph would not
be possible, or would silently go on with values of the call that was recorded.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

WARMUP = 2  # one is not enough: the second step is the first one that finds the optimizer's state made

Function = Callable[..., Sequence[Tensor]]


class Recorder(Protocol):
    """Records a function without arguments, and replays it."""

    def warm(self, body: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Run it as it is, where it will be recorded."""

    def record(self, body: Callable[[], Sequence[Tensor]]) -> None:
        """Record it; it need not run."""

    def replay(self) -> Sequence[Tensor]:
        """Run what was recorded; the results are overwritten by the next replay."""


class Captured:
    """A function of tensors that is recorded after a few calls."""

    def __init__(self, function: Function, recorder: Callable[[], Recorder] | None, fixed: Callable[[], Any], *,
                 copies: bool = True):  # fmt: skip
        """
        Args:
            function: takes tensors, returns a sequence of tensors.
            recorder: makes one for the device that they are on; None where there is none.
            fixed: tells what a recording takes as it is, such as addresses; where that has changed it is made anew.
            copies: whether results are copied out of the recording; else a later replay overwrites them.
        """
        self.function, self.make, self.fixed, self.copies = function, recorder, fixed, copies
        self.obstacle = None if recorder else "a step is recorded on CUDA devices only"
        self._forget()

    def _forget(self) -> None:
        self.calls, self.inputs, self.recorder, self.held = 0, None, None, None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """function(*inputs); inputs of another shape than the recorded ones run as they are."""
        if self.obstacle is None and self.inputs is not None and self.held != self.fixed():
            self._forget()
        if self.obstacle is None and self.inputs is None:
            self.recorder = self.recorder or self.make()
            self.calls += 1
            if self.calls <= WARMUP:
                return self.recorder.warm(lambda: self.function(*inputs))
            self._record(inputs)
        if self.obstacle is not None or any(not _fits(a, b) for a, b in zip(inputs, self.inputs, strict=True)):
            return self.function(*inputs)
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        results = self.recorder.replay()
        return [result.clone() for result in results] if self.copies else results

    def _record(self, inputs: Sequence[Tensor]) -> None:
        held = [given.clone() for given in inputs]
        try:
            self.recorder.record(lambda: self.function(*held))
        except (RuntimeError, NotImplementedError) as error:  # CUDA's refusals are RuntimeErrors
            self.obstacle = f"recording failed: {_all(error)}"
            warnings.warn(f"the step runs uncaptured, {self.obstacle}", stacklevel=3)
            return
        self.inputs, self.held = held, self.fixed()


def _all(error: BaseException) -> str:
    """The first line of an error, behind those it came from: a capture that is broken off says at its end only that."""
    line = (str(error).strip() or repr(error)).splitlines()[0]
    return line if error.__context__ is None else f"{_all(error.__context__)}, then {line}"


def _fits(given: Tensor, held: Tensor) -> bool:
    return given.shape == held.shape and given.dtype == held.dtype


class CudaGraph:
    """Records kernels on a stream that is not the current one.

    Graphs of one stream and pool share the memory between their kernels: replaying one overwrites what others gave.
    Without a pool their memory stays theirs.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: tuple[int, int] | None = None):
        self.device, self.stream, self.pool, self.graph = stream.device, stream, pool, torch.cuda.CUDAGraph()

    def warm(self, body):
        """On the stream of the recording, where autograd then finds what it has set up."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            results = body()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        for result in results:
            result.record_stream(torch.cuda.current_stream(self.device))
        return results

    def record(self, body):
        """Other threads (a data loader that pins memory) may go on meanwhile: thread_local."""
        # torch.cuda.graph leaves its stream the current one where the capture fails.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(self.graph, self.pool, self.stream, capture_error_mode="thread_local"),
        ):
            self.results = body()

    def replay(self):
        self.graph.replay()
        return self.results


def recorder_for(device: torch.device, *, share: bool = False) -> Callable[[], Recorder] | None:
    """Makes what records on this device; None where nothing does.

    Args:
        share: whether all that are made share one memory; then none may be recorded anew once they are all gone, for
            torch refuses a pool that nobody uses any longer but that still holds a tensor.
    """
    if not records(device):
        return None
    if not share:
        return lambda: CudaGraph(torch.cuda.Stream(device))
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(stream, pool)


def records(device: torch.device) -> bool:
    """Whether something records on this device."""
    return device.type == "cuda" and not torch.version.hip


class Rehearsal:
    """Stands in for a graph on a CPU, and fails where the graph would.

    A replay is the function run again under a watch: nothing may bring a value to the host or make a tensor from one,
    and every call into torch must be the one of the first replay, numbers included, since a graph would go on with
    those. Results land in the same tensors each time.
    """

    def __init__(self) -> None:
        self.results: list[Tensor] | None = None
        self.calls: list[Any] = []

    def warm(self, body):
        return body()

    def record(self, body):
        self.body = body

    def replay(self):
        with _Watch() as watch:
            results = self.body()
        if self.results is None:
            self.calls, self.results = watch.calls, [result.clone() for result in results]
            return self.results
        for i, (now, then) in enumerate(zip(watch.calls, self.calls, strict=False)):
            if now != then:
                raise RuntimeError(f"call {i} of the step is {now}, recorded was {then}")
        if len(watch.calls) != len(self.calls):
            raise RuntimeError(f"the step makes {len(watch.calls)} calls, recorded were {len(self.calls)}")
        for held, result in zip(self.results, results, strict=True):
            held.copy_(result)
        return self.results


# Read a value on the host, or carry host data to a device.
WAITS = frozenset({
    "item", "tolist", "numpy", "cpu", "cuda", "nonzero", "argwhere", "equal", "allclose", "is_nonzero", "unique",
    "unique_consecutive", "masked_select", "bincount", "__bool__", "__int__", "__float__", "__index__", "__complex__",
    "tensor", "as_tensor", "from_numpy", "pin_memory",
})  # fmt: skip
# Who may: Triton's interpreter, whose tensors are numpy's, and checks that look at values on a CPU only: those of
# kernels/core/check.py, and what is called _check... in a contract.
MAY_WAIT = re.compile(r"triton\.|interpreter|peakgpt\.kernels\.(core\.check\.|ops\.\w+\._check)")


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", str(function))
        caller, where = _caller()
        if not MAY_WAIT.match(f"{caller}.{where}"):
            masked = name in ("__getitem__", "__setitem__") and _has_mask(args[1])
            if name in WAITS or masked:
                raise RuntimeError(f"{caller} calls {name} inside a captured step, expected nothing that waits")
            self.calls.append((caller, name, _numbers(args), _numbers(tuple(kwargs.items()))))
        if function is Tensor.backward:  # a mode is off while it handles a call, here all of the backward pass
            with self:
                return _backward(args[0])
        return function(*args, **kwargs)


def _backward(loss: Tensor) -> None:
    """loss.backward() below the layers that modes see, or each of them would switch the mode off again."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True,
                        accumulate_grad=True)  # fmt: skip


def _caller() -> tuple[str, str]:
    """The module and the function that called torch."""
    frame = sys._getframe(2)
    while frame is not None and (
        frame.f_globals.get("__name__", "").startswith(("torch.", "contextlib"))
        or frame.f_code.co_name in ("<genexpr>", "<listcomp>")
    ):
        frame = frame.f_back
    return ("", "") if frame is None else (frame.f_globals.get("__name__", ""), frame.f_code.co_name)


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def _numbers(value: Any) -> Any:
    """What a graph would hold on to: numbers as they are, tensors by shape."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return tuple(_numbers(v) for v in value)
    return value if isinstance(value, int | float | str | None) else str(type(value))


class Late:
    """Brings numbers from a device to the host a step late, so that nothing waits for the step in flight."""

    def __init__(self, device: torch.device):
        self.device, self.held = device, None

    def put(self, label: Any, value: Tensor) -> list[tuple[Any, float]]:
        """Send a number on its way.

        Returns:
            What has arrived, (label, number) each: on a GPU the one put before, elsewhere this one.
        """
        if self.device.type != "cuda":
            return [(label, float(value))]
        arrived = self.take()
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.held = (label, host, event)
        return arrived

    def take(self) -> list[tuple[Any, float]]:
        """What is still on its way; waits for it."""
        if self.held is None:
            return []
        (label, host, event), self.held = self.held, None
        event.synchronize()
        return [(label, float(host))]
