"""One op, several backends: what an op is, which backend runs it, and how torch sees it.

A contract file declares an op with `@op` on its eager function. A backend is a module `kernels/<backend>/<op>.py`
of pure functions:

    NO_GRADIENT                                       optional: names of tensors that it gives no gradient for
    objection(*tensors, **params) -> str | None       why it can not take this call, or None; reads sizes, dtypes and
                                                      strides only, which are the same while tracing and when it runs
    slower(*tensors, **params) -> str | None          optional: the measurement by which it had better not; it does not
                                                      count where the backend is forced
    forward(outputs, saved, *tensors, **params)       fills what the contract's `alloc` made
    backward(grads, inputs, outputs, saved, needs, **params) -> one gradient (or None) per tensor

forward (of an op that forms gradients there) and backward may take `into` too: see `accumulate_into`.
`inputs` and `outputs` hold None where the contract's `keeps` does not name them; an entry of `grads` is None where
nothing flows into that output. The path is the registry. The first backend of PRIORITY without an objection runs;
a forced backend that objects raises. Plain tensors take a direct call; under torch.compile, fake tensors, dispatch
modes and for tensor subclasses the same contract runs as `torch.ops.peakgpt.<op>`. Under torch.func's transforms and
forward-mode differentiation, which no backend knows, the eager function runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

PRIORITY = ("hopper", "gpu", "cpu", "eager")
HOME = {"hopper": "cuda", "gpu": "cuda", "cpu": "cpu"}

OPS: dict[str, Op] = {}
_library = torch.library.Library("peakgpt", "DEF")
_forced: str | None = None  # a module global: torch.compile guards on it, a ContextVar breaks the graph
_sinks: Mapping[Tensor, Tensor] = MappingProxyType({})
_seeds: Callable[[torch.device], Tensor] | None = None


class Cost(NamedTuple):
    """What one call must do at least: work FLOPs and bytes of device memory, forward and backward.

    Forward is what a call under no_grad must do; writing what backward keeps counts with backward.
    """

    flops: int
    bytes: int
    backward_flops: int
    backward_bytes: int
    written: int  # of bytes: the outputs, or what the op mutates
    backward_written: int  # of backward_bytes: the gradients, and what forward keeps for backward


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend; it raises where that backend objects.

    Args:
        name: one of PRIORITY ("hopper", "gpu", "cpu", "eager"). The setting is global to the process.
    Raises:
        ValueError: an unknown name.
    """
    global _forced
    if name not in PRIORITY:
        raise ValueError(f"unknown backend: got {name!r}, expected one of {', '.join(PRIORITY)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> str | None:
    """The backend that `use_backend` asks for, or None."""
    return _forced


@contextlib.contextmanager
def accumulate_into(sinks: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Add gradients of parameters to where they are kept, while ops run in direct calls: no temporary, no second pass.

    Megatron-LM's gradient accumulation fusion. For training loops that know what they do: autograd gets None for such
    a parameter, so that its hooks do not run and torch.autograd.grad finds nothing. Forward and backward both belong
    inside, once each: a loss may add its part in the forward pass, at gradient 1, and raises where another one arrives.

    A backend whose backward (or forward, where that forms the gradients) takes `into` gets one sink or None for each
    tensor; it adds to the sink and returns it, or returns a gradient, which is added here.

    Args:
        sinks: where to add by parameter, each of its parameter's shape, strides, dtype and device.
    """
    global _sinks
    before, _sinks = _sinks, sinks
    try:
        yield
    finally:
        _sinks = before


def draw_seed(device: torch.device) -> Tensor:
    """A seed for a random op: (1,) int64 on the device, from torch's generator of that device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


@contextlib.contextmanager
def seeds_from(source: Callable[[torch.device], Tensor]) -> Iterator[None]:
    """Take the seeds of random ops from source(device), which stands for draw_seed; eager too is then seeded.

    For what runs a forward pass again and must meet the same masks, without winding back torch's generator: that can
    not be done while a CUDA graph is captured.
    """
    global _seeds
    before, _seeds = _seeds, source
    try:
        yield
    finally:
        _seeds = before


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unavailable(backend: str) -> str | None:
    """Why a whole backend is out on this machine; importing Triton costs 0.4 s, so ask before."""
    if backend == "cpu" or (backend == "gpu" and interpreted()):
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        return f"needs sm_90, got sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    return None


@functools.cache
def load(backend: str, op_name: str) -> ModuleType | str:
    """The backend's module for an op, or the reason why there is none."""
    if reason := _unavailable(backend):
        return reason
    path = f"peakgpt.kernels.{backend}.{op_name}"
    try:
        return importlib.import_module(path)
    except ImportError as error:
        return f"no {backend} kernel for {op_name} yet" if error.name == path else str(error)


@functools.cache
def _at_home(op_name: str, kind: str) -> list[ModuleType]:
    """The backends of an op that take this kind of device, in the order of PRIORITY."""
    modules = [load(backend, op_name) for backend, home in HOME.items() if home == kind]
    return [module for module in modules if not isinstance(module, str)]


class Op:
    """An op: the contract's eager function, callable by users, with whatever backends exist for it."""

    def __init__(
        self, eager: Callable[..., Any], *, alloc, check, cost, sample, typical, keeps, outputs, autocast, mutates,
        early, random, gradient, exact,
    ):  # fmt: skip
        functools.update_wrapper(self, eager)
        self.name, self.eager = eager.__name__, eager
        self.alloc, self.check, self.cost, self.sample, self.typical = alloc, check, cost, sample, dict(typical)
        self.outputs, self.autocast, self.mutates = outputs, autocast, frozenset(mutates)
        self.exact = frozenset(exact)
        self.early, self.random, self.gradient = early, random, gradient and not mutates
        self.signature = inspect.signature(eager, eval_str=True)
        arguments = self.signature.parameters
        self.tensor_names = tuple(n for n, a in arguments.items() if a.annotation in (Tensor, Tensor | None))
        self._required = frozenset(n for n in self.tensor_names if arguments[n].annotation is Tensor)
        self.param_names = tuple(n for n in arguments if n not in self.tensor_names)
        self._params = frozenset(self.param_names)
        self._names = tuple(arguments)
        self._seed_at = self.tensor_names.index("seed") if random else None
        self._positional = sum(a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments.values())
        self._defaults = {n: a.default for n, a in arguments.items() if a.default is not a.empty}
        self._param_defaults = {n: v for n, v in self._defaults.items() if n in self.param_names}
        self._tensors_first = self._names[: len(self.tensor_names)] == self.tensor_names
        self._keep_inputs = tuple(n in keeps for n in self.tensor_names)
        self._keep_outputs = tuple(n in keeps for n in self.outputs)
        self._library_op = _register(self)
        OPS[self.name] = self

    def __call__(self, *args, **kwargs):
        tensors, params = self._bind(args, kwargs)
        for name, tensor in zip(self.tensor_names, tensors, strict=True):
            if not isinstance(tensor, Tensor) and (tensor is not None or name in self._required):
                raise TypeError(f"{self.name}: {name} is {type(tensor).__name__}, expected a Tensor")
        kind = tensors[0].device.type
        autocasting = _autocasts(kind)
        cast = _autocast(tensors, self.autocast, kind) if autocasting else tensors
        if autocasting and self.exact:
            cast = tuple(t if n in self.exact else c for n, t, c in zip(self.tensor_names, tensors, cast, strict=True))
        if not (self.gradient or self.mutates) and any(_needs(cast)):
            raise NotImplementedError(f"{self.name}: a gradient is wanted, expected a call under torch.no_grad()")
        self.check(*cast, **params)
        if torch.compiler.is_compiling():
            return self._traced(tensors, cast, params)
        if _transformed():
            if _forced not in (None, "eager"):
                raise NotImplementedError(f"{self.name}: backend {_forced!r} is forced under a transform of torch.func")
            return self._eager(tensors, params)
        if not _plain(tensors):
            return self._traced(tensors, cast, params)
        needs = _needs(cast)
        backend = self._choose(_forced, cast, params, needs)
        if backend is None:
            return self._eager(tensors if _seeds is None else self._seeded(tensors, params), params)
        cast = self._seeded(cast, params)
        if autocasting:  # keep it away from what the backend calls inside
            with torch.autocast(kind, enabled=False):
                return self._direct(backend, cast, params, needs)
        return self._direct(backend, cast, params, needs)

    def explain(self, *args, **kwargs) -> dict[str, str | None]:
        """Each backend's objection to this call in the order of PRIORITY; None where it would take it."""
        tensors, params = self._bind(args, kwargs)
        needs = _needs(tensors)
        return {name: self._objection(name, tensors, params, _forced, needs) for name in PRIORITY}

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        if self._tensors_first and len(args) == len(self.tensor_names):  # how layers call: 2 us less
            params = {**self._param_defaults, **kwargs}
            if params.keys() == self._params:
                return tuple(args), params
        values = {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}
        if len(args) > self._positional or len(values) != len(self._names) or len(args) + len(kwargs) > len(values):
            self.signature.bind(*args, **kwargs)  # raises Python's own message
        return tuple(values[n] for n in self.tensor_names), {n: values[n] for n in self.param_names}

    def _direct(self, backend: ModuleType, tensors, params, needs):
        if any(needs):
            return self._result(_Fused.apply(self, backend, params, needs, *tensors))
        results, saved = self.alloc(*tensors, needs=needs, **params)
        backend.forward(results, saved, *tensors, **params)
        return self._result(results)

    def _seeded(self, tensors, params):
        """The tensors with a seed where the op is random and came without.

        Drawn outside of the op, which stays a function of its inputs: a backward, a replay and a compiled graph see the
        mask of the forward, a checkpoint that restores torch's generator draws the same seed again, and a captured step
        keeps it in device memory.
        """
        if self.random is None or params[self.random] == 0 or tensors[self._seed_at] is not None:
            return tensors
        seed = (_seeds or draw_seed)(tensors[0].device)
        return *tensors[: self._seed_at], seed, *tensors[self._seed_at + 1 :]

    def _eager(self, tensors, params):
        return self.eager(**dict(zip(self.tensor_names, tensors, strict=True)), **params)

    def _result(self, results: Sequence[Tensor]):
        return None if self.mutates else results[0] if len(self.outputs) == 1 else tuple(results)

    def _traced(self, tensors, cast, params):
        if _forced == "eager":
            return self._eager(tensors, params)
        cast = self._seeded(cast, params)
        values = dict(zip(self.tensor_names, cast, strict=True)) | params
        ordered = [values[n] for n in (*self.tensor_names, *self.param_names)]
        with _no_autocast(cast):
            results = self._library_op(*ordered, _forced or "", list(_needs(cast)))
        return None if self.mutates else self._result(results[: len(self.outputs)])

    def _objection(self, backend: str, tensors, params, forced: str | None, needs) -> str | None:
        if backend == "eager":
            return None
        module = load(backend, self.name)
        if isinstance(module, str):
            return module
        kind = tensors[0].device.type
        if kind != HOME[backend] and not (forced == backend == "gpu" and kind == "cpu" and interpreted()):
            return f"takes {HOME[backend]} tensors, got {kind}"
        return self._objects(module, tensors, params, needs, forced)

    def _objects(self, module: ModuleType, tensors, params, needs, forced: str | None = None) -> str | None:
        for name in getattr(module, "NO_GRADIENT", ()):
            if needs[self.tensor_names.index(name)]:
                return f"has no gradient for {name} yet"
        reason = module.objection(*tensors, **params)
        slower = getattr(module, "slower", None)
        return slower(*tensors, **params) if reason is None and slower and not forced else reason

    def _choose(self, forced: str | None, tensors, params, needs):
        """The backend's module; None means eager."""
        if forced:
            if reason := self._objection(forced, tensors, params, forced, needs):
                raise NotImplementedError(f"{self.name}: backend {forced!r} is forced but objects: {reason}")
            return None if forced == "eager" else load(forced, self.name)
        for module in _at_home(self.name, tensors[0].device.type):
            if self._objects(module, tensors, params, needs) is None:
                return module
        return None


def op(
    *,
    cost: Callable[..., Cost],
    sample: Callable[..., tuple[Tensor, ...]],
    check: Callable[..., None],
    alloc: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]] = lambda *_, **__: ((), ()),
    typical: Mapping[str, Any] = MappingProxyType({}),
    keeps: Sequence[str] = (),
    outputs: Sequence[str] = ("out",),
    autocast: str | None = None,
    mutates: Sequence[str] = (),
    early: Callable[..., Sequence[str]] | None = None,
    random: str | None = None,
    gradient: bool = True,
    exact: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Op]:
    """Make an op of an eager function; arguments annotated `Tensor` or `Tensor | None` are tensors, others parameters.

    Args:
        cost: (*tensors, **params) -> Cost of one call.
        sample: sizes by keyword, GPT-2 124M's at 4 x 256 tokens by default, dtype and device -> the tensors of a call.
        typical: parameters without a default, as in GPT-2 124M.
        check: (*tensors, **params), raises ValueError with got and expected.
        alloc: (*tensors, needs, **params) -> (outputs, saved): new tensors for the results and for what backward
            keeps. `needs` tells which gradients are wanted. It is the fake implementation too.
        keeps: names of the inputs and outputs whose values backward reads.
        outputs: names of the results.
        autocast: "lower" casts to autocast's dtype as torch does for matrix products; "norm" as it does for norms.
        mutates: names of the tensors changed in place; such an op returns None and has no gradient.
        early: (**params) -> names of the tensors whose gradients the forward pass of a scalar result forms, at
            gradient 1, and may add to their sinks.
        random: the parameter that makes the op random where it is not 0; such an op has a tensor `seed`, (1,) int64,
            drawn from torch's generator where the caller gives none.
        gradient: False for an op that raises where a gradient is wanted.
        exact: names of the tensors that autocast leaves as they are.
    """
    return lambda eager: Op(
        eager, alloc=alloc, check=check, cost=cost, sample=sample, typical=typical, keeps=keeps,
        outputs=() if mutates else outputs, autocast=autocast, mutates=mutates, early=early, random=random,
        gradient=gradient, exact=exact,
    )  # fmt: skip


