"""Wherever torch has a default, peakgpt.nn, the ops, AdamW and patched layers have the same one."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peakgpt

PAIRS = [
    (peakgpt.nn.LayerNorm, nn.LayerNorm),
    (peakgpt.nn.RMSNorm, nn.RMSNorm),
    (peakgpt.nn.CausalSelfAttention, nn.MultiheadAttention),
    (peakgpt.nn.LinearCrossEntropyLoss, nn.CrossEntropyLoss),
    (peakgpt.AdamW, torch.optim.AdamW),
    (peakgpt.layernorm, F.layer_norm),
    (peakgpt.rmsnorm, F.rms_norm),
    (peakgpt.linear_cross_entropy, F.cross_entropy),
]
# A required bias has no default in torch's function.
SAME_NAME_OTHER_MEANING = {("linear_cross_entropy", "weight")}


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=[ours.__name__ for ours, _ in PAIRS])
def test_parameters_named_as_torchs_have_torchs_defaults_and_places(ours, torchs):
    """A parameter that can be given by position has the place of torch's, or a call would mean something else."""
    mine, reference = parameters(ours), parameters(torchs)
    shared = [n for n in mine if n in reference and (ours.__name__, n) not in SAME_NAME_OTHER_MEANING]
    assert shared
    for name in shared:
        if mine[name].default is not inspect.Parameter.empty:
            assert mine[name].default == reference[name].default, name
        if isinstance(ours, type) and mine[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert list(mine).index(name) == list(reference).index(name), name


def test_attention_has_the_default_scale_of_torchs():
    q, k, v = torch.randn(3, 1, 5, 2, 16).unbind()
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(peakgpt.attention(q, k, v, causal=False), expected)


def test_an_adamw_step_without_options_is_torchs():
    plain = nn.Linear(8, 8)
    tuned = copy.deepcopy(plain)
    x = torch.randn(4, 8)
    for model, optimizer in ((plain, torch.optim.AdamW), (tuned, peakgpt.AdamW)):
        optimizer = optimizer(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(plain.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(a, b)


LAYERS = {
    "Linear": lambda: nn.Linear(24, 40),
    "LayerNorm": lambda: nn.LayerNorm(24),
    "RMSNorm": lambda: nn.RMSNorm(24),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(24, 2, 40, batch_first=True),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(24, 2, 40, batch_first=True),
    "MultiheadAttention": lambda: nn.MultiheadAttention(24, 2, batch_first=True),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("scale", (1.0, 0.05, 1e-3))
@pytest.mark.parametrize("name", LAYERS)
def test_patched_layers_made_with_torchs_defaults_have_torchs_values(name, scale, dtype):
    """Small inputs show the eps of a norm; an eps of the input's dtype is off by all of the output."""
    torch.manual_seed(0)
    plain = LAYERS[name]().eval().to(dtype)
    patched, wide = copy.deepcopy(plain), copy.deepcopy(plain).double()
    for part in wide.modules():
        if isinstance(part, nn.RMSNorm):
            part.eps = torch.finfo(torch.float32).eps  # of the dtype in which torch computes
    peakgpt.patch(patched)
    x = (scale * torch.randn(2, 7, 24)).to(dtype)
    count = {"TransformerDecoderLayer": 2, "MultiheadAttention": 3}.get(name, 1)
    options = {"need_weights": False} if name == "MultiheadAttention" else {}
    with torch.no_grad():
        results = [model(*[t] * count, **options) for model, t in ((plain, x), (patched, x), (wide, x.double()))]
    theirs, ours, truth = (r[0] if isinstance(r, tuple) else r for r in results)
    errors = [(r.double() - truth).abs().max().item() for r in (theirs, ours)]
    assert errors[1] <= 2 * errors[0] + 1e-6 * truth.abs().max().item(), errors


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_rmsnorm_without_eps_is_torchs_as_op_and_as_layer(dtype):
    x, w = (0.05 * torch.randn(5, 24)).to(dtype), torch.randn(24).to(dtype)
    layer = peakgpt.nn.RMSNorm(24).to(dtype)
    torch.testing.assert_close(peakgpt.rmsnorm(x, w), F.rms_norm(x, (24,), w))
    torch.testing.assert_close(layer(x), nn.RMSNorm(24).to(dtype)(x))
    total, normed = peakgpt.add_rmsnorm(x, x, torch.ones_like(w))
    torch.testing.assert_close(normed, F.rms_norm(total, (24,)))
