"""Every tensor argument and every incoming gradient of every op, in every layout, on every backend.

Between the elements of a spread tensor lies poison. A backend that reads or writes an address without the strides of
its tensor gives other values than for a contiguous copy, or overwrites poison.
"""

import functools
import itertools
import random

import pytest
import torch
from layouts import OFFSET, TRANSPOSED, intact, lay_out, layouts
from torch.utils._python_dispatch import TorchDispatchMode

from peakgpt.bench.check import CONSTANT
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.dispatch import OPS, load, use_backend
from peakgpt.kernels.ops import catalogue

BACKENDS = ("eager", "cpu", "gpu")
FIRST = {"dtype": torch.float32}
HALF = {"dtype": torch.bfloat16}  # of the cases that reach a kernel for half precision only


def some(*shape):
    return torch.randn(shape)


def attention_options():
    return {"alibi": some(2), "bias": some(2, 2, 5, 7), "sinks": some(2), "kv_start": torch.tensor([0, 1]),
            "kv_len": torch.tensor([7, 5], dtype=torch.int32), "seed": torch.tensor([3])}  # fmt: skip


# (op, sizes and dtype, further tensors, parameters): together they have every tensor of every op.
CASES = [
    ("linear", {"rows": 5, "width": 16, "out": 9, **FIRST}, {}, {}),
    ("linear", {"rows": 5, "width": 32, "out": 16, **HALF}, {}, {}),
    ("linear", {"rows": 1, "width": 1, "out": 1, **FIRST}, {}, {}),
    ("linear", {"rows": 40, "width": 24, "out": 1, **FIRST}, {}, {}),
    ("mlp", {"rows": 5, "width": 16, "hidden": 24, **FIRST}, {}, {}),
    ("mlp", {"rows": 5, "width": 32, "hidden": 16, **HALF}, {}, {"recompute": True}),
    ("gated_mlp", {"rows": 5, "width": 16, "hidden": 24, **FIRST}, {}, {"recompute": True}),
    ("gated_mlp", {"rows": 5, "width": 32, "hidden": 16, **HALF}, {}, {}),
    ("experts", {"rows": 5, "width": 16, "hidden": 24, "experts": 3, "choices": 2, "biased": 1, **FIRST}, {}, {}),
    ("experts", {"rows": 5, "width": 32, "hidden": 16, "experts": 3, "choices": 2, "biased": 1, **HALF}, {},
     {"activation": "relu", "recompute": True}),
    ("linear_lora", {"rows": 5, "width": 16, "out": 24, "rank": 3, "dropout": True, **FIRST}, {}, {"scale": 2.0}),
    ("linear_grouped", {"rows": 5, "width": 40, "out": 33, "order": True, **FIRST}, {}, {"levels": "unsigned"}),
    ("linear_q8", {"rows": 5, "width": 40, "out": 33, **FIRST}, {}, {"activation": "silu"}),
    ("linear_q4", {"rows": 5, "width": 40, "out": 33, "group": 32, **FIRST}, {}, {"group": 32}),
    ("layernorm", {"rows": 5, "width": 33, **FIRST}, {}, {}),
    ("layernorm", {"rows": 3, "width": 1, **FIRST}, {}, {}),
    ("rmsnorm", {"rows": 1, "width": 33, **FIRST}, {}, {}),
    ("add_layernorm", {"rows": 5, "width": 33, **FIRST}, {}, {}),
    ("add_rmsnorm", {"rows": 5, "width": 33, **FIRST}, {}, {}),
    ("linear_cross_entropy", {"rows": 5, "width": 16, "vocab": 33, "weighted": 1, **FIRST}, {}, {"z_loss": 0.1}),
    ("linear_cross_entropy", {"rows": 5, "width": 16, "vocab": 33, "weighted": 1, **FIRST}, {}, {"reduction": "none"}),
    ("linear_cross_entropy", {"rows": 1, "width": 16, "vocab": 33, **FIRST}, {}, {"label_smoothing": 0.1}),
    ("embedding", {"batch": 2, "tokens": 5, "vocab": 9, "width": 17, **FIRST}, {}, {}),
    ("embedding", {"batch": 2, "tokens": 5, "vocab": 9, "width": 17, "positions": 6, **FIRST}, {}, {}),
    ("embedding", {"batch": 1, "tokens": 1, "vocab": 9, "width": 1, **FIRST}, {}, {}),
    ("dropout", {"rows": 5, "width": 33, **FIRST}, {}, {"p": 0.3}),
    ("rotary", {"batch": 2, "tokens": 3, "heads": 3, "head_dim": 16, "pairs": 6, **FIRST}, {}, {"heads": 2}),
    ("rotary", {"batch": 1, "tokens": 1, "heads": 2, "head_dim": 2, "pairs": 1, **FIRST}, {},
     {"heads": 1, "interleaved": True}),
    ("attention", {"batch": 2, "tokens": 5, "heads": 2, "head_dim": 16, "keys": 7, "kv_heads": 1, **FIRST},
     attention_options, {"dropout": 0.3, "softcap": 2.0}),
    ("attention", {"batch": 1, "tokens": 6, "heads": 1, "head_dim": 8, **FIRST},
     lambda: {"cu_seqlens": torch.tensor([0, 2, 6])}, {}),
    ("attention_qkv", {"batch": 2, "tokens": 5, "heads": 2, "head_dim": 16, **FIRST}, {}, {"n_head": 2}),
    ("attention_qkv", {"batch": 1, "tokens": 3, "heads": 4, "head_dim": 16, "kv_heads": 2, "pairs": 6, **FIRST},
     lambda: {"sinks": some(4)}, {"n_head": 4, "softcap": 2.0}),
    ("attention_qkv", {"batch": 1, "tokens": 6, "heads": 1, "head_dim": 8, **FIRST},
     lambda: {"cu_seqlens": torch.tensor([0, 2, 6])}, {"n_head": 1}),
    ("attention_qkv", {"batch": 2, "tokens": 3, "heads": 2, "head_dim": 16, "pairs": 6, "norms": 1, **FIRST}, {},
     {"n_head": 2}),
    ("qk_norm", {"batch": 2, "tokens": 3, "heads": 2, "head_dim": 16, "pairs": 6, "kv_heads": 1, **FIRST}, {},
     {"n_head": 2, "offset": 1.0}),
    ("qk_norm", {"batch": 1, "tokens": 1, "heads": 2, "head_dim": 3, "norms": 2, **FIRST}, {}, {"n_head": 2}),
    ("attention_decode", {"batch": 3, "heads": 4, "head_dim": 16, "keys": 33, "kv_heads": 2, **FIRST},
     lambda: {"alibi": some(4), "sinks": some(4)}, {"softcap": 2.0}),
    ("attention_decode", {"batch": 2, "queries": 3, "heads": 2, "head_dim": 16, "keys": 20, "bits": 8, **FIRST},
     {}, {}),
    ("cache_store", {"tokens": 5, "heads": 3, "head_dim": 8, **FIRST}, {}, {}),
    ("cache_store", {"tokens": 5, "heads": 1, "head_dim": 8, "block": 2, "bits": 8, **FIRST}, {}, {}),
    ("adamw", {"count": 37, **HALF},
     lambda: {"norm": torch.tensor(2.0), "rate": torch.tensor(0.5)}, {"lr": 0.1, "max_norm": 1.0}),
    ("muon", {"rows": 5, "columns": 7, **HALF},
     lambda: {"norm": torch.tensor(2.0), "rate": torch.tensor(0.5)}, {"lr": 0.1, "max_norm": 1.0}),
    ("sum_of_squares", {"count": 37, **FIRST}, {}, {}),
]  # fmt: skip
IDS = [f"{name}-{n}" for n, (name, *_) in enumerate(CASES)]
# Their values must ascend or differ.
NOT_EXPANDED = {"cu_seqlens", "cu_queries", "slots", "order"}
REFUSED = {"adamw", "muon", "cache_store", "attention_decode"}