class _Fused(torch.autograd.Function):
    """The direct path: a backend's forward and backward as one autograd node."""

    @staticmethod
    def forward(ctx, op: Op, backend: ModuleType, params: dict[str, Any], needs: tuple[bool, ...], *tensors):
        ctx.set_materialize_grads(False)
        into = tuple(_sinks.get(t) if n else None for t, n in zip(tensors, needs, strict=True))
        extra, ctx.added = {}, ()
        if op.early and _takes_into(backend.forward):
            names = op.early(**params)
            early = tuple(s if n in names else None for s, n in zip(into, op.tensor_names, strict=True))
            extra, ctx.added = {"into": early}, tuple(s for s in early if s is not None)
            needs = tuple(n and s is None for n, s in zip(needs, early, strict=True))
        outputs, saved = op.alloc(*tensors, needs=needs, **params)
        backend.forward(outputs, saved, *tensors, **extra, **params)
        torch.autograd.graph.increment_version(ctx.added)
        ctx.call, ctx.into = (op, backend, params, needs, len(tensors), len(outputs)), into
        ctx.save_for_backward(*_keep(tensors, op._keep_inputs), *_keep(outputs, op._keep_outputs), *saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        op, backend, params, needs, n_in, n_out = ctx.call
        if ctx.added and (grads[0] is None or grads[0].item() != 1.0):
            raise RuntimeError(f"{op.name}: a gradient of {grads[0]} arrived, expected 1: accumulate_into has added it")
        if all(g is None for g in grads):  # nothing flows: a Function further on returned None
            return (None,) * (4 + n_in)
        held = ctx.saved_tensors
        inputs, outputs, saved = held[:n_in], held[n_in : n_in + n_out], held[n_in + n_out :]
        extra = {"into": ctx.into} if _takes_into(backend.backward) else {}
        with _no_autocast(grads):
            found = backend.backward(grads, inputs, outputs, saved, needs, **extra, **params)
        found = tuple(_sunk(g, s) if n else None for g, s, n in zip(found, ctx.into, needs, strict=True))
        return None, None, None, None, *found


# ---- torch.ops.peakgpt.<op>: the same contract for torch.compile, fake tensors and subclasses ----

_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "int", float: "float", str: "str",
           int | None: "SymInt?", float | None: "float?"}  # fmt: skip


