"""Gradients of gradients through every op and every path: the values of eager torch in float64, or one clear error.

Fails on an autograd.Function with once_differentiable, or on a library op whose backward has no derivative: both return
gradients that are detached from the graph, so that second derivatives are zero without a word.
"""

import contextlib
import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peakgpt
from peakgpt.bench.check import CASES, double, sample
from peakgpt.engine.model.recompute import set_recompute
from peakgpt.kernels.core.autograd import accumulate_into, first_order
from peakgpt.kernels.core.dispatch import OPS, use_backend


class PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


# For each op one small case of each set of options.
SMALL = list(
    {
        (name, *sorted(sizes.keys() - {"kv_heads", "keys"}), *sorted(params)): (name, sizes, params)
        for name, sizes, params in CASES
        if OPS[name].gradient and all(0 != v < 130 for v in sizes.values())
    }.values()
)
SMALL += [
    ("attention", {"batch": 1, "tokens": 7, "heads": 2, "head_dim": 16}, {"dropout": 0.25}),
    ("mlp", {"rows": 4, "width": 16, "hidden": 32}, {"activation": "relu", "recompute": True}),
]
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(SMALL)]
PATHS = {
    "direct": contextlib.nullcontext,
    "library_op": PassThrough,
}


def inputs_of(name, sizes, params):
    tensors = sample(name, sizes, torch.float32)
    if params.get("dropout"):
        tensors += [None] * 6 + [torch.tensor([5])]
    return tensors


def second_order(call, tensors):
    """Gradients of the squared gradients of a weighted sum of the outputs, and the gradients themselves."""
    generator = torch.Generator().manual_seed(3)
    weights = lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)  # noqa: E731
    results = call(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    # The sum of add_layernorm is not connected to w: eagerly it requires no gradient if only w does.
    pairs = [(r, up) for r in results if (up := weights(r).requires_grad_()) is not None and r.requires_grad]
    ups = [up for _, up in pairs][-1:]
    first = torch.autograd.grad([r for r, _ in pairs], wanted, [up for _, up in pairs], create_graph=True)
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


@pytest.mark.parametrize(
    "name",
    ["linear", "linear_q8", "layernorm", "add_layernorm", "add_rmsnorm", "mlp", "rotary", "attention"],
)
def test_second_derivatives_with_one_trainable_input(name):
    """As in fine-tuning: the result sum of add_layernorm needs no gradient if only w does."""
    _, sizes, params = next(case for case in SMALL if case[0] == name)
    every, (call, eager) = inputs_of(name, sizes, params), op_call(name, params)
    for i in [i for i, t in enumerate(every) if t is not None and t.requires_grad]:
        tensors = [t.detach().requires_grad_(at == i) for at, t in enumerate(every)]
        assert_same(second_order(call, tensors), second_order(eager, double(tensors)), 2e-3)


def test_first_order_gradients_under_create_graph_are_attached_to_the_graph():
    """Regression: d/dx of linear under create_graph=True did not require a gradient."""
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(peakgpt.linear(x, w).sum(), x, create_graph=True)
    assert gradient.requires_grad


def test_ordinary_backward_does_not_run_the_eager_function(monkeypatch):
    """Fails if backward without create_graph takes the slow way."""
    monkeypatch.setattr(peakgpt.linear, "differentiable", None)
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    peakgpt.linear(x, w).sum().backward(retain_graph=True)
    assert x.grad is not None


def test_backward_with_create_graph_inside_accumulate_into_raises():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    target = torch.tensor([0, 4, 1])
    for call in (lambda: peakgpt.linear(x, w).sum(), lambda: peakgpt.linear_cross_entropy(x, w, target)):
        with accumulate_into({w: torch.zeros_like(w)}):
            loss = call()
            with pytest.raises(RuntimeError, match="inside accumulate_into"):
                loss.backward(create_graph=True)


def test_first_order_function_raises_under_create_graph():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @first_order
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(3, requires_grad=True)
    Double.apply(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"Double: got create_graph=True, expected False"):
        torch.autograd.grad(Double.apply(x).sum(), x, create_graph=True)


# ---- models ----

DIRECTION = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(5))


def tiny_gpt(**options):
    torch.manual_seed(0)
    return peakgpt.GPT(peakgpt.GPTConfig(n_layer=2, n_embd=32, n_head=2, block_size=16, vocab_size=64, **options))


def penalised(model, call):
    """The gradients of all parameters of a loss with a gradient penalty."""
    model.zero_grad()
    loss = call(model)
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (loss + sum(g.square().sum() for g in first)).backward()
    return [p.grad for p in model.parameters()]


def truth_of(model, call):
    """The same with the eager functions in float64, in operations that torch differentiates twice."""
    patched = pytest.MonkeyPatch()
    for op in OPS.values():
        patched.setattr(op, "eager", op.differentiable)
    with use_backend("eager"):
        result = penalised(copy.deepcopy(model).double(), call)
    patched.undo()
    return result


IDS_OF_TOKENS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))


def loss(model):
    return model(IDS_OF_TOKENS[:, :-1].contiguous(), IDS_OF_TOKENS[:, 1:].contiguous())


@pytest.mark.parametrize("recompute", ["none", "norm", "mlp", "block"])
def test_gradient_penalty_of_gpt_with_every_recompute_plan(recompute):
    model = tiny_gpt(bias=True)
    set_recompute(model, recompute)
    assert_same(penalised(model, loss), truth_of(model, loss), 2e-3)