class Call:
    """One case: its tensors by name, those that need a gradient, and the gradients that come in."""

    def __init__(self, name, sizes, further, params):
        torch.manual_seed(7)
        self.op, self.params = OPS[name], params
        tensors = dict(zip(self.op.tensor_names, self.op.sample(**sizes), strict=False))
        tensors |= further() if callable(further) else further
        self.tensors = {n: t for n, t in tensors.items() if t is not None}
        self.needed = [n for n, t in self.tensors.items()
                       if self.op.gradient and t.is_floating_point() and n not in CONSTANT.get(name, ())]  # fmt: skip
        self.grads = {}
        if self.op.gradient:
            outputs = self.outputs(self.tensors)
            self.grads = {n: torch.randn_like(t) for n, t in zip(self.op.outputs, outputs, strict=True)}

    def outputs(self, tensors):
        results = self.op(**tensors, **self.params)
        return results if isinstance(results, tuple) else (results,)

    def run(self, backend, changed=None, grads=None):
        """Return the outputs, gradients and mutated tensors, with some tensors and gradients changed."""
        changed, grads = changed or {}, {**self.grads, **(grads or {})}
        copies = {n: changed[n] if n in changed else t.clone() for n, t in self.tensors.items()}
        leaves = {n: t.detach().requires_grad_(n in self.needed) for n, t in copies.items()}
        with use_backend(backend):
            results = self.outputs(leaves)
            if self.op.mutates:
                return [copies[n] for n in copies if n in self.op.mutates]
            wanted = [leaves[n] for n in self.needed]
            return [*results, *(torch.autograd.grad(results, wanted, list(grads.values())) if wanted else ())]

    def objection(self, backend, changed):
        if backend != "eager" and isinstance(load(backend, self.op.name), str):
            return "no kernel"
        with use_backend(backend):
            return self.op.explain(**{**self.tensors, **changed}, **self.params)[backend]


