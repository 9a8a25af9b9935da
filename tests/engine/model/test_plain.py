"""A part of GPT that was hooked, wrapped, replaced, parametrized, pruned or patched runs its own forward.

Generated over every module of several families and every kind of change. The reference of a changed model is the same
model with a hook on every other module too, so that no fused op runs.
"""

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.nn.utils import parametrizations, parametrize, prune

import peakgpt
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.executor import make_executor
from peakgpt.engine.inference.torch_executor import TorchExecutor
from peakgpt.engine.model.plain import change_of
from peakgpt.engine.model.recompute import set_recompute

V, T, NEW = 61, 7, 9
SIZES = {"vocab_size": V, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}
LLAMA = {"norm": "rms", "position": "rotary", "gated_mlp": True, "activation": "silu", "bias": False,
         "tied_head": False}  # fmt: skip
FAMILIES = {
    "gpt2": {},
    "llama": {**LLAMA, "n_kv_head": 1},
    "qk_norm": {**LLAMA, "n_kv_head": 1, "qk_norm": "head", "norm_offset": 1.0, "logit_softcap": 2.0},
    "parallel": {"residual": "parallel", "position": "rotary", "tied_head": False, "head_bias": True},
    "two_norms": {"residual": "parallel_two_norms", "position": "alibi", "embedding_norm": True},
    "sandwich_norm": {**LLAMA, "residual": "sandwich_norm", "embedding_scale": 5.5, "rotary_layers": (True, False)},
    "output_norm": {"residual": "output_norm", "position": "rotary", "norm": "rms", "bias": ("mlp",)},
    "post_norm": {"residual": "post_norm", "word_dim": 16, "position_offset": 2, "activation": "relu"},
    "experts": {"experts": 2, "z_loss": 1e-3, "tied_head": False},
    "relative_keys": {"position": "transformer_xl"},
    "relative_bias": {"position": "relative_bias", "windows": (4, None)},
}


@functools.cache
def base(family):
    torch.manual_seed(1)
    model = peakgpt.GPT(peakgpt.GPTConfig(**SIZES, **FAMILIES[family]))
    with torch.no_grad():
        for p in model.parameters():  # large weights: every change shows, and greedy tokens differ
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.dim() == 1 else 0.0))
    return model.train()


IDS = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(2))
TARGETS = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(3))


def module_names(family):
    """Every called module; of the blocks those of the last, and ln_1 of the first."""
    names = [n for n, m in base(family).named_modules() if not isinstance(m, nn.ModuleList | nn.ModuleDict)]
    return [n for n in names if not n.startswith("transformer.h.0") or n.endswith((".0", "ln_1", "c_attn"))]


def bend(value):
    """Change every floating tensor so that no norm undoes it, and every tensor of ids."""
    if isinstance(value, tuple):
        return type(value)(map(bend, value))
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_floating_point():
        return (value + 1) % V if value.dim() == 2 else value
    wave = torch.arange(value.shape[-1] if value.dim() else 1).sin().view(-1 if value.dim() else ())
    return value * 1.25 + 0.25 * wave


def set_module(model, name, new):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


class Wrap(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return bend(self.inner(*args, **kwargs))


class Bend(nn.Module):
    def forward(self, weight):
        return bend(weight)


# Each change takes (model, name of a module) and returns False where it does not apply.


def forward_hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda module, args, out: bend(out))


def forward_pre_hook(model, name):
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (bend(args[0]), *args[1:]))


def in_place_hook(model, name):
    if name.endswith("relative"):
        return False  # torch forbids it: the output is one of several views

    def hook(module, args, out):
        with torch.no_grad():  # raises the version, hides the multiplication from autograd
            out = out[0] if isinstance(out, tuple) else out
            out.mul_(bend(torch.ones_like(out)))

    model.get_submodule(name).register_forward_hook(hook)


def patched_forward(model, name):
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: bend(forward(*args, **kwargs))


