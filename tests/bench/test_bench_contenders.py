"""Contenders in worker processes: protocol, memory, checks before timing, training and decoding."""

import dataclasses
import gc
import weakref
from pathlib import Path

import fixed_peaks
import pytest
import torch
import torch.nn.functional as F

from peakgpt.bench import decode
from peakgpt.bench.contenders import decoding, training
from peakgpt.bench.contenders.contender import TUNED_MALLOC, WEIGHT_FORMATS, Workload
from peakgpt.bench.contenders.time_contenders import time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess, _reporting
from peakgpt.bench.decode import DecodeCase, compare_decoding
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


def test_worker_process_steps_and_reports_its_death():
    worker, dead = (WorkerProcess(name, training_request(name), {"SET": "1"}) for name in ("peakgpt", "nobody"))
    assert worker.note == "peakgpt: SET=1", "the environment of a contender is stated"
    losses = [worker.step() for _ in range(3)]
    assert losses[2] < losses[0] and worker.note == "peakgpt: SET=1"
    with pytest.raises(RuntimeError, match="worker 'nobody': KeyError: 'nobody'"):
        dead.step()
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(RuntimeError, match="'peakgpt' ended with exit code -9"):
        worker.step()
    for w in (worker, dead):
        w.close()


def test_missing_dependency_of_a_contender_is_reported_as_missing(tmp_path):
    """Regression: the row said "ended with exit code 1", and only standard error had the name of the package."""
    (tmp_path / "needy.py").write_text("def make(request):\n    import no_such_engine\n")
    worker = WorkerProcess("needy", {"make": "needy:make", "threads": 1}, {"PYTHONPATH": str(tmp_path)})
    worker.process.wait()  # it may end before its first step
    try:
        with pytest.raises(ModuleNotFoundError, match="'needy': ModuleNotFoundError: No module named 'no_such_engine'"):
            worker.step()
    finally:
        worker.close()


GREEDY = """
import torch
MIB = 1 << 18  # floats

def make(request):
    torch.ones(400 * MIB)  # building takes more than a step
    kept = torch.ones(100 * MIB)
    return lambda: float((kept + 1)[0])
"""


# The tuned allocator keeps the 100 MiB that a step frees. If a small allocation then takes part of them, the next step
# needs 100 MiB more.
@pytest.mark.parametrize("environment, most", [({}, 220), ({"GLIBC_TUNABLES": TUNED_MALLOC}, 320)])
def test_worker_memory_is_the_peak_of_one_step_without_setup(tmp_path, environment, most):
    """Fails if the worker does not reset its peak, or does not return freed memory under the tuned allocator."""
    (tmp_path / "greedy.py").write_text(GREEDY)
    worker = WorkerProcess(
        "greedy", {"make": "greedy:make", "threads": 1}, {"PYTHONPATH": str(tmp_path), **environment}
    )
    try:
        assert worker.step() == worker.step() == 2.0
        assert 190 < (worker.memory_bytes() - worker.base_bytes) / 2**20 < most
        assert worker.base_bytes > 1 << 26 and not worker.last.whole_life
    finally:
        worker.close()


def test_note_says_when_step_peaks_are_unavailable(monkeypatch):
    def read_only(path, text):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", read_only)
    worker = WorkerProcess.__new__(WorkerProcess)
    worker.name, worker.environment, worker.last = "x", {}, _reporting(lambda: 1.0, 1)()
    assert worker.last.whole_life and worker.note.endswith("x: memory is the peak since the start of the process")


@pytest.mark.parametrize("contender", ["peakgpt", "eager"])
def test_training_step_frees_the_initial_state(contender, monkeypatch):
    states = []
    training_inputs = training.training_inputs

    def watched(*args):
        state, batch = training_inputs(*args)
        states.append(weakref.ref(state["transformer.wte.weight"].untyped_storage()))
        return state, batch

    monkeypatch.setattr(training, "training_inputs", watched)
    step = training.training_step(training_request(contender))
    gc.collect()
    assert step() > 0 and states[0]() is None


def test_contender_with_other_loss_raises():
    losses = {"x": 2.005, "eager": 2.0}
    for name in losses:
        _expect_same_loss(name, losses, 3, torch.bfloat16)
    with pytest.raises(ValueError, match=r"x: loss 2\.0050 after 3 updates, expected 2\.0000 within 0\.1%"):
        _expect_same_loss("x", losses, 3, torch.float32)


class FakeContender:
    pid, base_bytes, note = None, None, "said"
    closed = ()

    def __init__(self, step):
        self.step = step

    def memory_bytes(self):
        return 7

    def close(self):
        FakeContender.closed += (self.step,)


