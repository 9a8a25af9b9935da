"""Ops are picklable like functions, and autograd notices what an op or an optimizer writes in place."""

import contextlib
import copy
import io
import multiprocessing
import pickle

import pytest
import torch

import peakgpt
from peakgpt.bench.check import CASES, sample
from peakgpt.kernels.core.dispatch import OPS, use_backend
from peakgpt.kernels.ops import catalogue

MUTATING = [name for name in sorted(catalogue.__all__) if OPS[name].mutates]
FLAT = [("adamw", {"count": 37}, {"lr": 0.5}), ("sum_of_squares", {"count": 37}, {})]
CASE = {name: case for name, *case in (*CASES, *FLAT)}


class Holder(torch.nn.Module):
    """A module that keeps an op, as a user's model may."""

    def __init__(self, op):
        super().__init__()
        self.op = op


@pytest.mark.parametrize("name", sorted(catalogue.__all__))
def test_every_op_pickles_and_copies_to_itself(name):
    op = OPS[name]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(op, protocol)) is op
    assert copy.copy(op) is op and copy.deepcopy(op) is op
    file = io.BytesIO()
    torch.save(Holder(op), file)
    file.seek(0)
    assert torch.load(file, weights_only=False).op is op and copy.deepcopy(Holder(op)).op is op


def test_op_reaches_a_spawned_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(peakgpt.layernorm, (torch.ones(2, 8), torch.ones(8)))
    assert torch.equal(result, torch.zeros(2, 8))


@pytest.mark.parametrize("path", ["direct", "library_op", "compiled"])
@pytest.mark.parametrize("backend", ["eager", "cpu", "gpu"])
@pytest.mark.parametrize("name", MUTATING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mutating_op_raises_the_versions_of_what_it_writes(name, backend, path, dtype):
    """Fails if only eager does: a backward over the old values would be wrong without a word."""
    op, (sizes, params) = OPS[name], CASE[name]
    tensors = sample(name, sizes, dtype)
    with use_backend(backend):
        if reason := op.explain(*tensors, **params)[backend]:
            pytest.skip(reason)
        before = [None if t is None else t._version for t in tensors]
        torch._dynamo.reset()
        run = torch.compile(lambda *t: op(*t, **params), backend="aot_eager") if path == "compiled" else None
        with torch.no_grad(), PassThrough() if path == "library_op" else contextlib.nullcontext():
            (run or (lambda *t: op(*t, **params)))(*tensors)
    for argument, tensor, old in zip(op.tensor_names, tensors, before, strict=False):
        if tensor is not None:
            assert (tensor._version > old) == (argument in op.mutates), argument


class PassThrough(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def test_mutating_op_accepts_tensors_of_inference_mode():
    with torch.inference_mode():
        total = torch.zeros(())
        OPS["sum_of_squares"](torch.ones(3), total)
    assert total == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", [peakgpt.AdamW, torch.optim.AdamW])
def test_backward_over_parameters_that_the_optimizer_has_changed_raises(optimizer, dtype):
    w = torch.nn.Parameter(torch.randn(4, 8, dtype=dtype))
    update = optimizer([w], lr=0.1)
    x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
    loss = peakgpt.linear(x, w).square().sum()
    w.grad = torch.ones_like(w)
    update.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", [name for name in sorted(catalogue.__all__) if OPS[name].gradient])
def test_backward_over_an_input_that_adamw_has_changed_raises(name):
    """The op reads the input in backward, so a changed value would give a wrong gradient."""
    sizes, params = CASE[name]
    tensors = sample(name, sizes, torch.float32)
    results = OPS[name](**dict(zip(OPS[name].tensor_names, tensors, strict=False)), **params)
    first = results[-1] if isinstance(results, tuple) else results
    saved = {t.data_ptr() for t in getattr(first.grad_fn, "saved_tensors", ()) if t is not None}
    changed = [t for t in tensors if t is not None and t.requires_grad and t.data_ptr() in saved]
    if not changed:
        pytest.skip("backward reads no input that has a gradient")
    flat = changed[0].detach().view(-1)
    state = [torch.zeros(flat.numel()) for _ in range(2)]
    OPS["adamw"](flat, torch.ones_like(flat), None, *state, torch.zeros(()), lr=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()
