"""Contenders in worker processes: protocol, memory, checks before timing, training and decoding."""

import argparse
import dataclasses
import gc
import weakref
from pathlib import Path

import fixed_peaks
import pytest
import torch
import torch.nn.functional as F

from peakgpt.bench import decode
from peakgpt.bench.contenders import decoding, eager_gpt, models, training
from peakgpt.bench.contenders.contender import TUNED_MALLOC, WEIGHT_FORMATS, Workload
from peakgpt.bench.contenders.llama_cpp_model import weight_bits
from peakgpt.bench.contenders.models import random_prompts, write_random_model
from peakgpt.bench.contenders.time_contenders import time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess, _reporting
from peakgpt.bench.decode import DecodeCase, compare_decoding
from peakgpt.bench.fidelity import Fidelity
from peakgpt.bench.model_choice import chosen_model
from peakgpt.bench.report import comparisons
from peakgpt.bench.schema import read_results
from peakgpt.bench.train import _expect_same_loss
from peakgpt.cli import main
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.flops import multiplying_parameters, parameter_count
from peakgpt.engine.model.presets import preset


def tiny_config():
    return preset("gpt2-tiny", n_layer=1, vocab_size=64, n_embd=48)


def small_config(name):
    """A preset of width 64, with two layers and all parts of its family."""
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 96, "n_inner": 128, "block_size": 64}
    if name != "gpt2-tiny":
        sizes |= {"n_kv_head": 2, "head_dim": 32}
    if name == "gpt-oss-20b":
        sizes |= {"experts": 4, "experts_per_token": 2, "expert_inner": 128, "rope_scaling": None}
    if name == "llama-3.2-1b":
        sizes |= {"rope_scaling": None}
    return preset(name, **sizes)


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


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b"])
def test_training_by_transformers_has_the_losses_of_ours(name):
    pytest.importorskip("transformers")
    config = dataclasses.asdict(small_config(name))
    steps = [training.training_step(training_request(who, config=config)) for who in ("peakgpt", "eager")]
    for _ in range(3):
        ours, theirs = (step() for step in steps)
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_contender_with_other_loss_raises():
    losses = {"x": 2.005, "eager": 2.0}
    for name in losses:
        _expect_same_loss(name, losses, 3, torch.bfloat16)
    with pytest.raises(ValueError, match=r"x: loss 2\.0050 after 3 updates, expected 2\.0000 within 0\.1%"):
        _expect_same_loss("x", losses, 3, torch.float32)


class FakeContender:
    pid, base_bytes, note = None, None, "said"
    closed = ()
    step_once = WorkerProcess.step_once

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