def test_gradient_penalty_through_torch_checkpoint():
    model = tiny_gpt()

    def checkpointed(model):
        return checkpoint(loss, model, use_reentrant=False)

    assert_same(penalised(model, checkpointed), truth_of(model, loss), 2e-3)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiled_op_gives_second_derivatives_or_raises(backend):
    torch._dynamo.reset()
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    compiled = torch.compile(lambda x, w: peakgpt.layernorm(x, w).pow(3).sum(), backend=backend, fullgraph=True)
    truth = second_order(lambda x, w: OPS["layernorm"].eager(x, w).pow(3).sum(), double([x, w]))
    try:
        got = second_order(compiled, [x, w])
    except RuntimeError as error:
        assert "double backward" in str(error)
        return
    assert_same(got, truth, 2e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hessian_vector_product_of_a_patched_model(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(n_positions=32, n_embd=32, n_layer=1, n_head=2, **dropout, **sizes)
        plain = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, **sizes
        )
        plain = transformers.LlamaForCausalLM(config)
    patched = copy.deepcopy(plain)
    peakgpt.patch(patched)
    plain.set_attn_implementation("eager")
    ids = IDS_OF_TOKENS[:, :8]

    def product(model):
        x = model.get_input_embeddings()(ids).detach()
        return torch.autograd.functional.hvp(lambda z: model(inputs_embeds=z, labels=ids).loss, x, DIRECTION)

    assert_same(product(patched), [t.double() for t in product(plain)], 2e-3)


# ---- torch.func, forward mode and batched gradients ----

TRANSFORMS = {
    "grad": lambda f, x, t: torch.func.grad(f)(x),
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "vmap": lambda f, x, t: torch.func.vmap(f)(torch.stack([x, t])),
    "per sample": lambda f, x, t: torch.func.vmap(torch.func.grad(f))(torch.stack([x, t])),
    "forward over reverse": lambda f, x, t: torch.func.jvp(torch.func.grad(f), (x,), (t,))[1],
    "reverse over forward": lambda f, x, t: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (t,))[1])(x),
}
OF_EACH_OP = {case[0]: case for case in reversed(SMALL)}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OF_EACH_OP)
def test_transforms_of_torch_func_give_the_values_of_eager_torch(name, transform):
    _, sizes, params = OF_EACH_OP[name]
    tensors = [t if t is None else t.detach() for t in inputs_of(name, sizes, params)]
    at = next(i for i, t in enumerate(tensors) if t.is_floating_point())
    tangent = torch.randn_like(tensors[at])
    got, truth = (
        TRANSFORMS[transform](scalar_function(call, inputs, at), inputs[at], tangent.to(inputs[at].dtype))
        for call, inputs in zip(op_call(name, params), (tensors, double(tensors)), strict=True)
    )
    assert_same([got], [truth], 2e-3)


def is_integer(tensor):
    return tensor is not None and not tensor.is_floating_point()


# torch cannot vmap the targets of F.cross_entropy with label smoothing.
WITH_INTEGERS = [
    case for case in SMALL if any(map(is_integer, inputs_of(*case))) and not case[2].get("label_smoothing")
]


@pytest.mark.parametrize("case", WITH_INTEGERS, ids=lambda case: case[0])
def test_vmap_runs_over_ids_targets_and_lengths(case):
    """Their values cannot be read then, so they are not checked."""
    name, _, params = case
    tensors, (call, _) = inputs_of(*case), op_call(name, params)
    tensors = [t if t is None else t.detach() for t in tensors]
    got = torch.func.vmap(call, tuple(0 if is_integer(t) else None for t in tensors))(
        *(torch.stack([t, t]) if is_integer(t) else t for t in tensors)
    )
    once = call(*tensors)
    pairs = zip(got, once, strict=True) if isinstance(once, tuple) else [(got, once)]
    for both, one in pairs:
        torch.testing.assert_close(both, torch.stack([one, one]), rtol=1e-4, atol=1e-5)


def scalar_function(call, tensors, at):
    """The sum of the cubes of all outputs as a function of one input."""

    def function(x):
        results = call(*tensors[:at], x, *tensors[at + 1 :])
        return sum(r.pow(3).sum() for r in (results if isinstance(results, tuple) else (results,)))

    return function


@pytest.mark.parametrize("path", ["direct", "library_op"])
@pytest.mark.parametrize("name", OF_EACH_OP)
def test_batched_gradients_and_tangents_of_gradients_are_those_of_eager_torch(name, path):
    """Only backward is transformed, after the forward pass of a backend: a backend would lose the batch or tangent."""
    _, sizes, params = OF_EACH_OP[name]
    is_silu = name in ("gated_mlp", "experts")  # torch's silu has no tangent of its gradient
    params = {"activation": "relu"} if is_silu else params
    tensors, (call, eager) = inputs_of(name, sizes, params), op_call(name, params)
    results = []
    for function, inputs, context in ((call, tensors, PATHS[path]), (eager, double(tensors), PATHS["direct"])):
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        with context():
            out = function(*inputs)
        out = out[-1] if isinstance(out, tuple) else out
        up, tangent = torch.linspace(1, 2, out.numel()).view_as(out).to(out), torch.ones_like(out)
        batched = torch.autograd.grad(out, wanted, torch.stack([up, tangent]), retain_graph=True, is_grads_batched=True)
        with forward_ad.dual_level():
            grads = torch.autograd.grad(out, wanted, forward_ad.make_dual(up, tangent))
            tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
        results.append([*batched, *tangents])
    assert_same(*results, 2e-3)
