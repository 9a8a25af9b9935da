"""A query that sees no key gives zero in every form of a mask, and no row depends on the masks of other rows."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import FAMILIES, TOKENS, VOCAB, build
from torch import nn

import peakgpt

FORMS = ("bool", "-inf", "lowest")


def mask_as(form, live):
    """Write a mask of live keys in one of the forms that models use."""
    if form == "bool":
        return live
    return torch.zeros(live.shape).masked_fill(~live, float("-inf") if form == "-inf" else torch.finfo().min)


def torch_mask(form, live):
    """Write a mask for the layers of torch, where True means masked."""
    return None if form is None else ~live if form == "bool" else mask_as(form, live)


def holes(seed, *shape):
    """Return random live pairs; some rows have none."""
    generator = torch.Generator().manual_seed(seed)
    live = torch.rand(shape, generator=generator) > 0.4
    return live & (torch.rand(*shape[:-1], 1, generator=generator) > 0.3)


def truth(q, k, v, live):
    """Attention of (B, H, T, D) tensors in float64, zero without a live key."""
    q, k, v = (t.double() for t in (q, k, v))
    dead = ~live.any(-1, keepdim=True)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~(live | dead), float("-inf"))
    weights = scores.softmax(-1).masked_fill(dead, 0.0)
    return weights @ v, weights


def gradients(y, tensors):
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((y * upstream).sum(), tensors)


class CallsSDPA(nn.Module):
    def forward(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 5), (1, 1, 5, 5), (2, 1, 5, 5), (2, 2, 5, 5)], ids=str)
def test_replaced_sdpa_gives_zero_and_finite_gradients(form, shape):
    module = CallsSDPA()
    peakgpt.patch(module)
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3)]
    live = holes(1, *shape)
    assert not live.any(-1).all()
    expected = truth(*tensors, live)[0]
    got = module(*tensors, mask_as(form, live))
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)
    assert not got[~live.any(-1).expand(2, 2, 5)].any()
    for ours, right in zip(gradients(got, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def multihead_truth(layer, x, live):
    """Return output and weights of nn.MultiheadAttention for live pairs, (B, H, T, S)."""
    q, k, v = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
               for t in F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1))  # fmt: skip
    y, weights = truth(q, k, v, live)
    return layer.out_proj(y.float().transpose(1, 2).flatten(2)), weights.float()


@pytest.mark.parametrize(
    ("form", "padding_form", "weights", "training"),
    [case for i, case in enumerate(itertools.product((None, *FORMS), (None, *FORMS), (False, True), (False, True)))
     if case[:2] != (None, None) and i % 3 != 1],
)  # fmt: skip
def test_multihead_attention_gives_zero_with_and_without_weights(form, padding_form, weights, training):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(16, 2, batch_first=True).train(training)
    layer = copy.deepcopy(plain)
    peakgpt.patch(layer)
    x = torch.randn(3, 5, 16, requires_grad=True)
    pairs = holes(2, 5, 5) if form else torch.ones(5, 5, dtype=torch.bool)
    keys = holes(3, 3, 5) if padding_form else torch.ones(3, 5, dtype=torch.bool)
    keys[0] = padding_form is None
    live = (pairs & keys[:, None, None]).expand(3, 2, 5, 5)
    masks = {"attn_mask": torch_mask(form, pairs), "key_padding_mask": torch_mask(padding_form, keys)}
    parameters = [x, *layer.parameters()]
    expected, right_weights = multihead_truth(plain, x, live)
    got, got_weights = layer(x, x, x, need_weights=weights, **masks)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if weights:
        torch.testing.assert_close(got_weights, right_weights.mean(1), rtol=1e-4, atol=1e-5)
    right = gradients(expected, [x, *plain.parameters()])
    for ours, theirs in zip(gradients(got, parameters), right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_with_a_sequence_of_padding_is_finite_and_leaves_others_alone(norm_first, training):
    """torch's own fast path in eval() gives NaN."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, norm_first=norm_first).train(training)
    peakgpt.patch(layer)
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[True] * 5, [False] * 5, [True, False, True, False, False]])
    with torch.set_grad_enabled(training):
        y = layer(x, None, padding)
        assert y.isfinite().all()
        for row in range(3):
            torch.testing.assert_close(layer(x[row : row + 1], None, padding[row : row + 1]), y[row : row + 1])


def first_row(model, ids, mask, **options):
    """Return loss and gradients of a batch in which only the first row has labels."""
    model.zero_grad(set_to_none=True)
    labels = ids.clone()
    labels[1:] = -100
    loss = model.train()(input_ids=ids, attention_mask=mask, labels=labels, **options).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("name", FAMILIES)
def test_row_does_not_depend_on_the_masks_of_other_rows(name):
    """A hole in another row makes the mask of the batch dense. The first row has padding on its left."""
    model = build(name)
    peakgpt.patch(model)
    ids = torch.randint(5, VOCAB, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    results = []
    for others in (torch.ones(2, TOKENS), torch.eye(TOKENS)[4:6].roll(3), holes(4, 2, TOKENS), torch.zeros(2, TOKENS)):
        mask = torch.cat((torch.tensor([[0.0] * 3 + [1.0] * (TOKENS - 3)]), others)).long()
        results.append(first_row(model, ids, mask))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, value in results[0].items():
            assert value.isfinite().all(), key
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


DECODERS = ("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "llama", "mistral", "bart, its decoder")


@pytest.mark.parametrize("name", DECODERS)
def test_dense_mask_of_the_user_equals_padding_in_every_form(name):
    """The same mask as (B, T) padding, which stays compact, and as a dense mask in each form."""
    fields = {"sliding_window": None} if name == "mistral" else {}
    model = build(name, **fields)
    peakgpt.patch(model)
    ids = torch.randint(5, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    keys = torch.ones(2, TOKENS, dtype=torch.bool)
    keys[0, :3] = False
    live = keys[:, None, None] & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    options = {} if "bart" in name else {"position_ids": torch.arange(TOKENS)[None].expand(2, -1)}
    expected = first_row(model, ids, keys.long(), **options)
    for form in FORMS:
        got = first_row(model, ids, mask_as(form, live), **options)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