def subclass(model, name):
    module = model.get_submodule(name)
    kind = type(module)
    module.__class__ = type(
        "Mine", (kind,), {"forward": lambda self, *args, **kwargs: bend(kind.forward(self, *args, **kwargs))}
    )


def wrapper(model, name):
    if not name or (name.endswith("wte") and model.config.tied_head):
        return False  # a tied head has no weight then: see test_a_tied_head_needs_a_weight
    set_module(model, name, Wrap(model.get_submodule(name)))


def parametrization(model, name):
    if model.get_submodule(name)._parameters.get("weight") is None:
        return False
    parametrize.register_parametrization(model.get_submodule(name), "weight", Bend())


def _is_matrix(model, name):
    return isinstance(model.get_submodule(name), nn.Linear | nn.Embedding)


def weight_norm(model, name):
    if not _is_matrix(model, name):
        return False
    module = parametrizations.weight_norm(model.get_submodule(name))
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(1.5)


def spectral_norm(model, name):
    if not _is_matrix(model, name):
        return False
    parametrizations.spectral_norm(model.get_submodule(name)).eval()


def orthogonal(model, name):
    if not _is_matrix(model, name):
        return False
    parametrizations.orthogonal(model.get_submodule(name))


def pruned(model, name):
    if model.get_submodule(name)._parameters.get("weight") is None:
        return False
    prune.l1_unstructured(model.get_submodule(name), "weight", amount=0.5)


def plain_tensor(model, name):
    """As in a replica of nn.DataParallel, or with weights that another network computes."""
    module = model.get_submodule(name)
    names = [n for n, p in module._parameters.items() if p is not None]
    for n in names:
        value = bend(module._parameters.pop(n).detach())
        setattr(module, n, value)
    return bool(names)


def buffer(model, name):
    module = model.get_submodule(name)
    if "weight" not in module._parameters:
        return False
    module.register_buffer("weight", bend(module._parameters.pop("weight").detach()))


def torch_norm(model, name):
    module = model.get_submodule(name)
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return False
    set_module(model, name, nn.LayerNorm(32, eps=0.5) if isinstance(module, nn.LayerNorm) else nn.Identity())


def identity_norm(model, name):
    if not isinstance(model.get_submodule(name), nn.LayerNorm | nn.RMSNorm):
        return False
    set_module(model, name, nn.Identity())


def identity_branch(model, name):
    if not name.endswith("mlp"):
        return False
    set_module(model, name, nn.Identity())


def linear_with_bias(model, name):
    old = model.get_submodule(name)
    if not isinstance(old, nn.Linear):
        return False
    new = nn.Linear(old.in_features, old.out_features)
    nn.init.normal_(new.bias)
    set_module(model, name, new)


def narrow_mlp(model, name):
    mlp = model.get_submodule(name)
    if not isinstance(mlp, peakgpt.nn.GELUMLP | peakgpt.nn.GatedMLP):
        return False
    for layer, sizes in {"c_fc": (32, 24), "c_gate": (32, 24), "c_proj": (24, 32)}.items():
        if hasattr(mlp, layer):
            setattr(mlp, layer, nn.Linear(*sizes))


def bounded_embedding(model, name):
    old = model.get_submodule(name)
    if not isinstance(old, nn.Embedding):
        return False
    old.max_norm = 0.5


CHANGES = [
    forward_hook, forward_pre_hook, in_place_hook, patched_forward, subclass, wrapper, parametrization, weight_norm,
    spectral_norm, orthogonal, pruned, plain_tensor, buffer, torch_norm, identity_norm, identity_branch,
    linear_with_bias, narrow_mlp, bounded_embedding,
]  # fmt: skip
CASES = [
    (family, change) for family in FAMILIES for change in CHANGES
    if family in ("gpt2", "llama") or change not in (subclass, weight_norm, spectral_norm, orthogonal, pruned, buffer)
]  # fmt: skip


@contextlib.contextmanager
def no_fused_ops():
    """Every module runs its own forward: a global hook that does nothing."""
    handle = register_module_forward_hook(lambda module, args, out: None)
    try:
        yield
    finally:
        handle.remove()