def test_failing_contenders_are_reported_and_closed(monkeypatch):
    monkeypatch.setattr(FakeContender, "closed", ())
    right, wrong, raises = lambda: 1, lambda: 2, lambda: 1 / 0
    starts = {"absent": raises, "right": lambda: FakeContender(right), "wrong": lambda: FakeContender(wrong),
              "raises": lambda: FakeContender(raises)}  # fmt: skip
    seen, told = [], []

    def judge(name, values):
        seen.append(dict(values))
        assert values[name] == 1

    measured = time_contenders(starts.items(), lambda name, stepper: stepper.step(), judge, rounds=3,
                       on_failure=lambda name, error: told.append((name, type(error))))  # fmt: skip
    assert told == [("absent", ZeroDivisionError), ("raises", ZeroDivisionError), ("wrong", AssertionError)]
    assert FakeContender.closed == (raises, wrong, right) and seen == [{"right": 1, "wrong": 2}] * 2
    found = measured.pop("right")
    assert not measured and len(found.timing.samples_s) == 3 and (found.memory_bytes, found.note) == (7, "said")
    assert found.timing.noted("", "a", "b").note.endswith("a; b")


@pytest.mark.parametrize("name", [name for name in decoding.DECODING_CONTENDERS if name != "eager"])
def test_decoding_contenders_give_the_tokens_of_eager(name):
    """float32 weights give the tokens of eager. Other formats give the same tokens in every run, and as many."""
    who = decoding.DECODING_CONTENDERS[name]
    pytest.importorskip(who.package)
    config = preset("gpt2-tiny", n_layer=1, vocab_size=96, n_head=2, n_embd=64)
    case = Workload(2, 4, 6)
    state, ids = decode.decoding_inputs(config, case)
    expected = decoding.eager_decoder(dict(state), config, ids, case, "float32")()
    for form in who.formats:
        run = who.build(dict(state), config, ids, case, form)
        text = run()
        assert text.shape == (2, 6) and torch.equal(text, run())
        assert form != "float32" or torch.equal(text, expected)
    assert len(expected.unique()) > 3


def test_other_tokens_raise():
    expected = torch.arange(12).view(2, 6)
    with pytest.raises(ValueError, match="only the first 0 tokens equal those of eager"):
        decode._expect_equal_start("x", expected + 1, expected, "float32")
    with pytest.raises(ValueError, match=r"shape \(2, 5\), expected \(2, 6\)"):
        decode._expect_equal_start("x", expected[:, 1:], expected, "int8")


def test_decoding_is_checked_and_timed_in_each_format(monkeypatch):
    fixed_peaks.use(monkeypatch)
    here = lambda name, request, environment: FakeContender(decode.decode_step(request))  # noqa: E731
    monkeypatch.setattr(decode, "WorkerProcess", here)  # processes are tested with the training step and the prompt
    workload, told, found = Workload(2, 4, 6), [], {}
    for weights in ("float32", "int8"):
        case = DecodeCase("tiny", tiny_config(), workload, weights, only=("peakgpt", "eager"), rounds=3)
        results = case.measure(torch.device("cpu"), lambda name, error: told.append(name))
        found[case.name] = [(r.contender, r.dtype, r.memory_bytes) for r in results]
        assert len({r.rounds for r in results}) == 1
    assert found == {"decode/tiny/2x4+6/float32": [("peakgpt", "float32", 7), ("eager", "float32", 7)],
                     "decode/tiny/2x4+6/int8": [("peakgpt", "int8", 7)]}  # fmt: skip
    assert not told
    weights = [decode.read_bytes(preset("gpt2"), Workload(1, 0, 1), form) for form in WEIGHT_FORMATS]
    assert weights[0] == pytest.approx(4 * 123.65e6, rel=2e-3) and weights == sorted(weights, reverse=True)
    assert weights[3] == pytest.approx(38.6e6 + 85.1e6 * 4.5 / 8, rel=2e-3)


def test_compare_decoding_raises_for_wrong_logits(monkeypatch):
    fixed_peaks.use(monkeypatch)
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
    with pytest.MonkeyPatch.context() as patch:
        fixed_peaks.use(patch)
        assert main([*argv, "--out", str(out)]) == 0
    return read_results(next(out.iterdir()))[0]


def test_bench_train_gives_a_result_with_memory_for_each_process(trained):
    assert [r.contender for r in trained] == ["peakgpt", "eager", "eager, tuned malloc"]
    assert all(r.case["batch"] == 1 and r.case["tokens"] == 16 and r.dtype == "bfloat16" for r in trained)
    assert all(r.memory_bytes > r.base_bytes > 1 << 26 and len(r.samples_s) == r.rounds for r in trained)
    (text,) = comparisons(trained)
    assert len(text.splitlines()) == 2 + 2 + 2 and "eager, tuned malloc" in text
