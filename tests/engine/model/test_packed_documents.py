"""Documents packed into one row: each one gives what it gives alone, on every backend."""

import itertools
import math

import pytest
import torch

from peakgpt.engine.data.batches import document_positions
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.core.dispatch import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 67}
CUTS = [(0, 5, 6, 32), (0, 17, 32)]  # the documents of two rows
VARIANTS: dict[str, dict] = {
    "learned": {},
    "learned_offset": {"position_offset": 2},
    "rotary": {"position": "rotary", "n_kv_head": 1},
    "rotary_window": {"position": "rotary", "rotary_dim": 8, "windows": (7, None)},
    "alibi": {"position": "alibi"},
    "parallel": {"residual": "parallel", "position": "rotary", "rotary_interleaved": True},
    "softcap_sinks": {"attention_softcap": 1.5, "attention_sinks": True, "position": "rotary", "windows": (7, None)},
}
BACKENDS = ("eager", "cpu", "gpu")


def packed():
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(67, (2, 2, 32), generator=generator)
    position_ids = torch.zeros(2, 32, dtype=torch.int32)
    for row, begin, end in documents():
        position_ids[row, begin:end] = torch.arange(end - begin)
    return ids, targets, position_ids


def documents():
    return [(row, *pair) for row, cuts in enumerate(CUTS) for pair in itertools.pairwise(cuts)]


def build(variant, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SIZES, **VARIANTS[variant], **changes})).to(dtype)


def alone(model, ids, targets):
    """Return the hidden states and the gradients of the mean loss, document by document."""
    hidden, loss = torch.empty(*ids.shape, 32, dtype=model.dtype), 0.0
    for row, begin, end in documents():
        part = slice(row, row + 1), slice(begin, end)
        hidden[part] = model.hidden_states(ids[part]).detach()
        loss = loss + model(ids[part], targets[part]) * (end - begin) / ids.numel()
    return hidden, torch.autograd.grad(loss, list(model.parameters())), loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_documents_alone_in_float64(variant):
    """Mutation that makes it fail: positions that do not start anew, or a mask that is left out."""
    model, (ids, targets, position_ids) = build(variant, torch.float64), packed()
    hidden, gradients, loss = alone(model, ids, targets)
    torch.testing.assert_close(model.hidden_states(ids, position_ids=position_ids), hidden, rtol=0, atol=1e-13)
    whole = model(ids, targets, position_ids=position_ids)
    torch.testing.assert_close(whole, loss, rtol=0, atol=1e-13)
    for ours, expected in zip(torch.autograd.grad(whole, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("variant", "backend"),
    [*((variant, backend) for variant in ("learned", "rotary_window", "alibi", "softcap_sinks")
       for backend in ("eager", "cpu")),
     ("rotary_window", "gpu"), ("softcap_sinks", "gpu")],
)  # fmt: skip
def test_packed_documents_equal_documents_alone_on_each_backend(variant, backend):
    """The error is at most twice that of the documents alone, both against float64.

    Mutation that makes it fail: cu_seqlens that one backend ignores, forward or backward.
    """
    if backend == "gpu":
        pytest.importorskip("triton")
    layers = {"n_layer": 1} if backend == "gpu" else {}  # interpreted kernels are slow
    model, wide = build(variant, **layers), build(variant, torch.float64, **layers)
    ids, targets, position_ids = packed()
    truth = alone(wide, ids, targets)
    with use_backend(backend):
        one_by_one = alone(model, ids, targets)
        loss = model(ids, targets, position_ids=position_ids)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        hidden = model.hidden_states(ids, position_ids=position_ids).detach()
    results = zip((hidden, *gradients), (one_by_one[0], *one_by_one[1]), (truth[0], *truth[1]), strict=True)
    for ours, theirs, exact in results:
        errors = [(t.double() - exact).abs().max() for t in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_another_document_change_no_bit(backend):
    if backend == "gpu":
        pytest.importorskip("triton")
    model, (ids, _, position_ids) = build("rotary", n_layer=1), packed()
    other = ids.clone()
    other[0, 6:] = (other[0, 6:] + 1) % 67
    other[1, :17] = (other[1, :17] + 1) % 67
    with torch.no_grad(), use_backend(backend):
        before, after = (model.hidden_states(i, position_ids=position_ids) for i in (ids, other))
    assert torch.equal(before[0, :6], after[0, :6]) and torch.equal(before[1, 17:], after[1, 17:])
    assert not torch.equal(before[0, 6:], after[0, 6:])


def test_dropout_and_experts_train_on_packed_documents():
    model, (ids, targets, position_ids) = build("learned", dropout=0.3, experts=2, experts_every=1), packed()
    losses = [float(model(ids, targets, position_ids=position_ids).detach()) for _ in range(2)]
    assert losses[0] != losses[1]
    model.eval()
    plain = [float(model(ids, targets, position_ids=position_ids).detach()) for _ in range(2)]
    assert plain[0] == plain[1]


def test_label_smoothing_is_part_of_the_loss_in_training_only():
    for changes in ({}, {"tied_head": False, "head_bias": True}):  # the fused loss, and that of logits
        model, (ids, targets, _) = build("learned", label_smoothing=0.2, **changes), packed()
        targets[0, 3] = -100
        plain = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        smooth = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), label_smoothing=0.2)
        torch.testing.assert_close(model(ids, targets), smooth)
        weight = (1.0 / (targets != -100).sum()).expand(targets.shape)
        parts = [model(ids[i : i + 1], targets[i : i + 1], loss_weight=weight[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(sum(parts), smooth)
        torch.testing.assert_close(model.eval()(ids, targets), plain)


def test_a_document_begins_with_its_separator_and_with_a_row():
    ids = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    positions = document_positions(ids, 0)
    assert positions.tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]] and positions.dtype == torch.int32


@pytest.mark.parametrize(
    ("variant", "arguments", "message"),
    [
        ("learned", {"position_ids": torch.zeros(2, 31, dtype=torch.int32)}, r"position_ids have shape \(2, 31\)"),
        ("learned", {"start": torch.zeros(2, dtype=torch.int64)}, "expected the same shape, and no cache or start"),
        ("learned", {"attention_mask": torch.ones(2, 32)}, "got attention_mask with position_ids"),
        ("relative", {}, "got packed documents with position relative_bias, expected learned, rotary, alibi"),
    ],
)
def test_bad_calls_with_packed_documents_are_refused(variant, arguments, message, monkeypatch):
    monkeypatch.setitem(VARIANTS, "relative", {"position": "relative_bias"})
    model, (ids, targets, position_ids) = build(variant), packed()
    with pytest.raises(ValueError, match=message):
        model(ids, targets, **{"position_ids": position_ids, **arguments})


@pytest.mark.parametrize(("value", "expected"), [(-0.1, "at least 0"), (1.0, "below 1"), (math.nan, "a finite number")])
def test_label_smoothing_out_of_range_is_refused(value, expected):
    with pytest.raises(ValueError, match=f"label_smoothing is {value}, expected {expected}"):
        GPTConfig(label_smoothing=value)