def losses_and_gradients(model):
    model.zero_grad()
    logits, loss = model(IDS), model(IDS, TARGETS)
    if loss.requires_grad:
        loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [logits.detach(), loss.detach(), *grads]


def assert_close(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-6)


def greedy(model, count):
    ids = IDS
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    return ids


@pytest.mark.parametrize(("family", "change"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_changed_module_runs_its_own_forward(family, change):
    plain = base(family)(IDS)
    for name in module_names(family):
        model = copy.deepcopy(base(family))
        if change(model, name) is False:
            continue
        got = losses_and_gradients(model)
        assert not torch.allclose(got[0], plain, atol=1e-4), name
        with no_fused_ops():
            assert_close(got, losses_and_gradients(model))
        if change is wrapper or (change is patched_forward and not name):
            model.eval()
            assert torch.equal(model.generate(IDS, max_new_tokens=NEW), greedy(model, NEW)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hook_of_every_module_runs_in_forward_and_backward(family):
    model, seen = copy.deepcopy(base(family)), set()

    def note(name, kind):
        return lambda *args: seen.add((name, kind))

    names = [n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList | nn.ModuleDict)]
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(note(name, "forward_pre"))
        module.register_forward_hook(note(name, "forward"))
        module.register_full_backward_pre_hook(note(name, "backward_pre"))
        module.register_full_backward_hook(note(name, "backward"))
    expected = losses_and_gradients(base(family))
    assert_close(losses_and_gradients(model), expected)
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    assert {(n, k) for n in names for k in kinds} - seen == set()
    seen.clear()
    model.eval().generate(IDS, max_new_tokens=NEW)
    assert {(n, k) for n in names for k in ("forward_pre", "forward")} - seen == set()


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_full_backward_hook])
@pytest.mark.parametrize("family", FAMILIES)
def test_global_hooks_see_every_module(family, register):
    model, seen = base(family), set()
    handle = register(lambda module, *args: seen.add(module))
    try:
        losses_and_gradients(model)
    finally:
        handle.remove()
    called = {m for m in model.modules() if not isinstance(m, nn.ModuleList | nn.ModuleDict)}
    assert called - seen == set()


def test_a_forward_that_was_assigned_to_a_class_runs(monkeypatch):
    for kind in (nn.Linear, nn.Embedding, peakgpt.nn.LayerNorm, peakgpt.nn.GELUMLP, peakgpt.nn.CausalSelfAttention):
        with monkeypatch.context() as patch:
            seen, forward = [], kind.forward

            def spy(self, *args, seen=seen, forward=forward):
                seen.append(self)
                return forward(self, *args)

            patch.setattr(kind, "forward", spy)
            base("gpt2")(IDS)
            assert {m for m in base("gpt2").modules() if type(m) is kind} == set(seen)
            assert change_of(base("gpt2"))
        assert change_of(base("gpt2")) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_and_scorer_follow_hooks_that_come_and_go(family):
    model = copy.deepcopy(base(family)).eval()
    engine, scorer = Engine(model, blocks=8, streams=2), Scorer(model)
    prompt, note = IDS[0].tolist(), engine.executor_note

    def check():
        expected = greedy(model, NEW)[0, T:].tolist()
        engine.submit(prompt, SamplingParams(max_tokens=NEW, temperature=0))
        assert [t for output in engine.outputs() for t in output.token_ids] == expected
        with torch.no_grad():
            logprobs = model(IDS[:1])[0, 3:-1].log_softmax(-1).gather(1, IDS[0, 4:, None])[:, 0]
        got = torch.tensor(scorer.score([(prompt[:4], prompt[4:])])[0].logprobs)
        torch.testing.assert_close(got, logprobs, rtol=1e-3, atol=1e-3)
        return expected, got.tolist()

    before = check()
    for name in ("", "transformer.h.1", "transformer.h.1.attn.c_proj"):
        handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: bend(out))
        assert check() != before
        handle.remove()
        assert check() == before and engine.executor_note == note
    new = nn.Linear(32, 32)
    model.transformer.h[0].attn.c_proj = new
    assert check() != before


