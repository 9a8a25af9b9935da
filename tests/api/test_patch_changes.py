"""A patched model that changes later computes what the unpatched model computes after the same change."""

import copy
import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.utils as U
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from tiny_transformers import MODELS, batch, build, close, outputs_of, train_step
from torch import nn

import peakgpt


def scaled(y):
    """Scale the first tensor of an output."""
    return y * 1.25 if isinstance(y, torch.Tensor) else (scaled(y[0]), *y[1:]) if isinstance(y, tuple) else y


class Wrapped(nn.Module):
    """What an adapter does: it calls the layer, and shows its weight."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, getattr(base, "weight", None), getattr(base, "bias", None)

    def forward(self, *args, **kwargs):
        return scaled(self.base(*args, **kwargs))


class Scale(nn.Module):
    def forward(self, w):
        return w * 1.5


class Weight(torch.Tensor):
    """A weight with its own arithmetic, as a quantized one."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            plain = [a.as_subclass(torch.Tensor) * 0.5 if type(a) is Weight else a for a in args]
            return function(*plain, **(kwargs or {}))


def wrap(parent, name, module):
    setattr(parent, name, Wrapped(module))


def hook_as_accelerate(module):
    module._old_forward = module.forward
    module.forward = lambda *args, **kwargs: scaled(module._old_forward(*args, **kwargs))


def prune(module):
    torch.manual_seed(3)
    U.prune.random_unstructured(module, "weight", 0.5)


def subclass_weight(module):
    weight = module.weight.detach().as_subclass(Weight)
    del module.weight
    module.weight = weight


CHANGES = {
    "forward hook": lambda parent, name, m: m.register_forward_hook(lambda m, x, y: scaled(y)),
    "forward pre-hook": lambda parent, name, m: m.register_forward_pre_hook(
        lambda m, args, kwargs: (scaled(args), kwargs), with_kwargs=True
    ),
    "backward hook": lambda parent, name, m: m.register_full_backward_hook(lambda m, dx, dy: scaled(dx)),
    "backward pre-hook": lambda parent, name, m: m.register_full_backward_pre_hook(lambda m, dy: scaled(dy)),
    "forward of the instance": lambda parent, name, m: hook_as_accelerate(m),
    "wrapped": wrap,
    "another weight": lambda parent, name, m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 2)),
    "parametrized": lambda parent, name, m: U.parametrize.register_parametrization(m, "weight", Scale()),
    "weight_norm": lambda parent, name, m: U.parametrizations.weight_norm(m),
    "weight_norm by a hook": lambda parent, name, m: U.weight_norm(m),
    "pruned": lambda parent, name, m: prune(m),
    "weight of a subclass": lambda parent, name, m: subclass_weight(m),
    "frozen": lambda parent, name, m: m.requires_grad_(False),
    "moved": lambda parent, name, m: m._apply(torch.clone),
    "another dropout rate": lambda parent, name, m: setattr(m, "p", 0.999999),
    "dropout alone in train()": lambda parent, name, m: (setattr(m, "p", 0.999999), setattr(m, "train", lambda _: m)),
    "another activation": lambda parent, name, m: setattr(parent, name, nn.Tanh()),
}  # fmt: skip
ON_WEIGHTS = {"another weight", "parametrized", "weight_norm", "weight_norm by a hook", "pruned",
              "weight of a subclass"}  # fmt: skip


def applies(change, module):
    if change.startswith(("another dropout", "dropout alone")):
        return type(module) is nn.Dropout
    if change == "another activation":
        return "activation" in type(module).__module__
    if change in ON_WEIGHTS:
        return isinstance(getattr(module, "weight", None), nn.Parameter)
    return not isinstance(module, nn.ModuleList)


def modules_of(model):
    """Return the name of one module of each kind: blocks repeat."""
    names = {re.sub(r"\d+", "*", name): name for name, _ in model.named_modules() if name}
    return list(names.values())


def change(model, name, kind):
    above, _, last = name.rpartition(".")
    parent = model.get_submodule(above)
    CHANGES[kind](parent, last, model.get_submodule(name))
    return model


def results(model, run):
    torch.manual_seed(5)
    try:
        return run(model)
    except Exception as error:
        return error


def run_language_model(model):
    inputs, labels = batch(model)
    loss, grads = train_step(model, labels, inputs)
    return {"outputs": outputs_of(model, inputs), "loss": loss, **grads}


def expect_same(got, expected, what):
    if isinstance(expected, Exception):  # a change that the unpatched model does not allow
        return
    assert not isinstance(got, Exception), f"{what}: {type(got).__name__}: {got}"
    assert got.keys() == expected.keys(), what
    for key, value in expected.items():
        try:
            close(got[key].float(), value.float(), 1e-3)
        except AssertionError:
            raise AssertionError(f"{what}: {key} differs") from None


