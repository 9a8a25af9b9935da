"""The divergence of logits from those of float32."""

import math

import pytest
import torch

from peakgpt.bench.fidelity import MOST_POSITIONS, Fidelity, positions_of
from peakgpt.bench.report import tables
from peakgpt.bench.schema import Result
from peakgpt.bench.timing import Timing


def test_divergence_of_two_tokens_is_that_of_the_formula():
    """P is (1/4, 3/4); Q is (1/2, 1/2) at the first position, P at the others. A shift of all logits has no effect."""
    truth = torch.tensor([0.25, 0.75]).log().expand(2, 2, 2)
    logits = truth + 7.0
    logits[0, 0] = 3.0
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    found = Fidelity.of(logits, truth)
    assert found.positions == 4 and found.kl == pytest.approx(kl / 4, rel=1e-6) and found.top1 == 0.75
    assert found.kl_q75 == pytest.approx(kl / 4, rel=1e-6) and found.kl_q25 <= found.kl_median < 1e-12


def test_direction_is_from_float32():
    one, other = torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    assert Fidelity.of(one, other).kl > 1.2 * Fidelity.of(other, one).kl


def test_wrong_logits_raise():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(3, 3\)"):
        Fidelity.of(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="logits of 1 positions are not finite"):
        Fidelity.of(torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.zeros(2, 2))


def test_streams_share_the_positions():
    assert positions_of(1, 32) == 32 and positions_of(8, 64) == 32
    assert positions_of(2 * MOST_POSITIONS, 5) == 1


def test_table_has_divergence_and_agreement_of_rows_that_have_them():
    near = Fidelity(positions=8, kl=1.23e-4, kl_q25=8e-5, kl_median=1e-4, kl_q75=2e-4, top1=0.875)
    rows = [
        Result.of(Timing((1.0,)), bench="decode", case={"tokens": 2}, contender=name, backend="", device="cpu",
                  dtype="bfloat16", fidelity=fidelity)
        for name, fidelity in (("peakgpt", near), ("eager", None))
    ]  # fmt: skip
    (text,) = tables(rows)
    assert "1.2e-04 (8.0e-05 to 2.0e-04)" in text and "88 %" in text.replace("87.5 %", "88 %")
    assert "KL" not in tables(rows[1:])[0]
