"""Every op on every backend against float64: error <= 2 x torch's error in the same dtype, plus a floor.

Mutations that these cases catch: a missing causal mask, a gradient scaled by 1.01, a missing mean in LayerNorm's dx, a
missing tail one past a power of two, dw summed over one block only.
"""

import math

import pytest
import torch
from torch.library import opcheck

from peakgpt import _C
from peakgpt.bench.check import CASES, LARGE_CASES, double, judge, leaf, named, run, run_mutating, sample, whole
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.dispatch import OPS, load, use_backend
from peakgpt.kernels.ops import catalogue
from peakgpt.kernels.ops.adamw import join, split

BACKENDS = ("eager", "cpu", "gpu")
IDS = [f"{name}-{'x'.join(map(str, sizes.values()))}{''.join(f'-{k}={v}' for k, v in params.items())}"
       for name, sizes, params in CASES]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
# (backend, op) pairs without a kernel.
PENDING = {("cpu", "attention_decode"), ("cpu", "cache_store"), ("gpu", "linear_q8")}
OPTIONAL = [
    "attention_qkv with pairs", "attention_qkv with norms", "attention_qkv with sinks", "qk_norm with pairs",
    "qk_norm with norms",
]  # fmt: skip
DIFFERENTIABLE = [*(name for name in sorted(catalogue.__all__) if OPS[name].gradient), *OPTIONAL]


# For tests of properties: interpreted kernels take seconds for the first cases of these ops. The test of values has
# the sizes that cross the edges of tiles.
SMALLER = {
    "experts": {"rows": 9, "width": 17, "hidden": 33, "experts": 3, "choices": 2},
    "attention": {"tokens": 17},
    "attention_qkv": {"tokens": 17},
}


def first_case(selector):
    """An op with the sizes and parameters of its first case. "OP with SIZE" selects a case that has this size."""
    name, _, size = selector.partition(" with ")
    matching = ((case[1] | SMALLER.get(name, {}), case[2]) for case in CASES
                if case[0] == name and size in ("", *case[1]))  # fmt: skip
    return OPS[name], *next(matching, ({"count": 37}, OPS[name].typical))


def assert_close(ours, torchs, truth, dtype):
    for i, verdict in enumerate(judge(ours, torchs, truth, dtype)):
        assert verdict.passed, f"result {i}: {verdict}"


def backends_of(names, backends):
    """(backend, op) pairs, without the pending ones."""
    return [pytest.param(b, n, id=f"{n}-{b}") for n in names for b in backends if (b, n) not in PENDING]


def skip_if_unsupported(backend, op, tensors, params):
    """Skip with the backend's objection. The test of typical calls limits what a backend may object to."""
    with use_backend(backend):
        reason = op.explain(**named(op, tensors), **params)[backend]
    if reason:
        pytest.skip(f"{backend}: {reason}")


def test_every_op_has_small_and_large_cases():
    ops = set(catalogue.__all__)
    assert {name for name, *_ in LARGE_CASES} == ops
    assert {name for name, *_ in CASES} == ops - {"adamw", "sum_of_squares"}  # tested separately below


