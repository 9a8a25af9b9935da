"""Contenders in worker processes: protocol, memory, checks before timing, training and decoding."""

import dataclasses
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from peakgpt.bench import decode
from peakgpt.bench.contenders import decoding, training
from peakgpt.bench.contenders.contender import TUNED_MALLOC, WEIGHT_FORMATS, Workload
from peakgpt.bench.contenders.time_contenders import time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess, _reporting
from peakgpt.bench.decode import compare_decoding
from peakgpt.bench.report import comparisons
from peakgpt.bench.schema import read_results
from peakgpt.bench.train import _expect_same_loss
from peakgpt.cli import main
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.presets import preset


def tiny_config():
    return preset("gpt2-tiny", n_layer=1, vocab_size=64, n_embd=48)


def training_request(contender, **changes):
    return {"make": "peakgpt.bench.contenders.training:training_step", "contender": contender,
            "config": dataclasses.asdict(tiny_config()), "batch": 1, "tokens": 16, "dtype": "float32", "warmup": 0.0,
            "recompute": "none", "threads": 1, **changes}  # fmt: skip


def test_worker_reports_steps_and_its_exit_code():
    worker, failing = (WorkerProcess(name, training_request(name), {}) for name in ("peakgpt", "unknown"))
    losses = [worker.step() for _ in range(3)]
    assert losses[2] < losses[0] and "page faults" in worker.note
    with pytest.raises(RuntimeError, match="worker 'unknown' ended with exit code 1"):
        failing.step()
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(RuntimeError, match="'peakgpt' ended with exit code -9"):
        worker.step()
    for w in (worker, failing):
        w.close()


LARGE_SETUP = """
import torch
MIB = 1 << 18  # floats

def make(request):
    torch.ones(400 * MIB)  # the setup needs more memory than a step
    weights = torch.ones(100 * MIB)
    return lambda: float((weights + 1)[0])
"""


# The tuned allocator keeps the 100 MiB that a step frees. If a small allocation then takes part of them, the next step
# needs 100 MiB more.
@pytest.mark.parametrize("environment, limit_mib", [({}, 220), ({"GLIBC_TUNABLES": TUNED_MALLOC}, 320)])
def test_worker_memory_is_the_peak_of_a_step(tmp_path, environment, limit_mib):
    """Fails if the worker does not reset its peak, or does not return freed memory under the tuned allocator."""
    (tmp_path / "large_setup.py").write_text(LARGE_SETUP)
    worker = WorkerProcess(
        "large_setup", {"make": "large_setup:make", "threads": 1}, {"PYTHONPATH": str(tmp_path), **environment}
    )
    try:
        assert worker.step() == worker.step() == 2.0
        assert 190 < (worker.memory_bytes() - worker.base_bytes) / 2**20 < limit_mib
        assert worker.base_bytes > 1 << 26 and not worker.last.whole_life
    finally:
        worker.close()


def test_note_says_that_memory_is_the_peak_of_the_process(monkeypatch):
    def read_only(path, text):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", read_only)
    worker = WorkerProcess.__new__(WorkerProcess)
    worker.name, worker.last = "x", _reporting(lambda: 1.0, 1)()
    assert worker.last.whole_life and worker.note.endswith("x: memory is the peak since the start of the process")


@pytest.mark.parametrize("contender", ["peakgpt", "eager"])
def test_training_step_keeps_no_reference_to_the_initial_state(contender, monkeypatch):
    states = []
    training_inputs = training.training_inputs

    def recorded(*args):
        state, batch = training_inputs(*args)
        states.append(weakref.ref(state["transformer.wte.weight"].untyped_storage()))
        return state, batch

    monkeypatch.setattr(training, "training_inputs", recorded)
    step = training.training_step(training_request(contender))
    gc.collect()
    assert step() > 0 and states[0]() is None


def test_training_with_another_loss_raises():
    losses = {"x": 2.005, "eager": 2.0}
    for name in losses:
        _expect_same_loss(name, losses, 3, torch.bfloat16)
    with pytest.raises(ValueError, match=r"x: loss 2\.0050 after 3 updates, expected 2\.0000 within 0\.1%"):
        _expect_same_loss("x", losses, 3, torch.float32)


class FakeContender:
    pid, base_bytes, note = None, None, "a note"
    closed = ()

    def __init__(self, step):
        self.step = step

    def memory_bytes(self):
        return 7

    def close(self):
        FakeContender.closed += (self.step,)