@pytest.fixture(scope="module", params=["gpt2-tiny", "llama-3.2-1b", "qwen3-0.6b", "gpt-oss-20b"])
def written(request, tmp_path_factory):
    """A folder with a random model of two layers, and its config."""
    config = small_config(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    write_random_model(folder, config)
    return folder, config


# Nats per token of these models; another text or wrong positions give more than 0.1.
KL_LIMIT = {"float32": 1e-5, "bfloat16": 1e-3, "int8": 1e-2, "int4": 0.1}


def reference_tokens(folder, config, ids, workload):
    if not eager_gpt.is_gpt2(config):
        pytest.importorskip("transformers")
    return decoding.reference_decoder(folder, config, ids, workload, "float32").run()


@pytest.mark.parametrize("name", sorted(decoding.DECODING_CONTENDERS.keys() - {"eager", "transformers, compile"}))
def test_decoding_contenders_give_the_tokens_and_logits_of_eager(name, written):
    """float32 weights give the tokens of eager. Other formats give the same tokens in every run, and as many.

    Logits of a text are near those of float32 as its format allows, and again after another run.
    """
    (folder, config), who, workload = written, decoding.DECODING_CONTENDERS[name], Workload(6, 4, 5)
    pytest.importorskip(who.package)
    if not who.runs(config):
        pytest.skip(f"{name} does not run this model")
    ids = random_prompts(config, 6, 4)
    expected, text = reference_tokens(folder, config, ids, workload), random_prompts(config, 6, 5, seed=1)
    truth = decoding.reference_decoder(folder, config, ids, workload, "float32").logits(text)
    assert len(expected.unique()) > 3
    for form in who.formats:
        decoder = who.build(folder, config, ids, workload, form)
        tokens, logits = decoder.run(), decoder.logits(text)
        assert tokens.shape == (6, 5) and torch.equal(tokens, decoder.run())
        assert form != "float32" or torch.equal(tokens, expected)
        assert logits.dtype == torch.float32 and torch.equal(logits, decoder.logits(text))
        assert Fidelity.of(logits, truth).kl_median < KL_LIMIT[form]  # the mean has positions with other experts
        bits = weight_bits(who, folder, form)
        assert bits is None if form in ("float32", "bfloat16") else 4 < bits < 17


@pytest.mark.slow
def test_a_compiled_model_of_transformers_gives_the_tokens_of_eager(written):
    (folder, config), workload = written, Workload(2, 4, 6)
    pytest.importorskip("transformers")
    ids = random_prompts(config, 2, 4)
    decoder = decoding.DECODING_CONTENDERS["transformers, compile"].build(folder, config, ids, workload, "float32")
    assert torch.equal(decoder.run(), reference_tokens(folder, config, ids, workload))


def test_the_reference_computes_in_float32_with_bfloat16_weights(written):
    """Bit by bit what a float32 copy computes, and afterwards the weights are bfloat16 again."""
    pytest.importorskip("transformers")
    folder, config = written
    ids = random_prompts(config, 1, 5)
    whole = models.transformers_model(folder, torch.float32)
    parts = models.computing_in_float32(models.transformers_model(folder, torch.bfloat16))
    with torch.inference_mode():
        assert torch.equal(parts(ids).logits, whole(ids).logits)
    assert {p.dtype for p in parts.parameters()} == {torch.bfloat16}


def test_a_model_without_a_family_of_transformers_is_refused():
    sizes = {"layers": 2, "vocab_size": None, "streams": [1], "prompt": 1, "tokens": 1, "dtype": None}
    args = argparse.Namespace(model="glam-64b-64e", **sizes)
    with pytest.raises(ValueError, match="no family of transformers expresses, expected one that does"):
        decode.cases(args, torch.device("cpu"))


def test_flags_cut_a_model_and_name_what_they_changed():
    args = argparse.Namespace(model="gpt-oss-20b", layers=4, vocab_size=32000)
    name, config = chosen_model(args)
    assert name == "gpt-oss-20b,n_layer=4,vocab_size=32000" and (config.n_layer, config.vocab_size) == (4, 32000)
    assert config.windows == (128, None, 128, None)
    args.layers = 25
    with pytest.raises(ValueError, match="got --layers 25, expected at most the 24 of gpt-oss-20b"):
        chosen_model(args)


def test_read_bytes_count_what_a_token_needs():
    """Active experts, a tied head once, of an untied pair the head alone, keys of a window only."""
    none = Workload(1, 0, 1)
    llama = parameter_count(preset("llama-3.2-1b"))
    assert decode.read_bytes(preset("llama-3.2-1b"), none, "bfloat16") == pytest.approx(2 * llama, rel=1e-3)
    oss = preset("gpt-oss-20b", n_layer=4)
    active = multiplying_parameters(oss)
    assert decode.read_bytes(oss, none, "bfloat16") == pytest.approx(2 * active, rel=1e-3)
    eight = decode.read_bytes(oss, Workload(8, 0, 1), "bfloat16")
    experts = parameter_count(oss) - parameter_count(oss, active=True)  # 28 of 32
    assert eight == pytest.approx(2 * (active + experts / 28 * (32 * (1 - 0.875**8) - 4)), rel=1e-3)
    keys = [decode.read_bytes(oss, Workload(1, t, 1), "bfloat16") for t in (1000, 2000)]
    assert keys[1] - keys[0] == 2 * 2 * 1000 * 2 * oss.n_kv_head * oss.head_dim, "two layers have windows of 128"



def test_other_tokens_raise():
    expected = torch.arange(12).view(2, 6)
    with pytest.raises(ValueError, match="only the first 0 tokens equal those of eager"):
        decode._expect_equal_start("x", expected + 1, expected, "float32")
    with pytest.raises(ValueError, match=r"shape \(2, 5\), expected \(2, 6\)"):
        decode._expect_equal_start("x", expected[:, 1:], expected, "int8")
    longer = torch.cat([expected, expected], 1)
    assert "at least 6 of the first 6 tokens" in decode._expect_equal_start("x", longer, expected, "float32")


def test_decoding_is_checked_and_timed_in_each_format(monkeypatch):
    fixed_peaks.use(monkeypatch)
    here = lambda name, request, environment: FakeContender(decode.decode_step(request))  # noqa: E731
    monkeypatch.setattr(decode, "WorkerProcess", here)  # processes are tested with the training step and the prompt
    workload, told, found = Workload(2, 4, 6), [], {}
    for weights in ("float32", "int8"):
        case = DecodeCase("tiny", tiny_config(), workload, weights, only=("peakgpt", "eager"), rounds=3)
        results = case.measure(torch.device("cpu"), lambda name, error: told.append(name))
        found[case.name] = [(r.contender, r.dtype, r.memory_bytes) for r in results]
        assert all(r.fidelity.positions == 12 and r.fidelity.kl < KL_LIMIT[weights] for r in results)
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
