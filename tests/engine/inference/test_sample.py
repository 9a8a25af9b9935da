"""Sampling: a token does not depend on the batch; top-k, top-p and min-p over a vocabulary of GPT-2's size."""

import pytest
import torch

from peakgpt.engine.inference.sampling import (
    Uniforms,
    adjust,
    choose,
    largest,
    log_probabilities,
    probabilities,
    uniforms,
)
from peakgpt.engine.inference.sampling_params import SamplingParams

V = 50257


def rows(count, spread=3.0):
    return spread * torch.randn(count, V, generator=torch.Generator().manual_seed(0))


KINDS = (
    {"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 50}, {"top_k": 50, "top_p": 0.5}, {"top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.99}, {"min_p": 0.1}, {"top_k": 1}, {"top_k": V + 1, "top_p": 0.9},
    {"temperature": 90.0, "top_p": 0.9}, {"temperature": 0.2, "top_p": 0.9},
    {"temperature": 90.0, "top_p": 0.9, "min_p": 0.97},
)  # fmt: skip


def test_a_row_gets_the_same_token_alone_and_in_a_batch():
    logits, u = rows(len(KINDS) * 2), uniforms(7, 0, 0, len(KINDS) * 2).tolist()
    params = [SamplingParams(**kind) for kind in KINDS] * 2
    together = choose(logits.clone(), params, u).tolist()
    for i, p in enumerate(params):
        assert choose(logits[i : i + 1].clone(), [p], [u[i]]).tolist() == [together[i]]
    counts = [3, 0, 5] * 6
    logprobs = log_probabilities(logits, together, counts)
    for i, top in enumerate(counts):
        assert log_probabilities(logits[i : i + 1], [together[i]], [top]) == [logprobs[i]]
        assert len(logprobs[i].top) == top
    assert logprobs[0].top[0][1] == pytest.approx(float(logits[0].log_softmax(-1).max()), rel=1e-5)


@pytest.mark.parametrize("k", [1, 50, 500])
def test_largest_equals_topk(k):
    z = rows(3)
    values, ids = largest(z, k)
    assert torch.equal(values, z.topk(k).values) and torch.equal(z.gather(-1, ids), values)


LOGITS = {
    "equal": torch.zeros(2, V), "nearly equal": rows(2, 0.01), "normal": rows(2, 1.0), "peaked": rows(2, 10.0),
    "few values": rows(2, 2.0).round(), "one of 16 lower": rows(2, 1.0) - 9.0 * (torch.arange(V) % 16 == 0),
    "513 tokens": rows(2, 1.0)[:, :513], "17 tokens": rows(2, 1.0)[:, :17],
    "peaked and flat rows": torch.cat([rows(1, 10.0), rows(2, 0.01), rows(1, 4.0)]),
}  # fmt: skip


@pytest.mark.parametrize("top_p", [0.003, 0.9, 0.99999, 1.0])
@pytest.mark.parametrize("name", LOGITS)
def test_top_p_keeps_the_smallest_set_that_reaches_it(name, top_p):
    """The reference sums the sorted float32 probabilities in float64."""
    z = LOGITS[name]
    p, ids = probabilities(z.clone(), top_p=top_p)
    for i, row in enumerate(z.softmax(-1)):
        kept = p[i].nonzero()[:, 0] if ids is None else ids[i][p[i] > 0]
        assert torch.equal(row[kept], p[i][p[i] > 0]) and len(kept.unique()) == len(kept)
        best = row.sort(descending=True).values
        count = min(int((best.double().cumsum(0) < torch.tensor(top_p)).sum()) + 1, int((row > 0).sum()))
        assert torch.equal(row[kept].sort(descending=True).values, best[: len(kept)]), "not the most likely tokens"
        other = best[: len(kept)].double().sum() - best[:count].double().sum()
        assert abs(float(other)) < 1e-6, (len(kept), count)  # 512 are summed in float32; one token weighs more


def test_top_p_keeps_the_first_of_equal_tokens():
    p, ids = probabilities(torch.zeros(1, V), top_p=0.5)
    assert ids is None and p[0].nonzero()[:, 0].tolist() == list(range(V // 2 + 1))
    alone, both = (probabilities(torch.zeros(1, 1024), top_p=one)[0] for one in (0.5 + 1e-9, torch.full((1, 1), 0.5)))
    assert torch.equal(alone, both), "top_p is rounded to float32 alone as in a column"


def test_min_p_is_relative_to_the_largest_probability():
    p, _ = probabilities(rows(2), min_p=0.2)
    for row in p:
        assert float(row[row > 0].min()) >= 0.2 * float(row.max())


def test_penalties_and_bias_change_logits_as_documented():
    z = torch.tensor([2.0, -2.0, 1.0, 1.0, 0.5])
    adjust(z, SamplingParams(repetition_penalty=2.0), [0, 1, 0], [])
    assert z.tolist() == [1.0, -4.0, 1.0, 1.0, 0.5]
    adjust(z, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [0], [2, 2, 3])
    assert z.tolist() == [1.0, -4.0, 0.0, 0.25, 0.5]
    adjust(z, SamplingParams(logit_bias={4: 9.0, 0: -float("inf")}), [], [])
    assert z.tolist() == [-float("inf"), -4.0, 0.0, 0.25, 9.5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_non_finite_logits_get_the_invalid_token(kind, value):
    logits = rows(3)
    expected = choose(logits.clone(), [SamplingParams(**kind)] * 3, [0.5] * 3).tolist()
    logits[1, 777] = value
    assert choose(logits, [SamplingParams(**kind)] * 3, [0.5] * 3).tolist() == [expected[0], V, expected[2]]


def test_uniforms_depend_on_seed_stream_and_index_only():
    numbers = Uniforms(-3, 1)
    assert [numbers[i] for i in (0, 255, 256, 3)] == uniforms(-3, 1, 0, 257)[[0, 255, 256, 3]].tolist()
    many = uniforms(0, 0, 0, 100000)
    assert many.min() > 0 and many.max() < 1 and abs(float(many.mean()) - 0.5) < 0.005
    for other in (uniforms(1, 0, 0, 9), uniforms(0, 1, 0, 9), uniforms(1 << 40, 0, 0, 9), uniforms(0, 1 << 33, 0, 9)):
        assert not torch.equal(other, many[:9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"min_p": 1.5}, "min_p is 1.5, expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias is"),
        ({"n": 0}, "n is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"prompt_logprobs_start": 3}, "prompt_logprobs_start is 3, expected 0 without prompt_logprobs"),
        ({"stop": "end"}, "stop is 'end', expected a sequence of strings"),
        ({"stop": ("",)}, "expected no empty element"),
        ({"choices": ((),)}, "expected no empty element"),
    ],
)
def test_sampling_params_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)
