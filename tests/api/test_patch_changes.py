"""A module of a patched model that changes later does what it does in the unpatched model."""

import copy

import pytest
import torch
from module_changes import CHANGES, change, check_changes, expect_same, run_language_model
from tiny_transformers import FAMILIES, build, close
from torch import nn

import peakgpt

CHANGED = [*FAMILIES, "t5, gated"]


@pytest.mark.parametrize("name", CHANGED)
def test_change_after_patch_has_the_effect_of_the_same_change_without_patch(name):
    of = 41
    check_changes(build(name), run_language_model, CHANGED.index(name) % of, of)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
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


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt2", "transformer.h.0.mlp.c_fc"), ("gpt2", "transformer.h.0.attn.c_attn"), ("gpt2", "transformer.h.0.ln_2"),
     ("llama", "model.layers.0.mlp.gate_proj"), ("bert", "bert.encoder.layer.0.output.dense"), ("llama", "lm_head")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["spectral_norm", "forward of the instance", "backward hook"])
def test_changed_layer_of_a_fused_module_runs_once(family, name, kind):
    assert kind in CHANGES
    plain = build(family, tie_word_embeddings=False)
    patched = copy.deepcopy(plain)
    peakgpt.patch(patched, check=False)
    plain, patched = (change(model, name, kind) for model in (plain, patched))
    expect_same(run_language_model(patched), run_language_model(plain), kind)
