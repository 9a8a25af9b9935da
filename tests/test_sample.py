"""The sampler: the same token alone and in any batch, and where the vocabulary is as large as GPT-2's."""

import pytest
import torch

from peakgpt.engine.params import SamplingParams
from peakgpt.engine.sample import Uniforms, adjust, choose, largest, log_probabilities, probabilities, uniforms

V = 50257


def rows(count, spread=3.0):
    return spread * torch.randn(count, V, generator=torch.Generator().manual_seed(0))


KINDS = (
    {"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 50}, {"top_k": 50, "top_p": 0.5}, {"top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.99}, {"min_p": 0.1}, {"top_k": 1}, {"top_k": V + 1, "top_p": 0.9},
)  # fmt: skip


def test_a_row_alone_and_beside_others():
    logits, u = rows(len(KINDS) * 2), uniforms(7, 0, 0, len(KINDS) * 2).tolist()
    params = [SamplingParams(**kind) for kind in KINDS] * 2
    together = choose(logits.clone(), params, u).tolist()
    for i, p in enumerate(params):
        assert choose(logits[i : i + 1].clone(), [p], [u[i]]).tolist() == [together[i]]
    asked = [3, 0, 5] * 6
    told = log_probabilities(logits, together, asked)
    for i, top in enumerate(asked):
        assert log_probabilities(logits[i : i + 1], [together[i]], [top]) == [told[i]]
        assert len(told[i].top) == top
    assert told[0].top[0][1] == pytest.approx(float(logits[0].log_softmax(-1).max()), rel=1e-5)


@pytest.mark.parametrize("k", [1, 50, 500])
def test_largest_is_topk(k):
    z = rows(3)
    values, ids = largest(z, k)
    assert torch.equal(values, z.topk(k).values) and torch.equal(z.gather(-1, ids), values)


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_top_p_keeps_the_fewest_that_reach_it(spread):
    z = rows(3, spread)
    p, ids = probabilities(z, top_p=0.9)
    for row, kept, which in zip(z.softmax(-1), p, ids, strict=True):
        count = int((kept > 0).sum())
        best = row.sort(descending=True).values.double().cumsum(0)
        assert abs(count - (int((best < 0.9).sum()) + 1)) <= 2  # two sums of 50257 numbers round differently
        assert float(row[which[kept > 0]].min()) >= float(row.sort(descending=True).values[count - 1])


def test_min_p_is_relative_to_the_likeliest():
    p, _ = probabilities(rows(2), min_p=0.2)
    for row in p:
        assert float(row[row > 0].min()) >= 0.2 * float(row.max())


def test_penalties_and_bias():
    z = torch.tensor([2.0, -2.0, 1.0, 1.0, 0.5])
    adjust(z, SamplingParams(repetition_penalty=2.0), [0, 1, 0], [])
    assert z.tolist() == [1.0, -4.0, 1.0, 1.0, 0.5]
    adjust(z, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [0], [2, 2, 3])
    assert z.tolist() == [1.0, -4.0, 0.0, 0.25, 0.5]
    adjust(z, SamplingParams(logit_bias={4: 9.0, 0: -float("inf")}), [], [])
    assert z.tolist() == [-float("inf"), -4.0, 0.0, 0.25, 9.5]


def test_numbers_of_a_seed():
    numbers = Uniforms(-3, 1)
    assert [numbers[i] for i in (0, 255, 256, 3)] == uniforms(-3, 1, 0, 257)[[0, 255, 256, 3]].tolist()
    many = uniforms(0, 0, 0, 100000)
    assert many.min() > 0 and many.max() < 1 and abs(float(many.mean()) - 0.5) < 0.005
    for other in (uniforms(1, 0, 0, 9), uniforms(0, 1, 0, 9), uniforms(1 << 40, 0, 0, 9), uniforms(0, 1 << 33, 0, 9)):
        assert not torch.equal(other, many[:9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"min_p": 1.5}, "min_p is 1.5, expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias is"),
        ({"n": 0}, "n is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop_strings": ("",)}, "expected none that is empty"),
        ({"choices": ((),)}, "expected none that is empty"),
    ],
)
def test_bad_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)
