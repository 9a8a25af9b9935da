"""Philox4x32-7 against the known answers of its authors, and the dropout masks made with it.

tests/kernels/cpu/test_cpu_attention.py tests the C++ version: it must drop the same weights.
"""

import math

import pytest
import torch

from peakgpt.kernels.ops.attention_math import dropout_mask
from peakgpt.kernels.ops.dropout import keep_mask
from peakgpt.kernels.ops.philox import philox

# kat_vectors of Random123: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    counter, (low, high), expected = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
    seed = torch.tensor([low | (high - (high >> 31 << 32)) << 32])
    assert [word.item() for word in philox(counter, seed)] == expected


@pytest.mark.parametrize("dropout", (0.1, 0.5, 0.9))
def test_attention_dropout_has_its_rate_and_independent_neighbors(dropout):
    """The dropped share, and the agreement of neighbors along each axis, are within four standard deviations."""
    mask = dropout_mask(torch.tensor([11]), dropout, 3, 4, 129, 131)
    assert mask.shape == (3, 4, 129, 131)

    def close(share, expected):
        return abs(share.double().mean().item() - expected) < 4 * math.sqrt(expected * (1 - expected) / share.numel())

    assert close(mask, 1 - dropout)
    both = (1 - dropout) ** 2
    for axis, size in enumerate(mask.shape):
        assert close(mask.narrow(axis, 0, size - 1) & mask.narrow(axis, 1, size - 1), both), axis
    other = dropout_mask(torch.tensor([11 + 2**32]), dropout, 3, 4, 129, 131)
    assert close(mask & other, both)


def test_dropout_has_its_rate_and_independent_neighbors():
    """Within four standard deviations. Neighbors are one element, one word or one counter group apart."""
    keep, p = keep_mask(torch.tensor([11]), 0.3, 100_003), 0.3
    tolerance = 4 * math.sqrt(p * (1 - p) / 100_000)
    assert keep.shape == (100_003,) and abs(keep.double().mean().item() - (1 - p)) < tolerance
    for distance in (1, 16, 64):
        assert abs((keep[distance:] & keep[:-distance]).double().mean().item() - (1 - p) ** 2) < 2 * tolerance
    assert torch.equal(keep_mask(torch.tensor([11]), 0.3, 70), keep[:70])


def test_dropout_mask_does_not_depend_on_the_problem_size():
    seed = torch.tensor([5])
    assert torch.equal(dropout_mask(seed, 0.5, 2, 3, 9, 11), dropout_mask(seed, 0.5, 4, 5, 20, 30)[:2, :3, :9, :11])
