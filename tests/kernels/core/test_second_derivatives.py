"""Gradients of gradients through every op and every path: the values of eager torch in float64, or one clear error.

Fails on an autograd.Function with once_differentiable, or on a library op whose backward has no derivative: both return
gradients that are detached from the graph, so that second derivatives are zero without a word.
"""

import contextlib
import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import peakgpt
from peakgpt.bench.check import CASES, double, sample
from peakgpt.engine.model.recompute import set_recompute
from peakgpt.kernels.core.autograd import accumulate_into, first_order
from peakgpt.kernels.core.dispatch import OPS, use_backend

# Cases with a gradient and elements, at sizes that keep second derivatives cheap.
SMALL = [case for case in CASES if OPS[case[0]].gradient and all(0 != v < 1000 for v in case[1].values())]
SMALL += [
    ("attention", {"batch": 1, "tokens": 7, "heads": 2, "head_dim": 16}, {"dropout": 0.25}),
    ("mlp", {"rows": 4, "width": 16, "hidden": 32}, {"activation": "relu", "recompute": True}),
]
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(SMALL)]
DIRECT = contextlib.nullcontext
PATHS = {
    "direct": DIRECT,
    "library_op": lambda: FlopCounterMode(display=False),  # a dispatch mode selects it
    "no_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
}


def inputs_of(name, sizes, params):
    tensors = sample(name, sizes, torch.float32)
    if params.get("dropout"):
        tensors += [None] * 5 + [torch.tensor([5])]
    return tensors


def second_order(call, tensors):
    """Gradients of the squared gradients of a weighted sum of the outputs, and the gradients themselves."""
    generator = torch.Generator().manual_seed(3)
    weights = lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)  # noqa: E731
    results = call(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    ups = [weights(r).requires_grad_() for r in results]
    first = torch.autograd.grad(results, wanted, ups, create_graph=True)
    total = sum((g * weights(g)).sum() + g.square().sum() for g in first)
    return [*first, *torch.autograd.grad(total, [*wanted, *ups], allow_unused=True)]


def op_call(name, params):
    op = OPS[name]
    named = lambda tensors: dict(zip(op.tensor_names, tensors, strict=False))  # noqa: E731
    return lambda *tensors: op(**named(tensors), **params), lambda *t: op.differentiable(**_all(op, named(t), params))


def _all(op, named, params):
    tensors, values = op.bind((), {**named, **params})
    return dict(zip(op.tensor_names, tensors, strict=True)) | values


def assert_same(got, expected, tolerance):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        error, scale = (a.double() - b).abs().max().item(), b.abs().max().item()
        assert error <= tolerance * max(scale, 1e-3), f"result {i}: error {error:.2e}, largest value {scale:.2e}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "sizes", "params"), SMALL, ids=IDS)
def test_second_derivatives_of_every_op_are_those_of_eager_torch(name, sizes, params, path):
    tensors, (call, eager) = inputs_of(name, sizes, params), op_call(name, params)
    truth = second_order(eager, double(tensors))
    try:
        with PATHS[path]():
            got = second_order(call, tensors)
    except RuntimeError as error:
        assert name == "attention_qkv" and path != "library_op" and "create_graph=True with cos and sin" in str(error)
        return
    assert_same(got, truth, 2e-3)