@pytest.mark.parametrize("name", sorted(catalogue.__all__))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backend_supports_the_typical_call_of_every_op_except_pending_ones(backend, name, dtype):
    op = OPS[name]
    with use_backend(backend), torch.device("meta"):
        module = None if backend == "eager" else load(backend, name)
        assert isinstance(module, str) == ((backend, name) in PENDING), module
        if isinstance(module, str):
            return
        tensors = op.sample(dtype=dtype)
        assert (
            module is None
            or module.objection(*op.bind(tensors, op.typical)[0], **op.bind(tensors, op.typical)[1]) is None
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize(("name", "sizes", "params"), CASES, ids=IDS)
def test_values_and_gradients_are_within_twice_torchs_error_and_repeat_bitwise(name, sizes, params, backend, dtype):
    op, tensors = OPS[name], sample(name, sizes, dtype)
    skip_if_unsupported(backend, op, tensors, params)
    run_op = run_mutating if op.mutates else run
    truth = run_op("eager", op, double(whole(op, tensors)), params)
    torchs, ours = run_op("eager", op, tensors, params), run_op(backend, op, tensors, params)
    assert_close(ours, torchs, truth, dtype)
    if backend == "cpu":  # the interpreter runs programs one after the other, so it repeats itself anyway
        again = run_op(backend, op, tensors, params)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "not repeatable"


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in DIFFERENTIABLE), ("linear_cross_entropy", {"reduction": "none"})]
)
def test_gradients_are_added_to_accumulation_buffers(name, options, backend):
    """Fails if a backend overwrites its buffer, or adds in forward and again in backward."""
    op, sizes, params = first_case(name)
    tensors, params = sample(op.name, sizes, torch.float32), params | options
    skip_if_unsupported(backend, op, tensors, params)
    leaves = [t for t in tensors if t is not None and t.requires_grad]

    def results():
        outputs = op(*tensors, **params)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs, [torch.full_like(r, 0.5) if r.dim() else torch.ones_like(r) for r in outputs]

    with use_backend(backend):
        outputs, upstream = results()
        expected = torch.autograd.grad(outputs, leaves, upstream)
        buffers = {leaf: torch.full_like(leaf, 0.25) for leaf in leaves}
        with accumulate_into(buffers):
            torch.autograd.backward(*results())
    for (tensor, buffer), grad in zip(buffers.items(), expected, strict=True):
        assert tensor.grad is None and buffer._version
        torch.testing.assert_close(buffer, grad + 0.25, rtol=1e-5, atol=1e-5)


def test_scaling_a_loss_whose_gradient_is_already_accumulated_raises():
    x, w, target = sample("linear_cross_entropy", {"rows": 5, "width": 8, "vocab": 33}, torch.float32)
    with use_backend("cpu"), accumulate_into({w: torch.zeros_like(w)}):
        loss = OPS["linear_cross_entropy"](x, w, target)
        with pytest.raises(RuntimeError, match=r"linear_cross_entropy: the loss has gradient .*0.5.*, expected 1"):
            (loss / 2).backward()
        w.requires_grad_(False)
        (OPS["linear_cross_entropy"](x, w, target) / 2).backward()


@pytest.mark.parametrize(("backend", "name"), backends_of(DIFFERENTIABLE, ("cpu", "gpu")))
def test_autocast_gives_the_values_and_dtypes_of_torchs_op(name, backend):
    """bfloat16 activations and float32 weights."""
    op, sizes, params = first_case(name)
    tensors = sample(op.name, sizes, torch.float32)
    truth = run("eager", op, double(tensors), params)
    with torch.autocast("cpu", torch.bfloat16):
        torchs, ours = run("eager", op, tensors, params), run(backend, op, tensors, params)
    assert_close(ours, torchs, truth, torch.bfloat16)


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_backward_is_bitwise_equal_and_strided_inputs_give_the_same_values(name, backend):
    """Backward runs twice on one graph; non-contiguous inputs are compared with contiguous ones."""
    op, sizes, params = first_case(name)
    tensors = sample(op.name, sizes, torch.float32)
    strided = [t if t is None or not t.requires_grad else widened(t) for t in tensors]
    skip_if_unsupported(backend, op, strided, params)
    first = run(backend, op, tensors, params)
    for a, b in zip(first, run(backend, op, strided, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with use_backend(backend):
        results = op(*tensors, **params)
    loss = sum((r * r).sum() for r in (results if isinstance(results, tuple) else (results,)))
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, torch.autograd.grad(loss, leaves), strict=True))


