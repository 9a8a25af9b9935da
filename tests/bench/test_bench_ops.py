"""`bench ops` and `bench memory_bound`: wrong values are not timed, and FLOPs and bytes are counted right."""

import contextlib
import inspect
from types import SimpleNamespace

import fixed_peaks
import pytest
import torch
import torch.nn.functional as F

from peakgpt.bench import op_passes
from peakgpt.bench import ops as bench_ops
from peakgpt.bench.check import check, judge
from peakgpt.bench.contenders.op_peers import _epilogue_mlp, peers
from peakgpt.bench.interleave import raise_failure
from peakgpt.bench.memory_bound import GPT2_CALLS, KERNELS, KernelCase
from peakgpt.bench.ops import OpCase, _parse_sizes, op_cases
from peakgpt.bench.report import notes, tables
from peakgpt.bench.run_results import Unsupported
from peakgpt.bench.schema import read_results
from peakgpt.cli import main
from peakgpt.kernels.core.dispatch import OPS
from peakgpt.kernels.hardware.peaks import Streams

CPU = torch.device("cpu")
SMALL = {"rows": 8, "width": 16}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Compiling an op and measuring peaks take longer than all tests of this file."""
    fixed_peaks.use(monkeypatch)
    monkeypatch.setattr(bench_ops, "peers", lambda op, device: without_compile(peers(op, device)))


def without_compile(found):
    return {name: call for name, call in found.items() if name != "compile"}


@pytest.fixture
def timed(monkeypatch):
    """Return timed(direction, found=None, **contenders) -> result of each contender of a small layernorm."""

    def measure(direction, found=None, **contenders):
        monkeypatch.setattr(bench_ops, "peers", lambda op, device: contenders)
        tell = raise_failure if found is None else lambda name, error: found.append((name, str(error)))
        case = OpCase("layernorm", direction, "float32", SMALL, seconds=0.0, rounds=3)
        return {r.contender: r for r in case.measure(CPU, tell)}

    return measure


def all_results(cases):
    return [result for case in cases for result in case.measure(CPU, raise_failure)]


def right(x, w, b):
    return F.layer_norm(x, (16,), w, b)


def wrong(x, w, b):
    return 1.01 * right(x, w, b)


def wrong_gradient(x, w, b):
    y = right(x, w, b)
    return y + 0.01 * (y - y.detach())


def test_op_cases_time_every_op_and_pass_versus_eager():
    sizes = {"layernorm": {"rows": 8, "width": 16}, "adamw": {"count": 64},
             "attention_qkv": {"batch": 1, "tokens": 8, "heads": 2, "head_dim": 8}}  # fmt: skip
    results = all_results(op_cases(sizes, ["float32"], seconds=0.0, rounds=3))
    seen = {(r.case["op"], r.case["pass"], r.contender) for r in results}
    passes = {"layernorm": 2, "adamw": 1, "attention_qkv": 2}
    torchs = {"layernorm": "eager", "adamw": "torch fused", "attention_qkv": "eager"}
    assert {(op, c) for op, _, c in seen} == {(op, c) for op in sizes for c in ("peakgpt", torchs[op])}
    assert all(len([s for s in seen if s[0] == op]) == 2 * count for op, count in passes.items())
    assert next(r for r in results if r.case["op"] == "attention_qkv").case["n_head"] == 2


def test_bench_ops_times_the_given_sizes_and_passes(tmp_path, capsys):
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
def test_unknown_or_invalid_size_raises(size, message):
    with pytest.raises(ValueError, match=message):
        _parse_sizes(["attention"], [size])


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_contender_with_wrong_values_raises(direction, timed):
    assert set(timed(direction, other=right)) == {"peakgpt", "eager", "other"}
    with pytest.raises(ValueError, match=r"layernorm: other: result \d is off eager by 0.01, expected at most 0.001"):
        timed(direction, other=wrong)


def test_wrong_gradients_raise_if_backward_is_timed(timed):
    assert "other" in timed("forward", other=wrong_gradient)
    for direction in ("backward", "forward+backward"):
        with pytest.raises(ValueError, match="off eager"):
            timed(direction, other=wrong_gradient)


def test_failing_contender_does_not_stop_the_others(timed):
    def broken(x, w, b):
        raise RuntimeError("no such kernel")

    def declines(x, w, b):
        raise Unsupported("not today")

    found = []
    results = timed("forward", found, broken=broken, wrong=wrong, declines=declines)
    assert set(results) == {"peakgpt", "eager"}
    assert [name for name, _ in found] == ["broken", "wrong", "declines"]
    assert (found[0][1], found[2][1]) == ("no such kernel", "not today")


def test_result_of_fallback_to_eager_notes_the_objection(monkeypatch, timed):
    from peakgpt.kernels.cpu import layernorm

    assert "eager ran" not in timed("forward")["peakgpt"].note
    monkeypatch.setattr(layernorm, "objection", lambda *args, **params: "it is Sunday")
    results = timed("forward")
    assert results["peakgpt"].backend == "eager" and "Sunday" not in results["eager"].note
    assert "layernorm: eager ran as peakgpt, cpu objects: it is Sunday" in notes(results.values())


def test_flops_and_bytes_are_those_of_the_pass(timed):
    op = OPS["layernorm"]
    cost = op.cost(*op.sample(rows=8, width=16))
    by = {d: timed(d)["eager"] for d in ("forward", "backward", "forward+backward")}
    assert (by["forward"].flops, by["backward"].flops) == (cost.flops, cost.backward_flops)
    assert (by["forward"].bytes, by["backward"].bytes) == (cost.bytes, cost.backward_bytes)
    assert by["forward+backward"].bytes == cost.bytes + cost.backward_bytes


def test_values_are_compared_at_checked_sizes(monkeypatch):
    cases = [OpCase("adamw", sizes={"count": 64}, checked={"count": 8}, seconds=0.0, rounds=3)]
    assert [r.contender for r in all_results(cases)] == ["peakgpt", "torch fused"]
    monkeypatch.setattr(bench_ops, "peers", lambda op, device: {"idle": lambda *tensors, lr: None})
    with pytest.raises(ValueError, match="adamw: idle"):
        all_results(cases)


def test_peers_take_the_arguments_of_the_op():
    attention, mlp = OPS["attention"], OPS["mlp"]
    cases = op_cases({"adamw": {"count": 64}, "attention": {"batch": 1, "tokens": 8, "heads": 1}}, ["float32"],
                     ["forward"], seconds=0.0, rounds=3)  # fmt: skip
    names = {r.contender for r in all_results(cases)}
    assert names == {name for case in cases for name in case.contenders(CPU)}
    assert names == {"peakgpt", "eager", "torch fused", "sdpa flash"}  # adamw is an op in place, so eager is not timed
    assert set(peers(attention, torch.device("cuda"))) == {"sdpa cudnn", "sdpa flash", "sdpa efficient"}
    tensors = mlp.sample(rows=4, width=16, hidden=64)
    with torch.no_grad():  # its GELU is tanh on CUDA and erf on CPU
        torch.testing.assert_close(_epilogue_mlp(*tensors), mlp.eager(*tensors, activation="gelu_erf"))
    with pytest.raises(Unsupported):
        _epilogue_mlp(*tensors)


# ---- memory-bound kernels

TINY = {"rows": 3, "width": 8, "batch": 2, "tokens": 3, "vocab": 9, "count": 5}
# Elements that each kernel reads and writes at the TINY sizes.
MOVED = {
    "layernorm_forward": (24, 24), "layernorm_backward": (48, 24), "embedding_forward": (72, 48),
    "cross_entropy": (27, 27), "sum_of_squares": (5, 0), "adamw": (20, 15),
}  # fmt: skip


def tiny(name):
    return {k: TINY[k] for k in inspect.signature(KERNELS[name]).parameters if k in TINY}


def test_every_kernel_has_a_case():
    assert set(MOVED) == set(KERNELS) == {name for name, _ in GPT2_CALLS}
    for name, sizes in GPT2_CALLS:
        assert set(tiny(name)) <= set(sizes) <= set(inspect.signature(KERNELS[name]).parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_bytes_are_those_of_its_tensors(name, dtype, monkeypatch):
    asked, streams_of = [], Streams.of
    monkeypatch.setattr(Streams, "of", lambda *a, **k: asked.append((a, k)) or streams_of(*a, **k))
    case = KernelCase(name, tiny(name), str(dtype).removeprefix("torch."), rounds=1)
    (result,) = case.measure(CPU, raise_failure)
    read, written = (4 * n for n in MOVED[name])
    if dtype == torch.bfloat16:  # the remainder and the moments of the optimizer keep their size
        read, written = (70, 60) if name == "adamw" else (read // 2, written // 2)
    ((*moved, touched), more) = asked[0]
    assert moved == [read, written] and result.bytes == read + written
    updated = {"cross_entropy": read, "adamw": 60}.get(name, 0)
    assert more == {"updated_bytes": updated} and touched == read + written - updated
    assert result.bytes_fraction == pytest.approx(result.bytes / result.median_s / fixed_peaks.RATES["bytes"])
    assert name in tables([result])[0]


def test_kernels_change_only_their_written_tensors():
    """The tensors that a pass names as written change, those that it only reads do not."""
    for name in KERNELS:
        made = KERNELS[name](torch.float32, **tiny(name))
        before = {id(t): t.clone() for t in (*made.read, *made.written) if t is not None}
        made.bind()()
        for t in made.read:
            assert t is None or torch.equal(t, before[id(t)]) != any(t is w for w in made.written), name
        assert all(t is None or not torch.equal(t, before[id(t)]) for t in made.written), name


# ---- the error rule against float64


def test_error_rule_allows_twice_torchs_error():
    truth = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
    at = lambda error: [(truth[0] + error).float()]  # noqa: E731
    assert judge(at(2e-3), at(1e-3), truth, torch.float32)[0].passed
    assert not judge(at(2.1e-3), at(1e-3), truth, torch.float32)[0].passed
    assert not judge([torch.tensor([float("nan"), 2.0])], at(1e-3), truth, torch.float32)[0].passed
    inf = [torch.tensor([float("inf"), 2.0])]
    assert not judge(inf, inf, truth, torch.float32)[0].passed, "not right only because torch is wrong too"
    with pytest.raises(ValueError, match=r"expected \(2,\) torch.float32"):
        judge([truth[0]], at(0.0), truth, torch.float32)


def test_check_reports_a_wrong_kernel(monkeypatch):
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


def test_replayed_captures_every_input_set_once(monkeypatch):
    """With a fake CUDA graph: calls inside of it are captured, and a replay does not call them again."""
    called, replays, inside = [], [], []

    @contextlib.contextmanager
    def recording(graph):
        inside.append(graph)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append(1)))
    monkeypatch.setattr(torch.cuda, "graph", recording)
    sets = [((SimpleNamespace(device=torch.device("cuda"), name=i),), []) for i in range(3)]
    run = op_passes.replayed(lambda x: called.append((x.name, bool(inside))) or x.name, sets, {})
    assert called == [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)]
    assert run() == 2 and replays == [1] and len(called) == 6
