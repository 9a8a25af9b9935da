"""The cases of the suite: every op has its cases by itself, names are unique and stable, flags choose among them."""

import argparse

import fixed_peaks
import pytest
import torch

from peakgpt.bench import cases
from peakgpt.bench.case import limit
from peakgpt.bench.cases import KINDS, README, module_of, readme_cases, select, suite_cases, tags
from peakgpt.bench.command import BENCHES
from peakgpt.bench.interleave import raise_failure
from peakgpt.bench.ops import OpCase
from peakgpt.bench.packing import PackingCase
from peakgpt.engine.model.presets import preset
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.kernels.core.dispatch import OPS
from peakgpt.kernels.ops import catalogue

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def suite():
    return suite_cases(CPU)


def test_an_op_of_the_catalogue_has_cases_without_an_edit_here(suite, monkeypatch):
    def named(op):
        return [case.name for case in suite_cases(CPU) if isinstance(case, OpCase) and case.op == op]

    for op in catalogue.__all__:
        passes = ("forward", "forward+backward") if OPS[op].gradient else ("forward",)
        assert named(op) == [f"ops/{op}/{p}/{dtype}" for dtype in ("float32", "bfloat16") for p in passes]
    monkeypatch.setattr(catalogue, "__all__", [*catalogue.__all__, "cube"])
    monkeypatch.setitem(OPS, "cube", OPS["layernorm"])
    assert len(named("cube")) == 4


def test_names_are_unique_begin_with_the_kind_and_are_the_same_each_time(suite):
    names = [case.name for case in suite]
    assert len(set(names)) == len(names) and all(case.name.startswith(f"{case.kind}/") for case in suite)
    assert names == [case.name for case in suite_cases(CPU)]
    assert "train/gpt2/4x256/bfloat16" in names and "ops/attention/forward+backward/float32" in names
    assert not [name for name in names if " " in name]


def test_large_models_are_cases_of_a_cpu_alone_without_the_contenders_that_do_not_fit(suite):
    by_name = {case.name: case for case in suite}
    large = [name for name in by_name if "llama-3.2-1b" in name or "qwen3" in name or "gpt-oss" in name]
    assert len(large) == 1 + 6 + 3 + 3 + 2 + 1  # load, decode of three models, prefill, train
    train = by_name["train/llama-3.2-1b,n_layer=4,vocab_size=32000/2x512/bfloat16"]
    assert train.contenders(CPU) == ["peakgpt", "eager, tuned malloc", "compile, tuned malloc"]
    assert by_name["decode/gpt-oss-20b,n_layer=4/1x16+32/bfloat16"].contenders(CPU) == ["peakgpt", "llama.cpp"]
    assert not [case.name for case in cases._cases_of("decode", torch.device("cuda")) if "gpt2" not in case.name]


def test_every_kind_but_fp8_is_in_the_suite_of_a_cpu(suite):
    assert {case.kind for case in suite} == KINDS.keys() - {"fp8"} and KINDS.keys() < BENCHES.keys()


def test_every_case_has_contenders_and_ours_is_one_of_them(suite):
    for case in suite:
        names = case.contenders(CPU)
        assert "peakgpt" in names and len(set(names)) == len(names), case.name
        alone = case.kind == "memory_bound" or (case.kind == "ops" and OPS[case.op].mutates)  # torch has no such op
        assert alone or len(names) > 1, case.name


def test_the_readme_cases_exist_in_order_and_take_15_minutes(suite):
    found = readme_cases(CPU)
    assert [case.name for case in found] == list(README)
    assert sum(case.seconds for case in found) <= 15 * 60
    by_name = {case.name: case for case in suite}
    for case in found:
        left_out = README[case.name][1]
        assert set(left_out) < set(by_name[case.name].contenders(CPU)), "a name that is no contender leaves nothing out"
        assert set(case.contenders(CPU)) == set(by_name[case.name].contenders(CPU)) - set(left_out)
        assert tags(case) == (case.kind, "readme")
    for dtype in ("bfloat16", "float32"):  # both allocators are in one run; compile needs the tuned one to be fast
        train = next(case for case in found if case.name == f"train/gpt2/4x256/{dtype}")
        assert {"eager", "eager, tuned malloc", "compile, tuned malloc"} < set(train.contenders(CPU))


def test_flags_that_all_kinds_have_change_every_case(suite):
    ops = select(suite, ["ops/layernorm/*", "ops/adamw/*"])
    assert all((c.rounds, c.seconds) == (2, 0.5) for c in limit(ops, CPU, rounds=2, seconds=0.5))
    chosen = limit(ops, CPU, ["compile", "peakgpt"])
    assert {c.op: c.contenders(CPU) for c in chosen} == {"layernorm": ["peakgpt", "compile"], "adamw": ["peakgpt"]}
    assert {c.op for c in limit(ops, CPU, ["torch fused"])} == {"adamw"}, "a case without such a contender is left out"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*cases.CPU_KINDS, "packing")])  # asks the GPU
def test_cases_of_a_gpu_have_contenders_without_their_own_environment(kind, monkeypatch):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module_of(kind).add_arguments(parser)
    for case in module_of(kind).cases(parser.parse_args([]), torch.device("cuda")):
        if kind != "ops":  # explaining a call needs the device
            assert not [name for name in case.contenders(torch.device("cuda")) if "malloc" in name]


def test_packed_documents_are_timed_by_one_trainer(monkeypatch):
    fixed_peaks.use(monkeypatch)
    config, recipe = preset("gpt2-tiny", n_layer=1, vocab_size=64, n_embd=48), TrainConfig(batch=1, tokens=16)
    case = PackingCase("tiny", config, recipe, (1, 4), rounds=3)
    results = case.measure(CPU, raise_failure)
    assert [r.contender for r in results] == case.contenders(CPU) == [
        "peakgpt", "peakgpt, 1 masked document a row", "peakgpt, 4 masked documents a row"
    ]  # fmt: skip
    assert "100.0 % of the pairs" in results[1].note and "29.4 % of the pairs" in results[2].note
    assert all(r.peak_flops_s == fixed_peaks.RATES[r.dtype] and r.flops_kind == "model" for r in results)