def _schema(op: Op) -> str:
    letters = iter("abcdefghijklmnop")
    kinds = {n: _SCHEMA[op.signature.parameters[n].annotation] for n in (*op.tensor_names, *op.param_names)}
    for name in op.tensor_names:
        if name in op.mutates:
            kinds[name] = kinds[name].replace("Tensor", f"Tensor({next(letters)}!)")
    return ", ".join(f"{kind} {name}" for name, kind in kinds.items())


def _register(op: Op):
    """Define the library op and, where it has a gradient, its backward op; returns the callable."""
    n_in, n_out = len(op.tensor_names), len(op.outputs)
    tags = (torch.Tag.needs_exact_strides,)
    replay = _Replay(op)

    def choose(forced: str, tensors, params, needs):
        return op._choose(forced or None, tensors, params, needs) or replay

    def split(args):
        *values, forced, needs = args
        return tuple(values[:n_in]), dict(zip(op.param_names, values[n_in:], strict=True)), forced, needs

    def forward(*args):
        tensors, params, forced, needs = split(args)
        op.check(*tensors, **params)  # again: while tracing nobody sees values, and an id out of range writes anywhere
        outputs, saved = op.alloc(*tensors, needs=needs, **params)
        choose(forced, tensors, params, needs).forward(outputs, saved, *tensors, **params)
        return None if op.mutates else [*outputs, *saved]

    def fake(*args):
        tensors, params, _, needs = split(args)
        outputs, saved = op.alloc(*tensors, needs=needs, **params)
        return None if op.mutates else [*outputs, *saved]

    _library.define(
        f"{op.name}({_schema(op)}, str backend, bool[] needs) -> {'()' if op.mutates else 'Tensor[]'}", tags=tags
    )
    _library.impl(op.name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peakgpt::{op.name}", fake, lib=_library)
    library_op = getattr(torch.ops.peakgpt, op.name).default
    if not op.gradient:
        return library_op

    def backward(grads, inputs, outputs, saved, *rest):
        *values, forced, needs = rest
        params = dict(zip(op.param_names, values, strict=True))
        with torch._C._AutoDispatchBelowAutograd():  # as in forward; here no autograd kernel came first
            found = choose(forced, inputs, params, needs).backward(grads, inputs, outputs, saved, needs, **params)
        return _distinct([_laid_out_like(t, g) for t, g, need in zip(inputs, found, needs, strict=True) if need])

    def fake_backward(grads, inputs, outputs, saved, *rest):
        return [torch.empty_like(t) for t, need in zip(inputs, rest[-1], strict=True) if need]

    lists = "Tensor?[] grads, Tensor?[] inputs, Tensor[] outputs, Tensor[] saved"
    arguments = ", ".join([lists, *_schema(op).split(", ")[n_in:], "str backend, bool[] needs"])
    _library.define(f"{op.name}_backward({arguments}) -> Tensor[]", tags=tags)
    _library.impl(f"{op.name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peakgpt::{op.name}_backward", fake_backward, lib=_library)
    library_backward = getattr(torch.ops.peakgpt, f"{op.name}_backward").default

    def setup(ctx, inputs, output):
        tensors, *_ = split(inputs)
        ctx.rest, ctx.needs = inputs[n_in:], inputs[-1]
        ctx.present = [t is not None for t in tensors]
        ctx.save_for_backward(*(t for t in tensors if t is not None), *output)

    def gradient(ctx, grads):
        held = iter(ctx.saved_tensors)
        inputs = [next(held) if there else None for there in ctx.present]
        held = list(held)
        found = iter(library_backward(list(grads[:n_out]), inputs, held[:n_out], held[n_out:], *ctx.rest))
        return *(next(found) if need else None for need in ctx.needs), *(None for _ in ctx.rest)

    torch.library.register_autograd(f"peakgpt::{op.name}", gradient, setup_context=setup, lib=_library)
    return library_op


class _Replay:
    """Eager as a backend of the library op: backward runs the eager function again, under autograd."""

    def __init__(self, op: Op):
        self.op = op

    def forward(self, outputs, saved, *tensors, **params):
        results = self.op._eager(tensors, params)
        if not self.op.mutates:
            for output, result in zip(outputs, results if len(outputs) > 1 else (results,), strict=True):
                output.copy_(result)
            for tensor in saved:  # never read by the replay, but what a library op returns must be defined
                tensor.zero_()

    def backward(self, grads, inputs, outputs, saved, needs, **params):
        leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        with _autograd_keys(), torch.enable_grad():
            results = self.op._eager(leaves, params)
            results = results if len(grads) > 1 else (results,)
            pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
            wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
            found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs]))
        return [next(found) if need else None for need in needs]