def widened(tensor):
    """Return the same values with a larger row stride. A vector keeps stride 1."""
    if tensor.dim() < 2:
        return leaf(tensor)
    wide = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 8, dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor.detach()
    return wide[..., : tensor.shape[-1]].requires_grad_()


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if ("gpu", n) not in PENDING])
def test_saved_tensors_of_one_backend_feed_the_backward_of_another(name):
    """The contract defines the saved tensors: forward on cpu feeds backward on gpu and vice versa."""
    op, sizes, params = first_case(name)
    bound, params = op.bind(sample(op.name, sizes, torch.float32), params)
    needs = tuple(t is not None and t.requires_grad for t in bound)
    bound = [t if t is None else t.detach() for t in bound]
    modules = {b: load(b, op.name) for b in ("cpu", "gpu")}
    grads_of = {}
    for forward_backend in modules:
        outputs, saved = op.alloc(*bound, needs=needs, **params)
        for t in (*outputs, *saved):
            t.fill_(math.nan if t.is_floating_point() else -1)
        modules[forward_backend].forward(outputs, saved, *bound, **params)
        upstream = [torch.ones_like(o) for o in outputs]
        for backward_backend, module in modules.items():
            grads = module.backward(upstream, bound, outputs, saved, needs, **params)
            grads_of[forward_backend, backward_backend] = grads
    for pair, grads in grads_of.items():
        for need, a, b in zip(needs, grads, grads_of["cpu", "cpu"], strict=True):
            assert not need or torch.allclose(a, b, rtol=1e-4, atol=1e-5), pair


@pytest.mark.parametrize("backend", ("", "cpu"))
@pytest.mark.parametrize("name", [*sorted(catalogue.__all__), *OPTIONAL])
def test_library_op_passes_opcheck(name, backend):
    op, sizes, params = first_case(name)
    tensors = sample(op.name, sizes, torch.float32, grad=op.gradient)
    skip_if_unsupported(backend or "eager", op, tensors, params)
    tensors, params = op.bind(tensors, params)
    ordered = tensors + tuple(params[name] for name in op.param_names)
    needs = [t is not None and t.requires_grad for t in tensors]
    opcheck(op.library_op, (*ordered, backend, needs))


