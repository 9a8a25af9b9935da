"""Soft cap and sinks of attention: transformers' own functions, float64 derivatives, and what holds bitwise.

Mutations that these tests detect: the cap after the mask or missing in the backward pass; a sink left out of the
denominator, of the maximum or of lse; the gradient of the sinks with the other sign.
"""

from types import SimpleNamespace

import pytest
import torch

from peakgpt.kernels.core.dispatch import load, use_backend
from peakgpt.kernels.ops.attention import attention
from peakgpt.kernels.ops.attention_math import default_scale, live_mask

BACKENDS = ("eager", "cpu", "gpu")
WINDOW, SOFTCAP, SCALE = 9, 1.5, 0.3


def draw(*, batch=2, tokens=21, heads=4, kv_heads=2, width=16, dtype=torch.float32):
    """Return q, k, v, sinks and a gradient of the output."""
    torch.manual_seed(3)
    shapes = (batch, tokens, heads, width), (batch, tokens, kv_heads, width), (batch, tokens, kv_heads, width)
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in (*shapes, (heads,))]
    return leaves, torch.randn(shapes[0], dtype=dtype)


def gradients(out, leaves, upstream):
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def transformers_result(module_name, q, k, v, sinks, **options):
    """Return transformers' eager attention in a causal window, (B, T, H, D)."""
    modeling = pytest.importorskip(f"transformers.models.{module_name}.modeling_{module_name}")
    module = SimpleNamespace(num_key_value_groups=q.shape[2] // k.shape[2], training=False, sinks=sinks)
    mask = torch.zeros(q.shape[1], k.shape[1]).masked_fill(~live_mask(q, k, True, WINDOW)[0, 0], -torch.inf)
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return modeling.eager_attention_forward(module, *heads, mask[None, None], scaling=SCALE, **options)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_equals_that_of_gemma_2(backend):
    (*leaves, _), upstream = draw()
    expected = gradients(transformers_result("gemma2", *leaves, None, softcap=SOFTCAP), leaves, upstream)
    with use_backend(backend):
        out = attention(*leaves, window=WINDOW, scale=SCALE, softcap=SOFTCAP)
        results = gradients(out, leaves, upstream)
    for got, right in zip(results, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_equal_those_of_gpt_oss(backend):
    leaves, upstream = draw()
    expected = gradients(transformers_result("gpt_oss", *leaves), leaves, upstream)
    with use_backend(backend):
        out = attention(*leaves[:3], window=WINDOW, scale=SCALE, sinks=leaves[3])
        results = gradients(out, leaves, upstream)
    for got, right in zip(results, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", ({}, {"causal": False, "seed": torch.tensor([5]), "dropout": 0.3}), ids=str)
def test_derivatives_of_the_eager_mathematics_equal_finite_differences(options):
    leaves, _ = draw(batch=1, tokens=5, width=2, dtype=torch.float64)
    terms = [torch.tensor([0.5, -0.25, 0.125, 1.0]), torch.randn(1, 4, 5, 5)]
    leaves += [t.double().requires_grad_() for t in terms]

    def call(q, k, v, sinks, alibi, bias):
        return attention.eager(q, k, v, sinks=sinks, alibi=alibi, bias=bias, softcap=SOFTCAP, **options)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize("tokens", (3, 21))
def test_saved_lse_includes_the_sink(backend, tokens):
    """A query without a live key has the lse of its sink alone, and gives zero."""
    q, k, v, sinks = (t.detach() for t in draw(batch=1, tokens=tokens)[0])
    start, needs = torch.tensor([2]), (True,) * len(attention.tensor_names)
    tensors, params = attention.bind((q, k, v), {"kv_start": start, "sinks": sinks, "softcap": SOFTCAP})
    (out,), (lse,) = attention.alloc(*tensors, needs=needs, **params)
    out.fill_(torch.nan), lse.fill_(torch.nan)
    load(backend, "attention").forward((out,), (lse,), *tensors, **params)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * default_scale(16, None)
    scores = (SOFTCAP * (scores / SOFTCAP).tanh()).masked_fill(~live_mask(q, k, True, None, start), -torch.inf)
    column = sinks[None, :, None, None].expand(1, 4, tokens, 1)
    torch.testing.assert_close(lse, torch.cat((scores, column), -1).logsumexp(-1))
    assert not out[:, :2].any() and out[:, 2:].all()


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
@pytest.mark.parametrize("tokens", (3, 21))
def test_a_sink_of_minus_infinity_changes_no_bits(backend, tokens):
    (*leaves, sinks), upstream = draw(tokens=tokens)
    with use_backend(backend):
        plain = gradients(attention(*leaves), leaves, upstream)
        sunk = gradients(attention(*leaves, sinks=torch.full_like(sinks, -torch.inf)), leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(plain, sunk, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_gradient_of_the_sinks_has_their_dtype(backend, dtype):
    leaves, upstream = draw()
    q, k, v = (t.detach() for t in leaves[:3])
    sinks = leaves[3].detach().to(dtype).requires_grad_()
    with use_backend(backend):
        out = attention(q, k, v, sinks=sinks)
        (grad,) = torch.autograd.grad(out, sinks, upstream)
        (expected,) = torch.autograd.grad(attention(q, k, v, sinks=(wide := sinks.float())), wide, upstream)
    assert out.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(grad, expected.to(dtype))


def test_autocast_does_not_round_the_sinks():
    """In bfloat16 a sink of 2.003 would be 2."""
    leaves, _ = draw()
    sinks = torch.full((4,), 2.003)
    with torch.autocast("cpu", torch.bfloat16):
        out, rounded = (attention(*leaves[:3], sinks=s) for s in (sinks, sinks.bfloat16()))
    assert out.dtype == torch.bfloat16 and not torch.equal(out, rounded)