# ---- small decisions, each in one place ----


def _autograd_keys():
    """Bring autograd back inside a library op, which runs with its dispatch key excluded."""
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a direct call is safe: no subclass (a DTensor has no data pointer), no dispatch mode."""
    return (
        all(t is None or type(t) is Tensor or type(t) is Parameter for t in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _needs(tensors: Sequence[Tensor | None]) -> tuple[bool, ...]:
    if not torch.is_grad_enabled():
        return (False,) * len(tensors)
    return tuple(t is not None and t.requires_grad for t in tensors)


@functools.cache
def _takes_into(function: Callable[..., Any]) -> bool:
    return "into" in inspect.signature(function).parameters


def _sunk(grad: Tensor | None, sink: Tensor | None) -> Tensor | None:
    """What autograd gets: None where the gradient has gone, or goes here, into its sink."""
    if sink is None or grad is None:
        return grad
    if grad is not sink:
        sink.add_(grad)
    torch.autograd.graph.increment_version(sink)  # a kernel that writes to an address leaves no trace
    return None


def _keep(tensors: Sequence[Tensor | None], kept: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(t if k else None for t, k in zip(tensors, kept, strict=True))


def _laid_out_like(tensor: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the strides that the fake backward promised."""
    promised = torch.empty_like(tensor, device="meta")
    if grad.stride() == promised.stride():
        return grad
    return grad.new_empty_strided(promised.shape, promised.stride()).copy_(grad)


