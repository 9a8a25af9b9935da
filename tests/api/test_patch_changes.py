"""A patched model that changes later computes what the unpatched model computes after the same change."""

import copy
import itertools
import re

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
