"""Benches: nothing wrong is timed, what fails is told and does not stop the rest, and what is written can be read."""

import dataclasses
import gc
import inspect
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from peakgpt.bench import contenders, decoders, prefill, streams
from peakgpt.bench import device as device_bench
from peakgpt.bench.check import Check, check, judge
from peakgpt.bench.contenders import CONTENDERS, TUNED_MALLOC
from peakgpt.bench.decode import compare_decoding
from peakgpt.bench.eager_gpt import EagerGPT
from peakgpt.bench.findings import Failure, Findings, NotTaken, decode, encode
from peakgpt.bench.isolate import run_part
from peakgpt.bench.ops import Case, agree, choose_cases, compare, compare_ops
from peakgpt.bench.passes import CASES as PASS_CASES
from peakgpt.bench.passes import PASSES, measure
from peakgpt.bench.peers import _epilogue_mlp, peers
from peakgpt.bench.report import comparisons, groups, notes, speedup, tables, verdicts, write_report
from peakgpt.bench.steppers import measure as measure_steppers
from peakgpt.bench.train import _learns_alike
from peakgpt.bench.worker import Worker, _answers
from peakgpt.cli import main
from peakgpt.engine.flops import forward_flops
from peakgpt.engine.model import GPT
from peakgpt.engine.presets import preset
from peakgpt.kernels.clock import Result, Timing, read_results
from peakgpt.kernels.dispatch import OPS

CPU = torch.device("cpu")
SMALL = Case("layernorm", {"rows": 8, "width": 16})


def tiny_config():
    return preset("gpt2-tiny", n_layer=1, vocab_size=64, n_embd=48)


