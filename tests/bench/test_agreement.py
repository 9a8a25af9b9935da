"""The check before a timing: eager decides, and float64 where the two differ."""

import pytest
import torch

from peakgpt.bench import ops as bench_ops
from peakgpt.bench.agreement import OUTPUT_TOLERANCE, expect_close
from peakgpt.bench.op_cases import OpCase
from peakgpt.bench.ops import compare_ops
from peakgpt.bench.run_results import Failure, RunResults
from peakgpt.bench.schema import Result
from peakgpt.bench.timing import Timing
from peakgpt.engine.model.flops import mfu


def off_by(truth, error):
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=truth.dtype)
    return truth + error * noise * truth.norm() / noise.norm()


@pytest.mark.parametrize("dtype", OUTPUT_TOLERANCE, ids=str)
@pytest.mark.parametrize("ours", [0.03, 0.9, 1.5, 2.3, 40.0])
@pytest.mark.parametrize("eagers", [0.03, 0.9, 1.06, 30.0])
def test_a_contender_is_wrong_only_against_the_truth(dtype, ours, eagers):
    """Errors in units of the tolerance. Fails if eager decides: its bfloat16 backward of layernorm is off by 5 %."""
    limit, truth = OUTPUT_TOLERANCE[dtype], torch.randn(300, generator=torch.Generator().manual_seed(0)).double()
    outputs, reference = off_by(truth, ours * limit), off_by(-truth, eagers * limit).neg()
    right = ours <= max(1.0, 2 * eagers)
    try:
        expect_close("case", [outputs], [reference], dtype, lambda: [truth])
        assert right or abs(ours - eagers) <= 1.0, "close to eager is enough"
    except ValueError as error:
        assert not right and "off float64" in str(error)


def test_not_finite_values_are_wrong():
    truth = torch.ones(3).double()
    with pytest.raises(ValueError, match="off float64 by nan"):
        expect_close("case", [truth * torch.nan], [truth], torch.float32, lambda: [truth])


def test_a_failing_row_does_not_cost_the_others(monkeypatch):
    found = RunResults()

    def flaky(case, direction, *args, **kwargs):
        if case.op == "rmsnorm":
            raise RuntimeError("broken")
        return [case.op]

    monkeypatch.setattr(bench_ops, "compare", flaky)
    cases = [OpCase(op, {"rows": 8, "width": 16}, passes=("forward",)) for op in ("rmsnorm", "layernorm")]
    found.results += compare_ops(
        cases, "cpu", torch.float32, budget_s=0.1, on_failure=lambda name, error: found.add(Failure.of(error, name))
    )
    assert found.results == ["layernorm"]
    assert [f.message for f in found.failures] == ["RuntimeError: broken"] and found.exit_code == 1


def test_a_results_fraction_is_the_mfu_function():
    row = Result.of(Timing((0.5,)), bench="train", case={}, contender="peakgpt", backend="", device="cpu",
                    dtype="float32", flops=3e9, flops_kind="model", peak_flops_s=1e11)  # fmt: skip
    assert row.flops_fraction == mfu(2.0, 3e9, 1e11) == pytest.approx(0.06)
