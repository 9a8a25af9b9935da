"""`bench device`: every part runs, and a job that raises, hangs or dies does not stop the others."""

import dataclasses
import json
import subprocess
import sys
import warnings

import fixed_peaks
import pytest
import torch

from peakgpt.bench import device as device_bench
from peakgpt.bench import device_decode, device_parts
from peakgpt.bench.check import Check
from peakgpt.bench.contenders.contender import Contender, Workload
from peakgpt.bench.contenders.training import TRAINING_CONTENDERS
from peakgpt.bench.device_decode import FirstTokenCase, StepsCase
from peakgpt.bench.interleave import raise_failure
from peakgpt.bench.isolated_jobs import run_part
from peakgpt.bench.run_results import Failure, RunResults
from peakgpt.cli import main
from peakgpt.engine.gpt import GPT
from peakgpt.kernels.core.dispatch import OPS

CPU = torch.device("cpu")
NO_MASTER = "Unsupported: torch's fused AdamW keeps no float32 master"


FAKE = """
import os, time
from peakgpt.bench.run_results import Failure
from peakgpt.bench.isolated_jobs import Part

def good(budget_s, emit):
    emit(Failure(message="told", contender="peer"))

def raises(budget_s, emit):
    good(budget_s, emit)
    raise ZeroDivisionError("by nought")

PARTS = {
    "mixed": Part(lambda device: {"first": good, "raises": raises, "dies": lambda b, e: os._exit(9),
                                  "hangs": lambda b, e: time.sleep(600), "last": good}, 120, 2),
    "unusable": Part(lambda device: 1 / 0, 60, 2),
    "late": Part(lambda device: {"first": good}, 0, 2),
}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_parts.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fake_parts"


def test_raising_hanging_or_dying_job_does_not_stop_the_other_jobs(fake):
    rows = run_part(fake, "mixed", CPU)
    assert [(r.job, r.message) for r in rows] == [
        ("first", "told"),
        ("raises", "told"),
        ("raises", "ZeroDivisionError: by nought"),
        ("dies", "the process ended with exit code 9"),
        ("hangs", "stopped: no end after 2 s or at the end of the budget"),
        ("last", "told"),
    ]
    assert all(r.part == "mixed" for r in rows)
    assert "in raises" in rows[2].traceback and "in <lambda>" in rows[4].traceback


def test_part_that_cannot_start_or_has_no_time_is_reported(fake, capsys):
    found = RunResults()
    device_bench.run_parts(fake, ["unusable", "late"], CPU, found.add)
    assert [f.message for f in found.failures] == [
        "the process ended with exit code 1",
        "not run: the budget of the part, 0 s, is spent",
    ]
    assert "ZeroDivisionError" in found.failures[0].traceback and found.exit_code == 1
    assert capsys.readouterr().err.startswith("unusable:")


def test_bench_device_writes_results_file_and_table(tmp_path, capsys, monkeypatch):
    patient = dataclasses.replace(device_parts.PARTS["adamw"], budget_s=240, patience_s=240)  # on a busy machine
    monkeypatch.setitem(device_parts.PARTS, "adamw", patient)
    argv = ["bench", "device", "--device", "cpu", "--only", "adamw", "--commit", "abc"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert set(document) == {"schema", "environment", "results", "checks", "failures"}
    assert document["environment"]["commit"] == "abc"
    assert [f["message"] for f in document["failures"]] == [NO_MASTER]
    assert {r["case"]["op"] for r in document["results"]} == {"adamw"}
    assert {r["contender"] for r in document["results"]} == {"peakgpt", "torch fused"}
    assert "adamw forward bfloat16" in capsys.readouterr().out
    assert main(["bench", "device", "--only", "lunch"]) == 2


@pytest.mark.parametrize("part", device_parts.PARTS)
def test_every_part_runs_on_cpu(part, monkeypatch):
    fixed_peaks.use(monkeypatch)
    rows = []
    for job in list(device_parts.PARTS[part].jobs(CPU).values())[:4]:
        job(0.0, rows.append)
    assert rows and not [r for r in rows if isinstance(r, Failure) and r.message != NO_MASTER]
    assert all(r.passed for r in rows if isinstance(r, Check))
    if part == "train":
        assert [r.contender for r in rows] == ["peakgpt", "eager"]
        assert all(r.flops_kind == "model" and r.memory_bytes for r in rows)


def test_every_gpu_case_is_a_valid_call_of_its_op():
    d = device_parts
    for case in (*d.ATTENTION, *d.LAYERNORM, *d.MLP, *d.LINEAR, *d.LOSS, *d.ADAMW):
        op, sizes, device = OPS[case.op], case.sizes, "meta"
        if case.op == "attention_decode":  # its cost reads the lengths, so its tensors must be real; keep them small
            sizes, device = {**sizes, "keys": 64, "block": 16}, "cpu"
        tensors, params = op.bind(op.sample(**sizes, device=device, dtype=getattr(torch, case.dtype)), case.arguments)
        op.check(*tensors, **params)
        assert op.cost(*tensors, **params).flops > 0
    jobs = device_parts.PARTS["attention"].jobs(torch.device("cuda"))
    assert len(jobs) == 6 * 2 + 2 + 6 + 3 * 2  # both passes; one query; attention_decode; attention_qkv
    assert len(device_parts.PARTS["check"].jobs(torch.device("cuda"))) == 2 * (
        len(device_parts.CASES) + len(device_parts.LARGE_CASES) + 1
    )


def test_part_budgets_sum_to_under_eight_minutes():
    assert sum(p.budget_s for p in device_parts.PARTS.values()) <= 465
    assert all(p.patience_s <= p.budget_s for p in device_parts.PARTS.values())


def test_bench_device_imports_with_torch_only():
    """A rented machine may lack rich, tokenizers, safetensors and the C++ extension."""
    code = """