def make_result(**changes):
    fields = {
        "bench": "op", "case": {"op": "mlp", "pass": "forward", "rows": 8}, "contender": "eager", "backend": "torch",
        "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    timing = changes.pop("timing", Timing((0.2,)))
    return Result.of(timing, **{**fields, **changes})


def make_check(**changes):
    fields = {"op": "mlp", "case": {"rows": 8}, "backend": "cpu", "device": "cpu", "dtype": "float32", "passed": True,
              "error": 1e-7, "torch_error": 1e-7, "limit": 3e-7}  # fmt: skip
    return Check(**{**fields, **changes})


# ---- ops


def timed(direction, found=None, **contenders):
    told = {} if found is None else {"on_failure": lambda name, error: found.append((name, str(error)))}
    results = compare(SMALL, direction, CPU, torch.float32, budget_s=0.0, rounds=3,
                      peers=lambda op, device: contenders, **told)  # fmt: skip
    return {r.contender: r for r in results}


def right(x, w, b):
    return F.layer_norm(x, (16,), w, b)


def wrong(x, w, b):
    return 1.01 * right(x, w, b)


def wrong_gradient(x, w, b):
    y = right(x, w, b)
    return y + 0.01 * (y - y.detach())


def test_compare_ops_times_every_op_beside_eager():
    sizes = {"layernorm": {"rows": 8, "width": 16}, "adamw": {"count": 64},
             "attention_qkv": {"batch": 1, "tokens": 8, "heads": 2, "head_dim": 8}}  # fmt: skip
    cases = [Case(op, size) for op, size in sizes.items()]
    results = compare_ops(cases, CPU, torch.float32, budget_s=0.0, rounds=3)
    seen = {(r.case["op"], r.case["pass"], r.contender) for r in results}
    passes = {"layernorm": 2, "adamw": 1, "attention_qkv": 2}
    torchs = {"layernorm": "eager", "adamw": "torch fused", "attention_qkv": "eager"}
    assert {(op, c) for op, _, c in seen} == {(op, c) for op in sizes for c in ("peakgpt", torchs[op])}
    assert all(len([s for s in seen if s[0] == op]) == 2 * count for op, count in passes.items())
    assert next(r for r in results if r.case["op"] == "attention_qkv").case["n_head"] == 2


def test_bench_ops_times_the_asked_sizes_and_passes(tmp_path, capsys):
    argv = ["bench", "ops", "--device", "cpu", "--op", "attention", "--dtype", "float32", "--pass", "backward"]
    sizes = {"batch": 1, "tokens": 8, "heads": 2, "head_dim": 16}
    argv += [a for name, value in sizes.items() for a in ("--size", f"{name}={value}")]
    assert main([*argv, "--seconds", "1", "--out", str(tmp_path)]) == 0
    results, _ = read_results(next(tmp_path.iterdir()))
    assert [r.contender for r in results] == ["peakgpt", "eager", "sdpa flash"]
    assert all(r.case.items() >= {"pass": "backward", **sizes}.items() for r in results)
    assert all("freed memory is kept, for every contender" in r.note for r in results)
    said = capsys.readouterr().out
    assert "peakgpt against each contender" in said and "freed memory is kept" in said


@pytest.mark.parametrize(
    "size, message",
    [("rows=8", "got size 'rows' for attention, expected batch, tokens, heads, head_dim"),
     ("tokens", "got --size 'tokens', expected NAME=N"), ("tokens=0", "N at least 1"), ("tokens=-1", "N at least 1")],
)  # fmt: skip
def test_sizes_that_an_op_has_not_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        choose_cases(["attention"], [size])


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_a_contender_with_wrong_values_is_refused(direction):
    assert set(timed(direction, other=right)) == {"peakgpt", "eager", "other"}
    with pytest.raises(ValueError, match=r"layernorm: other: result \d is off eager by 0.01, expected at most 0.001"):
        timed(direction, other=wrong)


def test_wrong_gradients_are_refused_where_they_count():
    assert "other" in timed("forward", other=wrong_gradient)
    for direction in ("backward", "forward+backward"):
        with pytest.raises(ValueError, match="off eager"):
            timed(direction, other=wrong_gradient)


def test_the_others_are_timed_when_one_fails():
    def broken(x, w, b):
        raise RuntimeError("no such kernel")

    def declines(x, w, b):
        raise NotTaken

    found = []
    results = timed("forward", found, broken=broken, wrong=wrong, declines=declines)
    assert set(results) == {"peakgpt", "eager"}
    assert [name for name, _ in found] == ["broken", "wrong"] and found[0][1] == "no such kernel"


def test_flops_and_bytes_are_those_of_the_direction():
    op = OPS["layernorm"]
    cost = op.cost(*op.sample(rows=8, width=16))
    by = {d: timed(d)["eager"] for d in ("forward", "backward", "forward+backward")}
    assert (by["forward"].flops, by["backward"].flops) == (cost.flops, cost.backward_flops)
    assert (by["forward"].bytes, by["backward"].bytes) == (cost.bytes, cost.backward_bytes)
    assert by["forward+backward"].bytes == cost.bytes + cost.backward_bytes


def test_values_are_compared_at_other_sizes_where_eager_does_not_fit():
    case = Case("adamw", {"count": 64}, checked={"count": 8})
    run = lambda **peer: compare(case, "forward", CPU, torch.float32, budget_s=0.0, rounds=3,  # noqa: E731
                                 peers=lambda op, device: peer)  # fmt: skip
    assert [r.contender for r in run()] == ["peakgpt", "torch fused"]
    with pytest.raises(ValueError, match="adamw: idle"):
        run(idle=lambda *tensors, lr: None)


def test_peers_have_our_arguments():
    adamw, attention, mlp = OPS["adamw"], OPS["attention"], OPS["mlp"]
    names = {r.contender for case, op in ((Case("adamw", {"count": 64}), adamw),
                                          (Case("attention", {"batch": 1, "tokens": 8, "heads": 1}), attention))
             for r in compare(case, "forward", CPU, torch.float32, budget_s=0.0, rounds=3, peers=peers)}  # fmt: skip
    assert names == {"peakgpt", "eager", "torch fused", "sdpa flash"}  # adamw's without eager
    assert set(peers(attention, torch.device("cuda"))) == {"sdpa cudnn", "sdpa flash", "sdpa efficient"}
    tensors = mlp.sample(rows=4, width=16, hidden=64)
    with torch.no_grad():  # its GELU is tanh on CUDA and erf on CPU
        torch.testing.assert_close(_epilogue_mlp(*tensors), mlp.eager(*tensors, activation="gelu_erf"))
    with pytest.raises(NotTaken):
        _epilogue_mlp(*tensors)


# ---- passes

TINY = {"rows": 3, "width": 8, "batch": 2, "tokens": 3, "vocab": 9, "count": 5}
# Elements of each size that are read, and that are written.
MOVED = {
    "layernorm_forward": (24, 24), "layernorm_backward": (48, 24), "embedding_forward": (72, 48),
    "cross_entropy": (27, 27), "sum_of_squares": (5, 0), "adamw": (20, 15),
}  # fmt: skip


def tiny(name):
    return {k: TINY[k] for k in inspect.signature(PASSES[name]).parameters if k in TINY}


def test_every_pass_is_measured():
    assert set(MOVED) == set(PASSES) == {name for name, _ in PASS_CASES}
    for name, sizes in PASS_CASES:
        assert set(tiny(name)) <= set(sizes) <= set(inspect.signature(PASSES[name]).parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_moves_what_it_says(name, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr("peakgpt.bench.passes.stream_peak", lambda *a, **k: asked.append((a, k)) or (1e9, "streams"))
    result = measure(name, tiny(name), dtype, rounds=1)
    read, written = (4 * n for n in MOVED[name])
    if dtype == torch.bfloat16:  # all but the optimizer's remainder and moments
        read, written = (70, 60) if name == "adamw" else (read // 2, written // 2)
    ((_, *moved, touched), more) = asked[0]
    assert moved == [read, written] and result.bytes == read + written
    updated = {"cross_entropy": read, "adamw": 60}.get(name, 0)
    assert more == {"updated_bytes": updated} and touched == read + written - updated
    assert result.bytes_fraction == result.bytes / result.median_s / 1e9
    assert name in tables([result])[0]


def test_passes_write_what_they_say():
    """The tensors that a pass names as written change, those that it only reads do not."""
    for name in PASSES:
        made = PASSES[name](torch.float32, **tiny(name))
        before = {id(t): t.clone() for t in (*made.read, *made.written) if t is not None}
        made.bind()()
        for t in made.read:
            assert t is None or torch.equal(t, before[id(t)]) != any(t is w for w in made.written), name
        assert all(t is None or not torch.equal(t, before[id(t)]) for t in made.written), name


# ---- the rule against float64


def test_the_rule():
    truth = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
    at = lambda error: [(truth[0] + error).float()]  # noqa: E731
    assert judge(at(2e-3), at(1e-3), truth, torch.float32)[0].passed
    assert not judge(at(2.1e-3), at(1e-3), truth, torch.float32)[0].passed
    assert not judge([torch.tensor([float("nan"), 2.0])], at(1e-3), truth, torch.float32)[0].passed
    inf = [torch.tensor([float("inf"), 2.0])]
    assert not judge(inf, inf, truth, torch.float32)[0].passed, "not right only because torch is wrong too"
    with pytest.raises(ValueError, match=r"expected \(2,\) torch.float32"):
        judge([truth[0]], at(0.0), truth, torch.float32)


def test_a_wrong_kernel_is_told_and_named(monkeypatch):
    from peakgpt.kernels.cpu import layernorm

    case = ("layernorm", {"rows": 5, "width": 16}, {}, torch.float32, CPU)
    (good,) = check(*case)
    assert good.passed and good.backend == "cpu" and good.error <= good.limit
    forward = layernorm.forward
    monkeypatch.setattr(
        layernorm, "forward", lambda outputs, *a, **k: (forward(outputs, *a, **k), outputs[0].mul_(1.01))
    )
    (bad,) = check(*case)
    assert not bad.passed and "result 0: error" in bad.message and bad.error > bad.limit


# ---- training and decoding


def training_request(contender, **changes):
    return {"make": "peakgpt.bench.contenders:training_step", "contender": contender,
            "config": dataclasses.asdict(tiny_config()), "batch": 1, "tokens": 16, "dtype": "float32", "warmup": 0.0,
            "recompute": "none", "threads": 1, **changes}  # fmt: skip


def test_worker_steps_and_ends():
    worker, dead = (Worker(name, training_request(name), {}) for name in ("peakgpt", "nobody"))
    losses = [worker.step() for _ in range(3)]
    assert losses[2] < losses[0] and "page faults" in worker.note
    with pytest.raises(RuntimeError, match="worker 'nobody' ended with exit code 1"):
        dead.step()
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(RuntimeError, match="'peakgpt' ended with exit code -9"):
        worker.step()
    for w in (worker, dead):
        w.close()


GREEDY = """
import torch
MIB = 1 << 18  # floats

def make(request):
    torch.ones(400 * MIB)  # building takes more than a step
    kept = torch.ones(100 * MIB)
    return lambda: float((kept + 1)[0])
"""


# The tuned allocator keeps a step's freed 100 MiB, and where something small lies in it, the next step gets others.
@pytest.mark.parametrize("environment, most", [({}, 220), ({"GLIBC_TUNABLES": TUNED_MALLOC}, 320)])
def test_a_workers_memory_is_that_of_a_step(tmp_path, environment, most):
    """Fails without the reset of the peak or, under the tuned allocator, without the return of freed memory."""
    (tmp_path / "greedy.py").write_text(GREEDY)
    worker = Worker("greedy", {"make": "greedy:make", "threads": 1}, {"PYTHONPATH": str(tmp_path), **environment})
    try:
        assert worker.step() == worker.step() == 2.0
        assert 190 < (worker.memory_bytes() - worker.base_bytes) / 2**20 < most
        assert worker.base_bytes > 1 << 26 and not worker.last.whole_life
    finally:
        worker.close()


def test_a_system_without_peaks_of_a_step_says_so(monkeypatch):
    def read_only(path, text):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", read_only)
    worker = Worker.__new__(Worker)
    worker.name, worker.last = "x", _answers(lambda: 1.0, 1)()
    assert worker.last.whole_life and worker.note.endswith("x: memory is the most since the process began")


@pytest.mark.parametrize("contender", ["peakgpt", "eager"])
def test_a_training_step_holds_no_initial_state(contender, monkeypatch):
    states = []
    start = contenders.start

    def watched(*args):
        state, batch = start(*args)
        states.append(weakref.ref(state["transformer.wte.weight"].untyped_storage()))
        return state, batch

    monkeypatch.setattr(contenders, "start", watched)
    step = contenders.training_step(training_request(contender))
    gc.collect()
    assert step() > 0 and states[0]() is None


def test_a_contender_that_learns_otherwise_is_refused():
    losses = {"x": 2.005, "eager": 2.0}
    for name in losses:
        _learns_alike(name, losses, 3, torch.bfloat16)
    with pytest.raises(ValueError, match=r"x: loss 2\.0050 after 3 updates, expected 2\.0000 within 0\.1%"):
        _learns_alike("x", losses, 3, torch.float32)


class Stepper:
    pid, base_bytes, note = None, None, "said"
    closed = ()

    def __init__(self, step):
        self.step = step

    def memory_bytes(self):
        return 7

    def close(self):
        Stepper.closed += (self.step,)


def test_who_does_not_start_raises_or_is_wrong_is_told_and_closed(monkeypatch):
    monkeypatch.setattr(Stepper, "closed", ())
    right, wrong, raises = lambda: 1, lambda: 2, lambda: 1 / 0
    starts = {"absent": raises, "right": lambda: Stepper(right), "wrong": lambda: Stepper(wrong),
              "raises": lambda: Stepper(raises)}  # fmt: skip
    seen, told = [], []

    def judge(name, values):
        seen.append(dict(values))
        assert values[name] == 1

    measured = measure_steppers(starts.items(), lambda name, stepper: stepper.step(), judge, rounds=3,
                       on_failure=lambda name, error: told.append((name, type(error))))  # fmt: skip
    assert told == [("absent", ZeroDivisionError), ("raises", ZeroDivisionError), ("wrong", AssertionError)]
    assert Stepper.closed == (raises, wrong, right) and seen == [{"right": 1, "wrong": 2}] * 2
    found = measured.pop("right")
    assert not measured and len(found.timing.samples_s) == 3 and (found.memory_bytes, found.note) == (7, "said")
    assert found.noted("", "a", "b").note.endswith("a; b")


@pytest.mark.parametrize("name", [name for name in decoders.CONTENDERS if name != "eager"])
def test_streams_decode_the_same_text(name):
    """In float32 eager's text; in small weights the same again and again, as long."""
    who = decoders.CONTENDERS[name]
    pytest.importorskip(who.package)
    config = preset("gpt2-tiny", n_layer=1, vocab_size=96, n_head=2, n_embd=64)
    case = decoders.Case(2, 4, 6)
    state, ids = streams.start(config, case)
    expected = decoders.eager_decoder(dict(state), config, ids, case, "float32")()
    for form in who.forms:
        decode = who.build(dict(state), config, ids, case, form)
        text = decode()
        assert text.shape == (2, 6) and torch.equal(text, decode())
        assert form != "float32" or torch.equal(text, expected)
    assert len(expected.unique()) > 3


def test_other_texts_are_refused():
    expected = torch.arange(12).view(2, 6)
    with pytest.raises(ValueError, match="only the first 0 tokens are eager's"):
        streams._alike("x", expected + 1, expected, "float32")
    with pytest.raises(ValueError, match=r"shape \(2, 5\), expected \(2, 6\)"):
        streams._alike("x", expected[:, 1:], expected, "int8")


def test_forms_of_weights_are_compared_in_one_run(monkeypatch):
    peak = SimpleNamespace(bandwidth_bytes_s=1e9, source="none")
    monkeypatch.setattr(streams, "peak_for", lambda *args: peak)
    here = lambda name, request, environment: Stepper(streams.decode_step(request))  # noqa: E731
    monkeypatch.setattr(streams, "Worker", here)  # processes are tested with the training step and the prompt
    case, told = decoders.Case(2, 4, 6), []
    results = streams.compare_streams(tiny_config(), case, ("float32", "int8"), ["peakgpt", "eager"], rounds=3,
                                      on_failure=lambda name, error: told.append(name))  # fmt: skip
    assert [(r.contender, r.dtype) for r in results] == [("peakgpt", "float32"), ("eager", "float32"),
                                                         ("peakgpt", "int8")]  # fmt: skip
    assert not told and len({r.rounds for r in results}) == 1
    weights = [streams.read_bytes(preset("gpt2"), decoders.Case(1, 0, 1), form) for form in decoders.FORMS]
    assert weights[0] == pytest.approx(4 * 123.65e6, rel=2e-3) and weights == sorted(weights, reverse=True)
    assert weights[3] == pytest.approx(38.6e6 + 85.1e6 * 4.5 / 8, rel=2e-3)


def test_decoding_is_compared_and_wrong_logits_are_refused():
    model = GPT(tiny_config())
    ids = torch.randint(64, (2, 4))
    results = compare_decoding(model, ids, count=3, rounds=3)
    assert [r.contender for r in results] == ["peakgpt", "eager"] and results[0].case["batch"] == 2
    model.head = lambda h: F.linear(h, model.transformer.wte.weight).roll(1, -1)
    with pytest.raises(ValueError, match="decode: peakgpt: result 0 is off eager"):
        compare_decoding(model, ids, count=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("train")
    argv = ["bench", "train", "--device", "cpu", "--model", "gpt2-tiny", "--batch", "1", "--tokens", "16", "--rounds",
            "3", "--dtype", "bfloat16", "--contenders", "peakgpt", "eager", "eager, tuned malloc"]  # fmt: skip
    assert main([*argv, "--out", str(out)]) == 0
    return read_results(next(out.iterdir()))[0]


def test_bench_train_compares_processes(trained):
    assert [r.contender for r in trained] == ["peakgpt", "eager", "eager, tuned malloc"]
    assert all(r.case["batch"] == 1 and r.case["tokens"] == 16 and r.dtype == "bfloat16" for r in trained)
    assert all(r.memory_bytes > r.base_bytes > 1 << 26 and len(r.samples_s) == r.rounds for r in trained)
    (text,) = comparisons(trained)
    assert len(text.splitlines()) == 2 + 2 + 2 and "eager, tuned malloc" in text


# ---- prefill


def small_prompt(contender, dtype=torch.float32):
    config = tiny_config()
    state, ids = prefill.start(config, 16)
    return prefill.CONTENDERS[contender].build(state, config, ids, dtype), prefill.reference_logits(config, 16)


@pytest.mark.parametrize(
    ("contender", "dtype"),
    [(name, getattr(torch, form)) for name in ("peakgpt", "eager", "transformers", "openvino", "ctranslate2")
     for form in prefill.CONTENDERS[name].forms],
)
def test_every_contender_computes_the_prompts_last_logits(contender, dtype):
    pytest.importorskip(prefill.CONTENDERS[contender].package)
    run, reference = small_prompt(contender, dtype)
    for _ in range(2):  # the second prompt starts afresh
        agree(contender, [run()], [reference], dtype if dtype.is_floating_point else torch.bfloat16)
    assert reference.shape == (1, 64)


def test_the_static_cache_holds_keys_and_values():
    model, kept = prefill.PromptGPT(tiny_config()), {}
    ids = torch.randint(64, (1, 5))
    model(ids, lambda layer, k, v: kept.update({layer: (k, v)}))
    past = [[]]
    EagerGPT.forward(model, ids, past=past)
    assert list(kept) == [0] and all(torch.equal(a, b) for a, b in zip(kept[0], past[0], strict=True))


def test_prefill_is_compared_and_what_is_missing_is_named(monkeypatch):
    absent = dataclasses.replace(prefill.CONTENDERS["eager"], package="no_such_engine")
    monkeypatch.setitem(prefill.CONTENDERS, "absent", absent)
    told = []
    results = prefill.compare_prefill(
        tiny_config(), 16, torch.float32, ["peakgpt", "absent", "eager"], rounds=3,
        on_failure=lambda name, error: told.append(f"{name}: {error}"),
    )  # fmt: skip
    assert [r.contender for r in results] == ["peakgpt", "eager"]
    assert told == ["absent: not measured, no_such_engine is not installed: pip install no_such_engine"]
    assert all(r.flops == prefill.work_flops(tiny_config(), 16) and r.memory_bytes > r.base_bytes for r in results)
    assert "rounds" in tables(results)[0] and "3 of 3" in tables(results)[0]


def test_wrong_prefill_logits_are_refused(monkeypatch):
    right = prefill.reference_logits
    monkeypatch.setattr(prefill, "reference_logits", lambda *a: right(*a).roll(1, -1))
    told = []
    results = prefill.compare_prefill(
        tiny_config(), 16, torch.float32, ["eager"], rounds=3, on_failure=lambda name, error: told.append(str(error))
    )
    assert results == [] and "prefill: eager: result 0 is off eager" in told[0]


def test_prefill_counts_what_a_prompt_must_compute():
    assert prefill.work_flops(preset("gpt2"), 512) == pytest.approx(86.59e9, rel=1e-3)
    one = prefill.work_flops(preset("gpt2"), 1)
    assert one == pytest.approx(forward_flops(preset("gpt2"), 1))


def test_prefill_is_for_the_cpu(monkeypatch):
    with pytest.raises(ValueError, match="expected --device cpu"):
        prefill.run(None, torch.device("cuda"))


# ---- tables and the page


def test_speedup_and_groups():
    eager, ours = make_result(), make_result(contender="peakgpt", timing=Timing((0.1,)))
    other = make_result(case={"op": "mlp", "pass": "forward", "rows": 9})
    assert groups([eager, other, ours]) == [[eager, ours], [other]]
    assert speedup(ours, [eager, ours]) == pytest.approx(2.0)
    assert speedup(eager, [eager, ours]) is None and speedup(ours, [ours]) is None


def test_tables_say_what_was_measured():
    eager = make_result(flops=4e9, flops_kind="work", peak_flops_s=1e11)
    ours = make_result(contender="peakgpt", backend="cpu", timing=Timing((0.1,)), flops=4e9, flops_kind="work")
    text = "\n".join(tables([eager, ours]))
    lines = text.splitlines()
    assert "work FLOPs" in lines[1] and "GB/s" not in text, "a column without a figure is left out"
    assert lines[4].startswith("mlp forward float32, rows 8") and "20.0 %" in lines[4] and "20" in lines[4]
    assert "peakgpt (cpu)" in lines[5] and lines[5].endswith("2.00 x") and "mlp" not in lines[5]
    assert len({len(line) for line in lines[2:]}) == 1
    assert tables([]) == []


def test_comparisons_pair_rounds():
    """The machine slows down twofold half way: each time spreads widely, their ratio does not."""
    ours = make_result(contender="peakgpt", timing=Timing((0.1, 0.2, 0.1, 0.2), dropped=1), memory_bytes=6 << 20,
                       base_bytes=2 << 20, flops=4e9, flops_kind="work", peak_flops_s=1e11)  # fmt: skip
    eager = make_result(timing=Timing((0.15, 0.3, 0.15, 0.3)), memory_bytes=12 << 20, base_bytes=2 << 20)
    other = make_result(contender="old", timing=Timing((0.2,)))
    row = comparisons([eager, ours, other])[0].splitlines()[-1].split("  ")
    assert [cell.strip() for cell in row if cell] == [
        "mlp forward float32, rows 8", "26.7 %", "eager", "1.500 x (1.500 to 1.500)", "0.50 x", "0.40 x", "4 of 5"
    ]  # fmt: skip
    assert comparisons([eager]) == comparisons([ours, other]) == []
    bare = [dataclasses.replace(r, memory_bytes=None) for r in (ours, eager)]
    assert "memory" not in comparisons(bare)[0]


def test_notes_tell_each_kind_once():
    disturbed = [make_result(timing=Timing((0.1,), dropped=2, note=f"only {n} of 9 rounds fitted")) for n in (3, 4, 5)]
    said = notes([*disturbed, make_result(peak_source="datasheet")])
    assert said == [
        "op: 2 of 3 rounds dropped, the machine was busy elsewhere",
        "only 3 of 9 rounds fitted (2 more like it)",
        "peak: datasheet",
    ]


def test_verdicts_and_exit_code():
    fine = Findings(checks=[make_check()], failures=[Failure(message="no kernel", contender="sdpa cudnn")])
    assert fine.exit_code == 0 and "1 of 1 cases" in verdicts(fine)[0]
    for bad in (Findings(checks=[make_check(passed=False, message="result 1: error 3e-2")]),
                Findings(failures=[Failure(message="x", contender="peakgpt, gpu")]),
                Findings(failures=[Failure(message="x", job="batch 8")])):  # fmt: skip
        assert bad.exit_code == 1 and len(verdicts(bad)) >= 1
    assert Findings().exit_code == 0


def test_rows_survive_the_way_between_processes():
    for row in (make_result(), make_check(), Failure(message="m", part="p", job="j")):
        assert decode(json.loads(json.dumps(encode(row)))) == row


def test_a_failure_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ZeroDivisionError) as caught:
        run_part("peer", "", CPU)
    told = Failure.of(caught.value)
    for line in ('File "bench/isolate.py", line ', 'File "importlib/__init__.py", line ', 'File "peer.py", line 1'):
        assert line in told.traceback
    assert 'File "/' not in told.traceback
    told = Failure(message=f"{tmp_path}/a.so: none, /other{tmp_path}/b.so: none")
    assert told.message == f"a.so: none, /other{tmp_path}/b.so: none"  # no end of a longer path is cut


def test_report_is_self_contained(tmp_path):
    rows = [{"contender": c, "step": s, "loss": 5.0 - s} for c in ("peakgpt", "eager") for s in range(3)]
    rows += [{"contender": "peakgpt", "step": s, "bits_per_byte": 3.5 - s} for s in (0, 2)]
    rows += [{"contender": "peakgpt", "step": 3, "loss": float("nan")}]
    write_report(tmp_path / "report.html", rows=rows, results=[make_result(), make_result(contender="a<b")],
                 environment={"commit": "abc"}, corpus="11 MB & more", sample="<script>alert()</script>")  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    # Nothing is loaded: every reference stays in the page (namespaces are names, no addresses).
    assert not re.search(r"src\s*=|href\s*=\s*[\"'](?!#)|url\((?!#)|@import|<script", page)
    for text in ("11 MB &amp; more", "a&lt;b", "mlp forward float32, rows 8", "abc", "bits per byte", "&lt;script"):
        assert text in page
    assert page.count("<svg") == 2 and page.count('id="curve-') == 3 and "nan" not in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# ---- the device script

FAKE = """
import os, time
from peakgpt.bench.findings import Failure
from peakgpt.bench.isolate import Part

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


def test_a_failing_hanging_or_dying_job_does_not_stop_the_rest(fake):
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


def test_a_part_that_can_not_start_or_has_no_time_is_told(fake, capsys):
    found = device_bench.run_parts(fake, ["unusable", "late"], CPU)
    assert [f.message for f in found.failures] == [
        "the process ended with exit code 1",
        "not run: the part's 0 s are over",
    ]
    assert "ZeroDivisionError" in found.failures[0].traceback and found.exit_code == 1
    assert capsys.readouterr().err.startswith("unusable:")


def test_bench_device_end_to_end(tmp_path, capsys):
    argv = ["bench", "device", "--device", "cpu", "--only", "adamw", "--commit", "abc"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert set(document) == {"schema", "environment", "results", "checks", "failures"}
    assert document["environment"]["commit"] == "abc" and document["failures"] == []
    assert {r["case"]["op"] for r in document["results"]} == {"adamw"}
    assert {r["contender"] for r in document["results"]} == {"peakgpt", "torch fused"}
    assert "adamw forward bfloat16" in capsys.readouterr().out
    assert main(["bench", "device", "--only", "lunch"]) == 2


@pytest.mark.parametrize("part", device_bench.PARTS)
def test_every_part_runs_on_cpu(part):
    rows = []
    for job in list(device_bench.PARTS[part].jobs(CPU).values())[:4]:
        job(0.0, rows.append)
    assert rows and not [r for r in rows if isinstance(r, Failure)]
    assert all(r.passed for r in rows if isinstance(r, Check))
    if part == "train":
        assert [r.contender for r in rows] == ["peakgpt", "eager"]
        assert all(r.flops_kind == "model" and r.memory_bytes for r in rows)


def test_every_gpu_case_is_a_call_that_its_op_takes():
    d = device_bench
    for case in (*d.ATTENTION, *d.LAYERNORM, *d.MLP, *d.LINEAR, *d.LOSS, *d.ADAMW):
        op, sizes, device = OPS[case.op], case.sizes, "meta"
        if case.op == "attention_decode":  # its cost reads the lengths, so its tensors are real, and few
            sizes, device = {**sizes, "keys": 64, "block": 16}, "cpu"
        tensors, params = op._bind(op.sample(**sizes, device=device, dtype=torch.bfloat16), case.arguments)
        op.check(*tensors, **params)
        assert op.cost(*tensors, **params).flops > 0
    jobs = device_bench.PARTS["attention"].jobs(torch.device("cuda"))
    assert len(jobs) == 6 * 2 + 2 + 6  # forward and backward; one query by attention, by attention_decode
    assert len(device_bench.PARTS["check"].jobs(torch.device("cuda"))) == 2 * (
        len(device_bench.CASES) + len(device_bench.LARGE_CASES) + 1
    )


def test_the_budgets_keep_eight_minutes():
    assert sum(p.budget_s for p in device_bench.PARTS.values()) <= 450
    assert all(p.patience_s <= p.budget_s for p in device_bench.PARTS.values())


def test_a_bare_machine_is_enough():
    """No rich, no tokenizers, no safetensors, no C++ extension: what `bench device` imports needs torch only."""
    code = """
import sys
for name in ("rich", "matplotlib", "tokenizers", "safetensors", "transformers", "peakgpt._C"):
    sys.modules[name] = None
import peakgpt.commands.bench, peakgpt.bench.device
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_contenders_with_an_environment_are_for_processes_only():
    assert [n for n, c in CONTENDERS.items() if not c.environment] == ["peakgpt", "eager", "compile"]