MOVES = {
    "dtype": lambda model: model.bfloat16(),
    "assign": lambda model: model.load_state_dict({n: 1.5 * t for n, t in model.state_dict().items()}, assign=True),
    "data": lambda model: setattr(model.transformer.h[1].mlp.c_proj.weight, "data", torch.randn(32, 128)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_engine_and_scorer_follow_weights_that_move(move):
    """Mutation that makes it fail: weights at other addresses go unnoticed."""
    model = copy.deepcopy(base("gpt2")).eval()
    engine, scorer, prompt = Engine(model, blocks=8, streams=2), Scorer(model), IDS[0].tolist()

    def outputs(engine, scorer):
        (output,) = engine.stream(prompt, SamplingParams(max_tokens=1, temperature=0, logprobs=1))
        return output.logprobs, scorer.score([(prompt[:4], prompt[4:])])

    before = outputs(engine, scorer)
    assert before == outputs(engine, scorer)
    move(model)
    after = outputs(engine, scorer)
    assert after != before and after == outputs(Engine(model), Scorer(model))


def test_engine_refuses_a_change_while_requests_run():
    model = copy.deepcopy(base("gpt2")).eval()
    engine, params = Engine(model, blocks=8, streams=2), SamplingParams(max_tokens=NEW, temperature=0)
    engine.submit([1, 2], params)
    engine.step()
    model.transformer.wte.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="hooked or replaced while requests run"):
        engine.submit([1, 2], params)
    assert list(engine.outputs()) and engine.submit([1, 2], params) is not None


@pytest.mark.parametrize("change", [forward_hook, wrapper, narrow_mlp], ids=lambda change: change.__name__)
def test_a_changed_model_is_no_program(change):
    model = copy.deepcopy(base("llama")).eval()
    change(model, "transformer.h.1.mlp")
    executor = make_executor(model, 4)
    assert type(executor) is TorchExecutor and "C++ program" in executor.note


def test_blocks_that_are_copied_removed_or_shared_decode_as_they_run():
    model = copy.deepcopy(base("gpt2")).eval()
    h = model.transformer.h
    # With more blocks than the config has, the KV cache has too few layers.
    for blocks in ([h[1], h[0]], [h[0], copy.deepcopy(h[0])], [h[1], h[1]], [h[0]]):
        model.transformer.h = nn.ModuleList(blocks)
        assert torch.equal(model.generate(IDS, max_new_tokens=NEW), greedy(model, NEW))
    model.transformer.h = nn.ModuleList([*h, *h])
    assert model(IDS).isfinite().all()
    with pytest.raises(ValueError, match="got 4 blocks, expected at most n_layer 2"):
        model.generate(IDS, max_new_tokens=1)


def test_a_head_with_a_hook_a_bias_or_an_adapter_computes_the_loss():
    for change in (forward_hook, linear_with_bias, wrapper):
        model = copy.deepcopy(base("llama"))
        change(model, "lm_head")
        loss, logits = model(IDS, TARGETS, return_logits=True)
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(model(IDS, TARGETS), expected)


@pytest.mark.parametrize("plan", ["norm", "mlp", "block"])
@pytest.mark.parametrize("change", [in_place_hook, patched_forward], ids=lambda change: change.__name__)
def test_recomputation_runs_the_changed_modules_again(plan, change):
    for name in module_names("llama"):
        model = copy.deepcopy(base("llama"))
        if change(model, name) is False:
            continue
        expected = losses_and_gradients(model)
        set_recompute(model, plan)
        assert_close(losses_and_gradients(model), expected)


def test_compiled_models_run_hooks_and_wrappers():
    model = copy.deepcopy(base("llama"))
    forward_hook(model, "transformer.h.1.attn.c_attn")
    wrapper(model, "transformer.h.0.ln_2")
    parametrization(model, "transformer.wte")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS), rtol=1e-4, atol=1e-4)