def check_changes(model, run, share, of):
    """Try the part `share` of all pairs of a module and a change, in `of` parts."""
    patched = copy.deepcopy(model)
    peakgpt.patch(patched, check=False)
    pairs = [(n, c) for n, c in itertools.product(modules_of(model), CHANGES) if applies(c, model.get_submodule(n))]
    assert len(pairs) > of
    for name, kind in pairs[share::of]:
        plain, other = (change(copy.deepcopy(m), name, kind) for m in (model, patched))
        expected = results(plain, run)
        expect_same(results(other, run), expected, f"{name}, {kind}")
        peakgpt.unpatch(other)
        expected, again = results(plain, run), results(other, run)
        assert isinstance(expected, Exception) or all(torch.equal(again[k], v) for k, v in expected.items()), (
            f"{name}, {kind}, after unpatch"
        )
        assert not any("eakgpt" in str(vars(m).keys()) + str(type(m).__mro__) for m in other.modules())


FAMILIES = [name for name in MODELS if "," not in name or name == "t5, gated"]


@pytest.mark.parametrize("name", FAMILIES)
def test_change_after_patch_has_the_effect_of_the_same_change_without_patch(name):
    of = 41
    check_changes(build(name), run_language_model, FAMILIES.index(name) % of, of)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_change_after_patch_has_the_effect_of_the_same_change_without_patch(name):
    check_changes(build(name), run_language_model, 0, 1)


class Attention(nn.Module):
    """A user's attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Torch(nn.Module):
    """Layers of torch and of a user."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, activation="gelu", batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.user = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Dropout(0.0), nn.Linear(48, 32))
        self.norm, self.attention = nn.RMSNorm(32), Attention()

    def forward(self, x):
        y = self.encoder(x)
        return self.attention(self.norm(self.decoder(x, y))) + self.user(y)


def run_torch(model):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32, requires_grad=True)
    model.train()(x).square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        return {"outputs": model.eval()(x), "x": x.grad, **grads}


@pytest.mark.parametrize("share", [0, pytest.param(None, marks=pytest.mark.slow)])
def test_change_in_layers_of_torch_after_patch_has_its_effect(share):
    torch.backends.mha.set_fastpath_enabled(False)  # torch's own fast path ignores changes of the layers inside
    try:
        torch.manual_seed(0)
        check_changes(Torch(), run_torch, share or 0, 17 if share == 0 else 1)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_layer_appended_to_a_detected_mlp_runs():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    peakgpt.patch(model)
    model.append(nn.Tanh())
    x = torch.randn(3, 8)
    close(model(x), torch.tanh(model[2](torch.nn.functional.gelu(model[0](x)))))


# ---- changes of a whole model


def lora(model):
    peft = pytest.importorskip("peft")
    targets = [n for n, m in model.named_modules() if "Linear" in type(m).__name__ or "Conv1D" in type(m).__name__]
    heads = ("lm_head", "cls", "vocab", "pooler")
    config = peft.LoraConfig(target_modules=[n for n in targets if not n.startswith(heads)], init_lora_weights=False)
    torch.manual_seed(7)
    return peft.get_peft_model(model, config)


def merged(model):
    return lora(model).merge_and_unload().requires_grad_(True)


def new_head(model):
    torch.manual_seed(7)
    model.set_output_embeddings(nn.Linear(32, model.config.vocab_size, bias=False))
    return model


def resized(model):
    torch.manual_seed(7)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    with torch.no_grad():
        for parameter in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            parameter[-8:] = 0.1
    return model


def eager_attention(model):
    model.set_attn_implementation("eager")
    return model


WHOLE = {
    "resized": resized, "new head": new_head, "LoRA": lora, "LoRA merged": merged,
    "double": lambda m: m.double(), "eager attention": eager_attention,
    "every hook": lambda m: [p.register_forward_hook(lambda *_: None) for p in m.modules()] and m,
    "frozen but the norms": lambda m: [
        p.requires_grad_("norm" in n.lower() or "ln" in n) for n, p in m.named_parameters()] and m,
    "fewer layers": lambda m: [
        setattr(p, "_modules", dict(list(p._modules.items())[:1])) for n, p in m.named_modules()
        if n.endswith((".h", ".layers", ".block", "encoder.layer"))] and m,
}  # fmt: skip


TIED = [("resized", True), *((name, name in ("LoRA", "double", "every hook", "fewer layers")) for name in WHOLE)]


