"""CUDA graphs: capture a function of tensors once, then replay it without Python between its kernels.

    calls 1 .. WARMUP      run normally: libraries initialize themselves, kernels compile
    the next call          is captured over static input tensors, and replayed
    later calls            copy their inputs to the static tensors, replay, and copy the outputs

Values that change between calls must be in device memory: batches, the learning rate, step counts, random seeds. If the
function cannot be captured, `GraphedFunction.obstacle` says why, and all calls run normally. On a CPU a training step
is recorded in the same way (kernels/cpu/recording.py). `engine/graph_dry_run.py` tests on a CPU whether a function
could be captured on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from peakgpt.kernels.core.recording import CannotRecord

WARMUP = 2  # not 1: the first training step creates the optimizer's state, the second one runs like all later ones

Function = Callable[..., Sequence[Tensor]]


class Graph(Protocol):
    """Captures a function without arguments, and replays it."""

    def warm_up(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Run the function normally, on the stream of a later capture."""

    def capture(self, function: Callable[[], Sequence[Tensor]]) -> None:
        """Capture the function. It need not run."""

    def replay(self) -> Sequence[Tensor]:
        """Run the captured function. The next replay overwrites the outputs."""


class GraphedFunction:
    """A function of tensors that becomes a graph after WARMUP calls."""

    def __init__(
        self, function: Function, make_graph: Callable[[], Graph] | None, captured_state: Callable[[], Any], *,
        copy_outputs: bool = True,
    ):  # fmt: skip
        """
        Args:
            function: takes tensors and returns a sequence of tensors.
            make_graph: see `graph_factory`; None if the device has no graphs.
            captured_state: returns the host values that a graph captures, such as addresses. When they change, the
                function is captured again.
            copy_outputs: copy the outputs of the graph; if False, the next replay overwrites them.
        """
        self.function, self.make_graph, self.captured_state = function, make_graph, captured_state
        self.copy_outputs = copy_outputs
        self.obstacle = None if make_graph else "only CUDA devices have graphs"
        self._reset()

    def _reset(self) -> None:
        self.calls, self.inputs, self.graph, self.state = 0, None, None, None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Return function(*inputs). Inputs whose shapes or dtypes differ from the captured ones run normally."""
        if self.obstacle is None and self.inputs is not None and self.state != self.captured_state():
            self._reset()
        if self.obstacle is None and self.inputs is None:
            self.graph = self.graph or self.make_graph()
            self.calls += 1
            if self.calls <= WARMUP:
                return self.graph.warm_up(lambda: self.function(*inputs))
            self._capture(inputs)
        if self.obstacle is not None or any(not _is_like(a, b) for a, b in zip(inputs, self.inputs, strict=True)):
            return self.function(*inputs)
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value, non_blocking=True)
        outputs = self.graph.replay()
        return [output.clone() for output in outputs] if self.copy_outputs else outputs

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        static = [value.clone() for value in inputs]
        try:
            self.graph.capture(lambda: self.function(*static))
        except CannotRecord as error:
            self.obstacle = str(error)
            return
        except (RuntimeError, NotImplementedError) as error:  # errors of CUDA are RuntimeErrors
            self.obstacle = f"capture failed: {_messages(error)}"
            warnings.warn(f"the function runs uncaptured, {self.obstacle}", stacklevel=3)
            return
        self.inputs, self.state = static, self.captured_state()


def _messages(error: BaseException) -> str:
    """Return the first lines of an error and its causes: the last error of a failed capture gives no reason."""
    line = (str(error).strip() or repr(error)).splitlines()[0]
    return line if error.__context__ is None else f"{_messages(error.__context__)}, then {line}"


def _is_like(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


class CudaGraph:
    """A CUDA graph, captured on a side stream.

    Graphs with the same stream and pool share the memory of their intermediate tensors: the replay of one overwrites
    the outputs of the others. A graph without a pool has its own memory.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: tuple[int, int] | None = None):
        self.device, self.stream, self.pool, self.graph = stream.device, stream, pool, torch.cuda.CUDAGraph()

    def warm_up(self, function):
        """Run on the capture's stream: autograd initializes its state for this stream before the capture needs it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            outputs = function()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        for output in outputs:
            output.record_stream(torch.cuda.current_stream(self.device))
        return outputs

    def capture(self, function):
        """Capture. "thread_local" lets other threads, such as a data loader that pins memory, continue to call CUDA."""
        # If the capture fails, torch.cuda.graph leaves its stream the current one; the outer context restores it.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(self.graph, self.pool, self.stream, capture_error_mode="thread_local"),
        ):
            self.outputs = function()

    def replay(self):
        """Launch the graph on the current stream."""
        self.graph.replay()
        return self.outputs


def graph_factory(device: torch.device, *, share_memory: bool = False) -> Callable[[], Graph] | None:
    """Return a function that makes graphs on a device; None if the device has none.

    Args:
        device: where the tensors are.
        share_memory: all graphs of this factory share one memory pool. Once they are all freed, no other graph can be
            captured with it: torch refuses a pool without a graph in which a tensor is still alive.
    """
    if not has_graphs(device):
        return None
    if not share_memory:
        return lambda: CudaGraph(torch.cuda.Stream(device))
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(stream, pool)


def step_graphs(device: torch.device) -> Callable[[], Graph] | None:
    """Return a function that makes graphs of training steps; on a CPU they are recordings of kernel calls."""
    if device.type != "cpu":
        return graph_factory(device)
    try:
        from peakgpt.kernels.cpu.recording import Recording
    except ImportError:  # no extension
        return None
    return Recording


def has_graphs(device: torch.device) -> bool:
    """Return whether functions can be captured on this device."""
    return device.type == "cuda" and not torch.version.hip