@functools.cache
def call(index):
    return Call(*CASES[index])


def assert_same(call, backend, tensors, grads, reference=None):
    """Compare a call with tensors and gradients in other layouts with one that has contiguous copies of them.

    The reference is a backend whose results may differ by rounding.
    """
    dense = [{n: t.clone(memory_format=torch.contiguous_format) for n, t in ts.items()} for ts in (tensors, grads)]
    try:
        results = call.run(backend, tensors, grads)
    except ValueError as error:
        mutated = [n for n in tensors if n in call.op.mutates or n.endswith("_scale")]
        assert mutated and call.op.name in REFUSED and "strides" in str(error)
        return
    tolerance = 1e-4 if reference else 1e-5
    if any(t.dtype == torch.bfloat16 for t in call.tensors.values()):
        tolerance = 5e-2
    for i, (a, b) in enumerate(zip(results, call.run(reference or backend, *dense), strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"result {i}: {m}")
    assert all(intact(t) for t in tensors.values() if t.storage_offset() or not t.is_contiguous())


def possible(name, tensor):
    """The layouts of one tensor of a call."""
    return [layout for layout in layouts(tensor) if layout[0] != "expanded" or name not in NOT_EXPANDED]


def test_cases_have_every_tensor_of_every_op():
    seen = {(call(i).op.name, n) for i in range(len(CASES)) for n in call(i).tensors}
    assert seen == {(name, n) for name in catalogue.__all__ for n in OPS[name].tensor_names}


@pytest.mark.parametrize("backend", ("eager", "cpu"))
@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_each_tensor_and_each_gradient_alone_in_each_layout(index, backend):
    one = call(index)
    for name, layout in ((n, lay) for n, t in one.tensors.items() for lay in possible(n, t)):
        changed = {name: lay_out(one.tensors[name], *layout)}
        if one.objection(backend, changed) is None:
            assert_same(one, backend, changed, {})
    for name, layout in ((n, lay) for n, t in one.grads.items() for lay in layouts(t)):
        if one.objection(backend, {}) is None:
            assert_same(one, backend, {}, {name: lay_out(one.grads[name], *layout)})


def written(name, tensor):
    """The layouts of a tensor that its op refuses in some others: those that every backend takes."""
    return [("spread", axis) for axis in range(3)] if name.endswith("_cache") else [(OFFSET,)]


def combination(one, choose):
    """Every tensor and gradient in the layout that `choose` takes from its list."""
    limited = {n for n in one.tensors if n in one.op.mutates or n.endswith(("_cache", "_scale"))}
    options = {n: written(n, t) if n in limited else possible(n, t) for n, t in one.tensors.items()}
    tensors = {n: lay_out(t, *choose(options[n])) for n, t in one.tensors.items()}
    return tensors, {n: lay_out(t, *choose(layouts(t))) for n, t in one.grads.items()}


def spread_last(options):
    """The last axis that can be spread."""
    return max((layout for layout in options if layout[0] == "spread"), default=(OFFSET,))


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_all_tensors_and_gradients_at_once_on_gpus(index):
    """Two turns: the last axis of each tensor is spread, then each tensor has another layout."""
    one = call(index)
    if one.objection("gpu", {}) is not None:
        pytest.skip("no kernel")
    for choose in (spread_last, lambda options: options[len(options) // 2]):
        tensors, grads = combination(one, choose)
        assert one.objection("gpu", tensors) is None
        assert_same(one, "gpu", tensors, grads, "eager")


class LibraryOps(TorchDispatchMode):
    """Changes nothing, but inside it every call goes through `torch.ops.peakgpt`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_random_combinations_in_direct_calls_and_library_ops(index, rounds=3):
    one, chance = call(index), random.Random(index)
    for backend, _ in itertools.product(("eager", "cpu"), range(rounds)):
        tensors, grads = combination(one, chance.choice)
        if one.objection(backend, tensors) is None:
            assert_same(one, backend, tensors, grads)
            with LibraryOps():
                assert_same(one, backend, tensors, grads)


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize("name", ("linear", "embedding", "linear_cross_entropy"))
def test_an_accumulation_buffer_in_any_layout_receives_the_gradient(name, backend):
    """Kernels that add to a buffer do not read its strides."""
    one = next(call(i) for i, case in enumerate(CASES) if case[0] == name)
    leaves = {n: t.detach().clone().requires_grad_(n in one.needed) for n, t in one.tensors.items()}
    with use_backend(backend):
        (y,) = one.outputs(leaves)
        expected = torch.autograd.grad(y, [leaves[n] for n in one.needed], torch.ones_like(y))
        for layout in (("spread", 0), (TRANSPOSED,)):
            buffers = {leaves[n]: lay_out(torch.full_like(leaves[n], 0.5), *layout) for n in one.needed if n != "b"}
            with accumulate_into(buffers):
                one.outputs(leaves)[0].backward(torch.ones_like(y))
            for leaf, grad in zip((leaves[n] for n in one.needed), expected, strict=True):
                if leaf in buffers:
                    torch.testing.assert_close(buffers[leaf], grad + 0.5, rtol=1e-5, atol=1e-5)


EMPTY = [
    ("linear", [(3, 0), (5, 0), (5,)]),
    ("linear", [(3, 4), (0, 4), (0,)]),
    ("linear", [(2, 0, 4), (5, 4), (5,)]),
    ("mlp", [(3, 0), (4, 0), (4,), (5, 4), (5,)]),
    ("mlp", [(3, 4), (0, 4), (0,), (5, 0), (5,)]),
    ("mlp", [(3, 4), (2, 4), (2,), (0, 2), (0,)]),
    ("gated_mlp", [(3, 0), (4, 0), (4,), (4, 0), (4,), (5, 4), (5,)]),
    ("gated_mlp", [(3, 4), (0, 4), (0,), (0, 4), (0,), (5, 0), (5,)]),
    ("layernorm", [(2, 0, 4), (4,), (4,)]),
    ("layernorm", [(2, 3, 0), (0,), (0,)]),
    ("rmsnorm", [(2, 3, 0), (0,)]),
    ("attention", [(2, 3, 0, 8), (2, 3, 1, 8), (2, 3, 1, 8)]),
    ("attention", [(2, 3, 2, 8), (2, 0, 2, 8), (2, 0, 2, 8)]),
    ("attention", [(2, 0, 2, 8), (2, 3, 2, 8), (2, 3, 2, 8)]),
]


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize(("name", "shapes"), EMPTY, ids=str)
def test_empty_axes_give_torchs_values_and_gradients_or_an_objection(name, shapes, backend):
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def results(backend):
        with use_backend(backend):
            y = OPS[name](*leaves, **OPS[name].typical)
            return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    with use_backend(backend):
        if reason := OPS[name].explain(*leaves, **OPS[name].typical)[backend]:
            pytest.skip(reason)
    for a, b in zip(results(backend), results("eager"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_target_without_axes_is_one_token():
    x, w, target = some(4), some(9, 4), torch.tensor(3)
    expected = torch.nn.functional.cross_entropy((w @ x)[None], target[None])
    for backend in BACKENDS:
        with use_backend(backend):
            torch.testing.assert_close(OPS["linear_cross_entropy"](x, w, target), expected)
