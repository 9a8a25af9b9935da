"""Changes of a module that was patched, and their comparison with the same changes of the unpatched module."""

import copy
import itertools
import re

import torch
import torch.nn.utils as U
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from tiny_transformers import batch, close, outputs_of, train_step
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


def spectral_norm(module):
    torch.manual_seed(3)
    U.parametrizations.spectral_norm(module)  # each reading of the weight changes its state


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
    "spectral_norm": lambda parent, name, m: spectral_norm(m),
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
ON_WEIGHTS = {"another weight", "parametrized", "spectral_norm", "weight_norm", "weight_norm by a hook", "pruned",
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
