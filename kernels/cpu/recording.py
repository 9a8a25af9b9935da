"""Recorded calls: the kernels and torch operators of a function, replayed without Python between the kernels.

A step of a small model spends much of its time in Python: 54 calls of about 100 us for 4 layers (one core of an Intel
Xeon with AVX-512, 2026-11). A recording does what a CUDA graph does on a GPU. The function runs once without its
kernels, while its allocations come from an arena. A replay makes the same calls on the same addresses. Operators of
torch are called again; one that creates a tensor copies its result into the tensor of the recording.

What a CUDA graph cannot capture, a recording cannot: reading a value on the host, or tensors whose shapes depend on
values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peakgpt.kernels.core.recording import CannotRecord, record_with
from peakgpt.kernels.cpu.ext import _C, own_workspaces, threads
from peakgpt.kernels.cpu.memory import streamed
from peakgpt.kernels.hardware.cpu_threads import torch_threads

ARENA_BYTES = 1 << 26  # a step with more temporaries spends below 5 % of its time in Python
ALIGNMENT = 64
_aten = torch.ops.aten
ALLOCATIONS = frozenset({_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default,
                         _aten.new_empty.default, _aten.new_empty_strided.default})  # fmt: skip
# They change the sizes of a tensor and write no element.
RESHAPING = frozenset({_aten.resize_.default, _aten.detach_.default})


class Recording:
    """One recorded call of a function. It has the interface of a graph in engine/graph_capture.py."""

    def __init__(self) -> None:
        self.arena, self.tape, self.outputs, self.parts, self.draws_random_numbers = None, None, (), [], False

    def warm_up(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Run the function."""
        return function()

    def capture(self, function: Callable[[], Sequence[Tensor]]) -> None:
        """Record the function. Its kernels do not run, and torch's random state stays.

        Raises:
            CannotRecord: the function reads a value, or its temporaries do not fit into the arena.
        """
        self.arena, self.parts, random_state = _Arena(), [], torch.get_rng_state()
        self.tape = _C.Tape(begin=self.arena.begin, end=self.arena.begin + ARENA_BYTES)
        try:
            with record_with(self), _Operators(self):
                self.outputs = function()
        finally:
            self.tape.stop()
            torch.set_rng_state(random_state)

    def append(self, call: Callable[[], Any]) -> None:
        """Call a function at this place of each replay, without autograd."""
        self.tape.append(torch.no_grad()(call))

    def capture_parallel(self, functions: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Record functions that a replay runs at the same time, each on one thread, during the capture of this one.

        Args:
            functions: they write to no common memory. Each returns a tensor.
        Returns:
            The tensors; [] if a function draws random numbers, whose order counts. Nothing is recorded then.
        """
        workers, parts = min(threads(), len(functions)), []
        self.tape.stop()
        try:
            with torch_threads(1), _disable_current_modes():
                for function in functions:
                    parts.append(Recording())
                    with own_workspaces():
                        parts[-1].capture(lambda function=function: (function(),))
                    if parts[-1].draws_random_numbers:
                        return []
        finally:
            self.tape.start()
        self.tape.append_parallel(tapes=[part.tape for part in parts], threads=workers)
        self.parts += parts
        return [part.outputs[0] for part in parts]

    def replay(self) -> Sequence[Tensor]:
        """Run the recorded function. The next replay overwrites the outputs."""
        self.tape.replay()
        return self.outputs


class _Arena:
    """Memory of a recording: a freed block is given to the next allocation of its size, as in the replays."""

    def __init__(self) -> None:
        self.memory = streamed(ARENA_BYTES, torch.uint8)  # only the pages that are written take memory
        self.bytes = self.memory.numpy()
        self.begin, self.used = self.memory.data_ptr(), 0
        self.free: dict[int, list[int]] = {}
        self.leases: dict[int, weakref.ref] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Return an uninitialized tensor with the shape, strides and dtype of another one.

        Raises:
            CannotRecord: the arena is full, or the tensor is not on the CPU.
        """
        if tensor.device.type != "cpu":
            raise CannotRecord(f"a recording has a tensor on {tensor.device}, expected the CPU")
        if tensor.numel() == 0:
            return tensor
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        block = self._take(elements * tensor.element_size())
        flat = torch.frombuffer(block, dtype=tensor.dtype, count=elements)
        return flat.as_strided(tensor.shape, tensor.stride())

    def _take(self, size: int) -> Any:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        reusable = self.free.get(size)
        if reusable:
            offset = reusable.pop()
        else:
            offset, self.used = self.used, self.used + size
            if self.used > ARENA_BYTES:
                raise CannotRecord(f"the temporaries take more than {ARENA_BYTES >> 20} MiB")
        block = self.bytes[offset : offset + size]
        # The storage of the tensor keeps `block` alive, so this callback says that no tensor uses the memory.
        self.leases[offset] = weakref.ref(block, lambda _: self.free.setdefault(size, []).append(offset))
        return block


class _Operators(TorchDispatchMode):
    """Records the operators of torch that are called; the extension records its kernels."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording, self.tape, self.arena = recording, recording.tape, recording.arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler for the first operator: 5 s and 150 MiB

    def __enter__(self):
        self.tape.start()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.tape.stop()  # for kernels of ops that run inside this operator
        try:
            return self._record(function, partial(function, *args, **(kwargs or {})))
        finally:
            self.tape.start()

    def _record(self, function: Any, call: partial) -> Any:
        schema = function._schema
        if function in RESHAPING or not _has_tensors(schema):
            return call()
        if torch.Tag.inplace_view in function.tags:
            raise CannotRecord(f"{function} changes the shape of a tensor in place")
        if torch.Tag.dynamic_output_shape in function.tags and not _has_integer_indices(call):
            raise CannotRecord(f"{function} returns a tensor whose shape depends on values")
        if call.keywords.get("generator") is not None:
            raise CannotRecord(f"{function} draws from a generator of its own")  # the capture would draw, too
        self.recording.draws_random_numbers |= torch.Tag.nondeterministic_seeded in function.tags
        if schema.is_mutable:
            self.recording.append(call)
            return _mutated(schema, call)
        result = call()
        if any(value.alias_info is not None for value in schema.returns):
            return result  # a view
        if isinstance(result, Tensor):
            return self._record_results(function, call, [result])[0]
        if not isinstance(result, tuple | list) or not all(isinstance(value, Tensor) for value in result):
            raise CannotRecord(f"{function} returns {type(result).__name__} to the host, expected tensors")
        return type(result)(self._record_results(function, call, result))

    def _record_results(self, function: Any, call: partial, results: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors of the arena that get the results in each replay."""
        copies = [self.arena.like(result) for result in results]
        if function not in ALLOCATIONS:
            for copy, result in zip(copies, results, strict=True):
                copy.copy_(result)  # the capture itself may use it, such as the gradient of the loss
            self.recording.append(partial(_copy_results, call, copies))
        return copies


def _has_tensors(schema: Any) -> bool:
    """Return whether an operator takes or returns tensors; profilers and promotion of dtypes do not."""
    return any("Tensor" in str(value.type) for value in (*schema.arguments, *schema.returns))


def _has_integer_indices(call: partial) -> bool:
    """Return whether a call is x[indices] without a mask."""
    if call.func is not _aten.index.Tensor:
        return False
    return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in call.args[1])


def _copy_results(call: partial, copies: Sequence[Tensor]) -> None:
    results = call()
    for copy, result in zip(copies, [results] if isinstance(results, Tensor) else results, strict=True):
        copy.copy_(result)


def _mutated(schema: Any, call: partial) -> Any:
    """Return what an operator that writes to its arguments returns, without running it."""
    if not schema.returns:
        return None
    named = dict(zip((argument.name for argument in schema.arguments), call.args, strict=False)) | call.keywords
    written = [named[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if len(written) != len(schema.returns):
        raise CannotRecord(f"{call.func} writes {len(written)} arguments and returns {len(schema.returns)} tensors")
    return written[0] if len(written) == 1 else tuple(written)