import sys
for name in ("rich", "matplotlib", "tokenizers", "safetensors", "transformers", "peakgpt._C"):
    sys.modules[name] = None
import peakgpt.commands.bench, peakgpt.bench.device
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_gpu_contenders_have_no_environment_of_their_own():
    assert [n for n, c in TRAINING_CONTENDERS.items() if not c.environment] == ["peakgpt", "eager", "compile"]


def test_device_decoding_reports_wrong_logits_and_counts_bytes(monkeypatch):
    config, told = device_parts.TINY_RUN[0], []
    was = device_decode.DEVICE_DECODING_CONTENDERS["eager"].build

    def wrong(*args):
        return lambda: lambda token: was(*args)()(token).roll(1, -1)

    monkeypatch.setitem(device_decode.DEVICE_DECODING_CONTENDERS, "compile", Contender(wrong))
    case = StepsCase("tiny", config, Workload(2, 5, 3), only=("compile", "peakgpt"), seconds=0.0)
    results = case.measure(CPU, lambda *failure: told.append(failure))
    assert [(name, "is off eager" in str(error)) for name, error in told] == [("compile", True)]
    (ours,) = results
    weights = sum(p.numel() for p in GPT(config).parameters()) - config.block_size * config.n_embd
    assert ours.bytes == 2 * (3 * weights + 2 * 2 * config.n_embd * (6 + 7 + 8))
    first = FirstTokenCase("tiny", config, 9, seconds=0.0).measure(CPU, raise_failure)
    assert [r.contender for r in first] == ["peakgpt", "eager"] and all(r.flops_fraction for r in first)


def test_step_without_cuda_graph_is_reported_as_failure(monkeypatch):
    """A reader must not take the time of an uncaptured step for that of a CUDA graph."""
    inner = device_decode._eager

    def warns(model, ids, workload):
        begin = inner(model, ids, workload)

        def again():
            warnings.warn("the function runs uncaptured, capture failed: no", stacklevel=1)
            return begin()

        return again

    monkeypatch.setitem(device_decode.DEVICE_DECODING_CONTENDERS, "peakgpt", Contender(warns))
    config, told = device_parts.TINY_RUN[0], []
    case = StepsCase("tiny", config, Workload(2, 5, 3), only=("peakgpt",), seconds=0.0)
    results = case.measure(CPU, lambda *failed: told.append(failed))
    assert len(results) == 1 and {name for name, _ in told} == {"peakgpt"}
    assert "capture failed: no" in str(told[0][1])