def test_failing_contenders_are_reported_and_closed_and_the_others_timed(monkeypatch):
    monkeypatch.setattr(FakeContender, "closed", ())
    right, wrong, raises = lambda: 1, lambda: 2, lambda: 1 / 0
    starts = {"absent": raises, "right": lambda: FakeContender(right), "wrong": lambda: FakeContender(wrong),
              "raises": lambda: FakeContender(raises)}  # fmt: skip
    checked, failures = [], []

    def expect_correct(name, values):
        checked.append(dict(values))
        assert values[name] == 1

    measured = time_contenders(starts.items(), lambda name, contender: contender.step(), expect_correct, rounds=3,
                       on_failure=lambda name, error: failures.append((name, type(error))))  # fmt: skip
    assert failures == [("absent", ZeroDivisionError), ("raises", ZeroDivisionError), ("wrong", AssertionError)]
    assert FakeContender.closed == (raises, wrong, right) and checked == [{"right": 1, "wrong": 2}] * 2
    correct = measured.pop("right")
    assert not measured and len(correct.timing.samples_s) == 3 and (correct.memory_bytes, correct.note) == (7, "a note")
    assert correct.timing.noted("", "a", "b").note.endswith("a; b")


@pytest.mark.parametrize("name", [name for name in decoding.DECODING_CONTENDERS if name != "eager"])
def test_contenders_decode_the_same_tokens_as_eager(name):
    """float32 weights give the tokens of eager. Other formats give the same tokens in every run, and as many."""
    contender = decoding.DECODING_CONTENDERS[name]
    pytest.importorskip(contender.package)
    config = preset("gpt2-tiny", n_layer=1, vocab_size=96, n_head=2, n_embd=64)
    workload = Workload(2, 4, 6)
    state, ids = decode.decoding_inputs(config, workload)
    expected = decoding.eager_decoder(dict(state), config, ids, workload, "float32")()
    for weights in contender.formats:
        run = contender.build(dict(state), config, ids, workload, weights)
        tokens = run()
        assert tokens.shape == (2, 6) and torch.equal(tokens, run())
        assert weights != "float32" or torch.equal(tokens, expected)
    assert len(expected.unique()) > 3


def test_decoding_with_other_tokens_raises():
    expected = torch.arange(12).view(2, 6)
    with pytest.raises(ValueError, match="only the first 0 tokens equal those of eager"):
        decode._expect_equal_start("x", expected + 1, expected, "float32")
    with pytest.raises(ValueError, match=r"shape \(2, 5\), expected \(2, 6\)"):
        decode._expect_equal_start("x", expected[:, 1:], expected, "int8")


def test_weight_formats_are_compared_in_one_run(monkeypatch):
    peak = SimpleNamespace(bandwidth_bytes_s=1e9, source="none")
    monkeypatch.setattr(decode, "peak_for", lambda *args: peak)
    in_process = lambda name, request, environment: FakeContender(decode.decode_step(request))  # noqa: E731
    monkeypatch.setattr(decode, "WorkerProcess", in_process)  # other tests start real worker processes
    workload, failures = Workload(2, 4, 6), []
    results = decode.compare_streams(tiny_config(), workload, ("float32", "int8"), ["peakgpt", "eager"], rounds=3,
                                      on_failure=lambda name, error: failures.append(name))  # fmt: skip
    assert [(r.contender, r.dtype) for r in results] == [("peakgpt", "float32"), ("eager", "float32"),
                                                         ("peakgpt", "int8")]  # fmt: skip
    assert not failures and len({r.rounds for r in results}) == 1
    read_bytes = [decode.read_bytes(preset("gpt2"), Workload(1, 0, 1), weights) for weights in WEIGHT_FORMATS]
    assert read_bytes[0] == pytest.approx(4 * 123.65e6, rel=2e-3) and read_bytes == sorted(read_bytes, reverse=True)
    assert read_bytes[3] == pytest.approx(38.6e6 + 85.1e6 * 4.5 / 8, rel=2e-3)


def test_compare_decoding_times_both_and_raises_on_wrong_logits():
    model = GPT(tiny_config())
    ids = torch.randint(64, (2, 4))
    results = compare_decoding(model, ids, count=3, rounds=3)
    assert [r.contender for r in results] == ["peakgpt", "eager"] and results[0].case["batch"] == 2
    model.compute_logits = lambda h: F.linear(h, model.transformer.wte.weight).roll(1, -1)
    with pytest.raises(ValueError, match="decode: peakgpt: result 0 is off eager"):
        compare_decoding(model, ids, count=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("train")
    argv = ["bench", "train", "--device", "cpu", "--model", "gpt2-tiny", "--batch", "1", "--tokens", "16", "--rounds",
            "3", "--dtype", "bfloat16", "--contenders", "peakgpt", "eager", "eager, tuned malloc"]  # fmt: skip
    assert main([*argv, "--out", str(out)]) == 0
    return read_results(next(out.iterdir()))[0]


def test_bench_train_times_each_contender_in_its_process(trained):
    assert [r.contender for r in trained] == ["peakgpt", "eager", "eager, tuned malloc"]
    assert all(r.case["batch"] == 1 and r.case["tokens"] == 16 and r.dtype == "bfloat16" for r in trained)
    assert all(r.memory_bytes > r.base_bytes > 1 << 26 and len(r.samples_s) == r.rounds for r in trained)
    (text,) = comparisons(trained)
    assert len(text.splitlines()) == 2 + 2 + 2 and "eager, tuned malloc" in text
