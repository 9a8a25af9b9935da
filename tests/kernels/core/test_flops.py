"""Ops in torch's tools: FlopCounterMode counts every op as its eager function, and a profile names every op."""

import contextlib
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import peakgpt
from peakgpt.bench.check import CASES, sample
from peakgpt.kernels.core import flops
from peakgpt.kernels.core.dispatch import OPS, use_backend
from peakgpt.kernels.ops import catalogue

FLAT = [("adamw", {"count": 37}, {"lr": 0.5}), ("sum_of_squares", {"count": 37}, {})]
OF_EACH_OP = {name: (sizes, params) for name, sizes, params in reversed([*CASES, *FLAT])}
MATMUL = set(catalogue.__all__) - {
    "adamw", "add_layernorm", "add_rmsnorm", "cache_store", "dropout", "embedding", "layernorm", "qk_norm", "rmsnorm",
    "rotary", "sum_of_squares",
}  # fmt: skip


def run(name, tensors, params):
    """Call an op, and compute its gradients where tensors require one."""
    results = OPS[name](*tensors, **params)
    results = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None and r.requires_grad]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    if wanted:
        torch.autograd.grad(results, wanted, [torch.ones_like(r) for r in results], allow_unused=True)


def counted(call, backend=None):
    with FlopCounterMode(display=False) as counter, use_backend(backend) if backend else contextlib.nullcontext():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", sorted(catalogue.__all__))
def test_every_op_counts_as_its_eager_function(name):
    """Without a gradient, with all gradients, and with the gradient of each input alone, as in fine-tuning."""
    sizes, params = OF_EACH_OP[name]
    every = sample(name, sizes, torch.float32)
    trainable = [i for i, t in enumerate(every) if t is not None and t.requires_grad]
    for chosen in ((), trainable, *([i] for i in trainable)):
        tensors = [t if t is None else t.detach().requires_grad_(i in chosen) for i, t in enumerate(every)]
        ours, eager = (counted(lambda t=tensors: run(name, t, params), backend) for backend in (None, "eager"))
        assert ours == eager, f"gradients of {chosen}: {ours} FLOPs, eager {eager}"
        assert (ours > 0) == (name in MATMUL)


def test_causal_attention_counts_all_pairs():
    """As in torch: 2 products of 2 D FLOPs forward, 5 backward, over T x S pairs."""
    q = torch.randn(1, 16, 2, 8, requires_grad=True)
    assert counted(lambda: peakgpt.attention(q, q, q).sum().backward()) == (4 + 10) * 8 * 2 * 16 * 16


def test_a_split_head_counts_its_own_rows():
    op, packet = OPS["linear_cross_entropy"], torch.ops.peakgpt.linear_cross_entropy
    params = {**op._param_defaults, "group": "no such group", "first": 10, "vocab": 100}
    flops.give_to_counters()  # an op gives its formula when it runs, so here after another test only
    formula = flop_registry[packet]
    arguments = torch.randn(4, 8), torch.randn(10, 8), torch.zeros(4, dtype=torch.long), None
    assert formula(*arguments, *(params[n] for n in op.param_names), "", [False] * 4) == 2 * 4 * 8 * 10


def small_gpt(**options):
    torch.manual_seed(0)
    config = peakgpt.GPTConfig(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=64, **options)
    return peakgpt.GPT(config)


IDS = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"norm": "rms", "position": "rotary", "bias": False}])
def test_gpt_counts_as_with_the_eager_backend(options):
    model = small_gpt(**options)
    ours, eager = (counted(lambda: model(IDS, IDS).backward(), backend) for backend in (None, "eager"))
    assert ours == eager > 0


def test_patched_model_counts_as_the_unpatched_one():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=300, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    model.set_attn_implementation("eager")
    plain = counted(lambda: model(IDS, labels=IDS).loss.backward())
    peakgpt.patch(model)
    patched = counted(lambda: model(IDS, labels=IDS).loss.backward())
    assert abs(patched - plain) <= 0.02 * plain


def test_compiled_call_counts():
    torch._dynamo.reset()
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    compiled = torch.compile(lambda x: peakgpt.linear(x, w).relu(), backend="aot_eager")
    compiled(x)
    assert counted(lambda: compiled(x)) == 2 * 4 * 8 * 6


@pytest.mark.parametrize("first", ["peakgpt", "torch.utils.flop_counter"])
def test_order_of_imports_does_not_matter(first):
    """peakgpt does not import torch.utils.flop_counter, which imports Triton."""
    code = f"""
import torch, {first}, peakgpt
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    peakgpt.linear(torch.ones(2, 3), torch.ones(4, 3))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "48"


# ---- profiles ----


@pytest.mark.parametrize("mode", ["direct", "library_op", "no_grad"])
@pytest.mark.parametrize("name", sorted(catalogue.__all__))
def test_profile_names_every_op_forward_and_backward(name, mode):
    sizes, params = OF_EACH_OP[name]
    tensors = sample(name, sizes, torch.float32)
    grad = torch.no_grad() if mode == "no_grad" else contextlib.nullcontext()
    as_library_op = FlopCounterMode(display=False) if mode == "library_op" else contextlib.nullcontext()
    if mode == "no_grad":
        tensors = [t if t is None else t.detach() for t in tensors]
    with grad, as_library_op, profile(activities=[ProfilerActivity.CPU]) as seen:
        run(name, tensors, params)
    names = {event.key.split("::")[-1] for event in seen.key_averages() if "peakgpt::" in event.key}
    if name not in ("attention_decode", "cache_store") or mode == "library_op":  # the CPU runs them by eager torch
        assert name in names
    if OPS[name].gradient and mode != "no_grad":
        assert f"{name}Backward" in names or f"{name}_backward" in names


def test_node_of_an_op_has_its_name():
    x = torch.randn(2, 8, requires_grad=True)
    assert peakgpt.layernorm(x, torch.ones(8)).grad_fn.name() == "peakgpt::layernormBackward"