@pytest.mark.parametrize(("backend", "name"), backends_of(DIFFERENTIABLE, BACKENDS))
def test_compiles_with_fullgraph(name, backend):
    op, sizes, params = first_case(name)
    tensors = sample(op.name, sizes, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: op(*t, **params), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(backend, compiled, tensors, {}), run(backend, op, tensors, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ("eager", "cpu", "gpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", (None, 4.0, math.inf), ids=("plain", "clipped", "skipped"))
def test_adamw_step_equals_torchs_in_float64_and_skips_a_non_finite_norm(backend, dtype, norm):
    """The state does not change at all if the norm is not finite."""
    op = OPS["adamw"]
    torch.manual_seed(3)
    param, grad, remainder, m, v, step, _ = op.sample(count=1025, dtype=dtype)
    extra = {} if norm is None else {"norm": torch.tensor(norm), "max_norm": 1.0}
    truth = torch.nn.Parameter(whole(op, [param, grad, remainder])[0].double())
    reference = torch.optim.AdamW([truth], lr=1e-2, weight_decay=0.1)
    reference.state[truth] = {"step": step.clone(), "exp_avg": m.double(), "exp_avg_sq": v.double()}
    truth.grad = grad.double() * (1.0 if norm is None else 1.0 / (norm + 1e-6))
    before = [t.clone() for t in (param, m, v, step)]
    with use_backend(backend):
        op(param, grad, remainder, m, v, step, lr=1e-2, weight_decay=0.1, **extra)
    if norm == math.inf:
        assert all(torch.equal(a, b) for a, b in zip((param, m, v, step), before, strict=True))
        return
    reference.step()
    assert step.item() == 4.0
    for ours, torchs in ((whole(op, [param, grad, remainder])[0], truth), (m, reference.state[truth]["exp_avg"]),
                         (v, reference.state[truth]["exp_avg_sq"])):  # fmt: skip
        torch.testing.assert_close(ours.double(), torchs.detach(), rtol=2e-6, atol=2e-7)


def rounding_edges(every=1):
    """Return every n-th upper half of a float32, zero and infinity among them, with the lower halves around a tie."""
    upper = torch.arange(-(2**15), 2**15, every, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (upper[:, None] + lower).flatten().view(torch.float32)


def same_bits(a, b):
    """Bitwise equal; any NaN equals any NaN."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.view(kind)[~a.isnan()], b.view(kind)[~b.isnan()])


def test_split_rounds_the_master_to_nearest_and_join_restores_its_bits():
    master = rounding_edges()
    param, remainder = split(master)
    assert same_bits(join(param, remainder), master)
    bits = master.view(torch.int32)
    ties = (bits & 0xFFFF == 0x8000) & ~master.isnan()
    nearest = torch.where(ties, ((bits >> 16) + 1).short(), master.bfloat16().view(torch.int16))
    assert same_bits(param, nearest.view(torch.bfloat16))


@pytest.mark.parametrize(("backend", "isa"), [("eager", None), ("gpu", None), *(("cpu", isa) for isa in _C.isas)])
def test_adamw_on_a_split_master_is_bitwise_equal_to_a_float32_parameter(backend, isa):
    """For normal, subnormal, infinite and NaN values. A parameter that was overwritten with zero stays zero."""
    torch.manual_seed(4)
    op, wide = OPS["adamw"], rounding_edges(every=16 if backend == "gpu" else 1)  # interpreted kernels are slow
    param, remainder = split(wide)
    states = [[torch.zeros_like(wide), torch.zeros_like(wide), torch.tensor(0.0)] for _ in range(2)]
    _C.set_isa_cap(isa)
    with use_backend(backend):
        for lr in (0.0, 1e-3, 1e-3):
            grad = torch.randn_like(wide).bfloat16()
            op(wide, grad.float(), None, *states[0], lr=lr)
            op(param, grad, remainder, *states[1], lr=lr)
            assert same_bits(join(param, remainder), wide) and same_bits(param, split(wide)[0])
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        for zero in (0.0, -0.0):
            op(param.fill_(zero), grad, split(wide)[1], *states[1], lr=0.0)
            assert not param.any()
    _C.set_isa_cap(None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", (0, 1, 65, 4097, 200_001))
def test_sum_of_squares_is_exact_to_1e6_repeatable_and_infinite_for_infinity(backend, dtype, count):
    """Adds to the total, with a relative error of 1e-6 at any length."""
    op = OPS["sum_of_squares"]
    torch.manual_seed(count)
    x, total = op.sample(count=count, dtype=dtype)
    again, expected = total.clone(), 3.0 + x.double().square().sum().item()
    with use_backend(backend):
        op(x, total)
        op(x, again)
        assert total.item() == pytest.approx(expected, rel=1e-6) and torch.equal(total, again)
        if count:
            x[-1] = math.inf
            op(x, total)
            assert total.item() == math.inf


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_loss_with_all_targets_ignored_equals_eager(backend, reduction):
    op, (x, w, target) = (
        OPS["linear_cross_entropy"],
        sample("linear_cross_entropy", {"rows": 3, "width": 8, "vocab": 9}, torch.float32),
    )
    target.fill_(-100)
    params = {"reduction": reduction}
    for a, b in zip(run(backend, op, [x, w, target], params), run("eager", op, [x, w, target], params), strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
def test_mean_loss_with_zero_weights_is_nan_with_finite_gradients(backend):
    """As the mean over no targets is."""
    op = OPS["linear_cross_entropy"]
    x, w, target = sample("linear_cross_entropy", {"rows": 3, "width": 8, "vocab": 9}, torch.float32)
    with use_backend(backend):
        loss = op(x, w, target, torch.zeros(3), label_smoothing=0.1, z_loss=0.1)
        assert loss.isnan() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
def test_autocast_does_not_round_token_weights(backend):
    """A weight of 1 / 1000 in bfloat16 would have an error of 0.1 %, the same for every token."""
    x, w, target = sample("linear_cross_entropy", {"rows": 33, "width": 8, "vocab": 65}, torch.float32)
    weight = torch.full((33,), 1e-3)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        weighted = OPS["linear_cross_entropy"](x, w, target, weight, reduction="sum")
        plain = OPS["linear_cross_entropy"](x, w, target, reduction="sum")
    assert weighted.item() == pytest.approx(plain.item() * 1e-3, rel=1e-5)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5, expected 0 to 1"),
        ({"z_loss": -1.0}, "z_loss is -1.0, expected at least 0"),
        ({"prefer": "both"}, "prefer is 'both', expected one of auto, memory, time"),
        ({"reduction": "max"}, "reduction is 'max', expected one of mean, sum, none"),
        ({"weight": torch.ones(2)}, r"weight has shape \(2,\), expected \(3\)"),
        ({"weight": torch.ones(3).half()}, "weight has dtype torch.float16, expected"),
    ],
)
def test_invalid_loss_options_raise_got_and_expected(params, message):
    tensors = sample("linear_cross_entropy", {"rows": 3, "width": 8, "vocab": 9}, torch.float32)
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        OPS["linear_cross_entropy"](*tensors, **params)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ((torch.ones(5, 4), None), "got only cos, expected cos and sin, or neither"),
        ((None, torch.ones(5, 4)), "got only sin, expected cos and sin, or neither"),
        ((torch.ones(4, 4),) * 2, r"cos has shape \(4, 4\), expected \(5, any\)"),
        ((torch.ones(5, 9),) * 2, "cos has 9 pairs, expected at most 8 of D = 16"),
        ((torch.ones(5, 4).half(),) * 2, "cos has dtype torch.float16, expected qkv's dtype torch.float32"),
    ],
)
def test_invalid_rotary_tables_raise_got_and_expected(tables, message):
    with pytest.raises(ValueError, match=f"attention_qkv: {message}"):
        OPS["attention_qkv"](torch.ones(1, 5, 6, 16), *tables, n_head=2)


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
def test_attention_qkv_with_rotary_saves_one_projection(backend):
    """Saves the rotated projection. Fails if qkv is saved too: no other op of a model saves it."""
    op, sizes, params = first_case(OPTIONAL[0])
    qkv, *tables = sample(op.name, sizes, torch.float32)
    saved = []
    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        op(qkv, *tables, **params)
    assert [t.data_ptr() == qkv.data_ptr() for t in saved if t.shape == qkv.shape] == [False]


def test_loss_allocates_no_gradient_under_no_grad():
    op, tensors = (
        OPS["linear_cross_entropy"],
        sample("linear_cross_entropy", {"rows": 3, "width": 8, "vocab": 9}, torch.float32),
    )
    _, saved = op.alloc(*tensors, needs=(False, False, False), ignore_index=-100, reduction="mean")
    assert saved == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*sorted(catalogue.__all__), *OPTIONAL])
def test_cost_counts_the_bytes_written(name, dtype):
    """Forward: the outputs or the mutated tensors. Backward: the gradients and the saved tensors."""
    op, sizes, params = first_case(name)
    # A scalar loss saves the gradients themselves.
    params = {**params, "reduction": "none"} if name == "linear_cross_entropy" else params
    tensors = sample(op.name, sizes, dtype, grad=op.gradient)
    cost = op.cost(*tensors, **params)
    if op.mutates:
        changed = [t for n, t in zip(op.tensor_names, tensors, strict=False) if n in op.mutates and t is not None]
        assert (cost.written, cost.backward_written) == (size_bytes(changed), 0)
        return
    bound, bound_params = op.bind(tensors, params)
    needs = [t is not None and t.requires_grad for t in bound]
    outputs, saved = op.alloc(*bound, needs=needs, **bound_params)
    assert cost.written == size_bytes(outputs)
    gradients = run("eager", op, tensors, params)[len(outputs) :]
    assert cost.backward_written == size_bytes({g.data_ptr(): g for g in gradients}.values()) + size_bytes(saved)
    assert cost.bytes > cost.written and cost.backward_bytes >= cost.backward_written


def size_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)