def short_lived(like: Tensor, *shape: int) -> Tensor:
    """New memory for a result that dies before tensors made after it: 128 bytes more than it needs.

    glibc's posix_memalign looks for 96 bytes more than it is asked for, so what it has freed holds nothing of the same
    size, and would stay a hole between tensors that live on: 84 MiB of a float32 training step of GPT-2 124M.
    """
    return like.new_empty(math.prod(shape) + 128 // like.element_size()).resize_(shape)


def may_overwrite_saved() -> bool:
    """Whether a backend's backward may reuse what was saved: in a direct call whose graph is not kept.

    Fresh pages for a gradient the size of the vocabulary cost more than the arithmetic on it.
    """
    library_op = torch._C._dispatch_tls_local_exclude_set().has(torch._C.DispatchKey.AutogradFunctionality)
    running = torch._C._current_graph_task_id() >= 0
    return running and not library_op and not torch._C._autograd._get_current_graph_task_keep_graph()


def _distinct(grads: list[Tensor]) -> list[Tensor]:
    """A library op may not return one tensor twice, as a sum's gradient would be."""
    return [g.clone() if any(g is before for before in grads[:i]) else g for i, g in enumerate(grads)]


def _autocast(tensors: Sequence[Tensor | None], policy: str | None, kind: str) -> Sequence[Tensor | None]:
    """The tensors as torch's own op of this policy would cast them under autocast on this kind of device."""
    # layer_norm is on CUDA's float32 list; on CPU it takes mixed dtypes as they come.
    dtype = {"lower": torch.get_autocast_dtype(kind), "norm": torch.float32 if kind == "cuda" else None}.get(policy)
    return tuple(_to(t, dtype) for t in tensors) if dtype else tensors


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    castable = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor


def _no_autocast(tensors: Sequence[Tensor | None]):
    """Keep autocast away from what a backend calls inside."""
    kind = _kind(tensors)
    return torch.autocast(kind, enabled=False) if _autocasts(kind) else contextlib.nullcontext()


def _autocasts(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _kind(tensors: Sequence[Tensor | None]) -> str:
    return next(t for t in tensors if t is not None).device.type