@pytest.mark.parametrize(("change_model", "tied"), TIED)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "bart", "gptj"])
def test_change_of_the_whole_model_after_patch_has_its_effect(name, change_model, tied):
    model = build(name, tie_word_embeddings=tied)
    patched = copy.deepcopy(model)
    peakgpt.patch(patched, check=False)
    plain, other = (WHOLE[change_model](m) for m in (model, patched))
    expected = results(plain, run_language_model)
    assert not isinstance(expected, Exception), expected
    expect_same(results(other, run_language_model), expected, change_model)
    peakgpt.unpatch(other)
    again = results(other, run_language_model)
    assert all(torch.equal(again[key], value) for key, value in expected.items())


def test_model_with_adapters_is_patched_and_merged_later():
    model = lora(build("llama"))
    expected = run_language_model(model)
    peakgpt.patch(model)
    expect_same(run_language_model(model), expected, "LoRA before patch")
    inputs, _ = batch(model)
    close(outputs_of(copy.deepcopy(model).merge_and_unload(), inputs), expected["outputs"], 1e-3)
    peakgpt.unpatch(model)
    assert torch.equal(run_language_model(model)["outputs"], expected["outputs"])


def test_torch_ao_quantizes_before_patch_and_raises_after_it():
    """It finds layers by their exact class. Regression: it quantized nothing, without a word."""
    quantize = torch.ao.quantization.quantize_dynamic
    model = build("llama").eval()
    patched = copy.deepcopy(model)
    peakgpt.patch(patched, check=False)
    with pytest.raises(ValueError, match=r"call peakgpt\.unpatch before the quantization and peakgpt\.patch after it"):
        quantize(patched, {nn.Linear})
    inputs, _ = batch(model)
    quantized = quantize(model, {nn.Linear})
    expected = outputs_of(quantized, inputs)
    peakgpt.patch(quantized)
    close(outputs_of(quantized, inputs), expected, 1e-3)


def test_linear_layers_are_replaced_by_quantized_ones_after_patch():
    """What bitsandbytes does: a new class and another weight in the place of each nn.Linear."""

    class Int8Linear(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.scale = layer.weight.detach().abs().max() / 127
            self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
            self.bias = layer.bias

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    for name in ("llama", "bert", "opt"):
        model = build(name)
        patched = copy.deepcopy(model)
        peakgpt.patch(patched)
        for each in (model, patched):
            for path, module in list(each.named_modules()):
                if isinstance(module, nn.Linear) and not path.startswith(("lm_head", "cls")):
                    each.set_submodule(path, Int8Linear(module))
        inputs, _ = batch(model)
        close(outputs_of(patched, inputs), outputs_of(model, inputs))


def test_accelerate_hooks_before_and_after_patch():
    hooks = pytest.importorskip("accelerate.hooks")

    class Scaling(hooks.ModelHook):
        def post_forward(self, module, output):
            return scaled(output)

    for first in (True, False):
        model = build("gpt2")
        patched = copy.deepcopy(model)
        steps = [lambda m: peakgpt.patch(m), lambda m: hooks.add_hook_to_module(m.transformer.h[0].mlp.c_fc, Scaling())]
        for step in steps if first else steps[::-1]:
            step(patched)
        steps[1](model)
        expected = run_language_model(model)
        expect_same(run_language_model(patched), expected, "hook")
        peakgpt.unpatch(patched)
        assert torch.equal(run_language_model(patched)["outputs"], expected["outputs"])


def test_unpatch_raises_on_a_foreign_forward_and_changes_nothing():
    model = build("gpt2")
    inputs, _ = batch(model)
    peakgpt.patch(model)
    expected = outputs_of(model, inputs)
    forward = model.transformer.h[1].mlp.forward
    model.transformer.h[1].mlp.forward = lambda x: forward(x)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp, a GPT2MLP whose attribute `forward` was set after"):
        peakgpt.unpatch(model)
    close(outputs_of(model, inputs), expected)
    del model.transformer.h[1].mlp.forward
    peakgpt.unpatch(model)


def test_threads_do_not_see_the_head_of_each_other():
    """Regression: a head that passes its input through for a training step did so for a thread that generates too."""
    model = build("llama")
    inputs, labels = batch(model)
    peakgpt.patch(model, check=False)
    model.train()
    seen = []

    def generate_meanwhile(*_):
        if not seen:
            seen.append(None)
            with ThreadPoolExecutor(1) as pool:
                seen[0] = pool.submit(lambda: model(inputs["input_ids"]).logits.shape[-1]).result()

    model.model.norm.register_forward_hook(generate_meanwhile)
    model.lm_head.register_forward_pre_hook(generate_meanwhile)
    model(**inputs, labels=labels)
    assert seen == [model.config.vocab_size]
