"""The check before a timing: eager decides, and float64 where the two differ."""

import pytest
import torch

from peakgpt.bench.agreement import OUTPUT_TOLERANCE, expect_close
from peakgpt.bench.case import run_case
from peakgpt.bench.ops import OpCase, op_cases
from peakgpt.bench.run_results import RunResults
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


def test_a_failing_case_does_not_cost_the_others(monkeypatch):
    found, sizes = RunResults(), {"rows": 8, "width": 16}

    def flaky(case, device, on_failure):
        if case.op == "rmsnorm":
            raise RuntimeError("broken")
        return [result(case.op)]

    monkeypatch.setattr(OpCase, "measure", flaky)
    for case in op_cases({"rmsnorm": sizes, "layernorm": sizes}, ["float32"], ["forward"]):
        run_case(case, None, found.add)
    assert found.results == [result("layernorm")]
    ((message, part, job),) = [(f.message, f.part, f.job) for f in found.failures]
    assert (message, part) == ("RuntimeError: broken", "ops") and job.startswith("ops/rmsnorm/rows=8,width=16/forward/")
    assert found.exit_code == 1


def result(op):
    return Result.of(Timing((0.5,)), bench="op", case={"op": op}, contender="peakgpt", backend="", device="cpu",
                     dtype="float32")  # fmt: skip


def test_a_results_fraction_is_the_mfu_function():
    row = Result.of(Timing((0.5,)), bench="train", case={}, contender="peakgpt", backend="", device="cpu",
                    dtype="float32", flops=3e9, flops_kind="model", peak_flops_s=1e11)  # fmt: skip
    assert row.flops_fraction == mfu(2.0, 3e9, 1e11) == pytest.approx(0.06)
