"""`bench prefill`: every contender computes the same logits, and its work FLOPs are counted right."""

import dataclasses

import fixed_peaks
import pytest
import torch

from peakgpt.bench import prefill
from peakgpt.bench.agreement import expect_close
from peakgpt.bench.contenders import prompts
from peakgpt.bench.contenders.contender import REFERENCE
from peakgpt.bench.contenders.eager_gpt import EagerGPT
from peakgpt.bench.contenders.models import random_prompts, write_random_model
from peakgpt.bench.prefill import PrefillCase
from peakgpt.bench.report import tables
from peakgpt.engine.model.flops import forward_flops
from peakgpt.engine.model.presets import preset

SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 32, "n_inner": 128, "vocab_size": 64,
         "block_size": 64, "rope_scaling": None}  # fmt: skip
EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_inner": 128}


def tiny_config():
    return preset("gpt2-tiny", n_layer=1, vocab_size=64, n_embd=48)


def small_prompt(contender, weights, folder, config=None):
    config = config or tiny_config()
    write_random_model(folder, config)
    ids = random_prompts(config, 1, 16)
    build = prompts.PREFILL_CONTENDERS[contender].build
    return build(folder, config, ids, weights), prompts.ALL_PREFILLS[REFERENCE].build(folder, config, ids, "float32")()


def close(label, run, reference, weights):
    dtype = getattr(torch, weights)
    for _ in range(2):  # the second run must not see the cache of the first
        expect_close(label, [run()], [reference], dtype if dtype.is_floating_point else torch.bfloat16)
    assert reference.shape == (1, 64)


@pytest.mark.parametrize(
    ("contender", "weights"),
    [
        (name, form)
        for name in ("peakgpt", "eager", "transformers", "openvino", "ctranslate2", "llama.cpp")
        for form in prompts.PREFILL_CONTENDERS[name].formats
    ],
)
def test_every_contender_computes_the_last_logits(contender, weights, tmp_path):
    pytest.importorskip(prompts.PREFILL_CONTENDERS[contender].package)
    close(contender, *small_prompt(contender, weights, tmp_path), weights)


@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen3-0.6b", "gpt-oss-20b"])
@pytest.mark.parametrize("contender", ["peakgpt", "transformers", "llama.cpp"])
def test_prompts_of_other_families(contender, model, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip(prompts.PREFILL_CONTENDERS[contender].package)
    config = preset(model, **SMALL, **(EXPERTS if model == "gpt-oss-20b" else {}))
    weights = "float32" if "float32" in prompts.PREFILL_CONTENDERS[contender].formats else "bfloat16"
    close(contender, *small_prompt(contender, weights, tmp_path, config), weights)


def test_prompt_gpt_stores_keys_and_values():
    model, kept = prompts.PromptGPT(tiny_config()), {}
    ids = torch.randint(64, (1, 5))
    model(ids, lambda layer, k, v: kept.update({layer: (k, v)}))
    past = [[]]
    EagerGPT.forward(model, ids, past=past)
    assert list(kept) == [0] and all(torch.equal(a, b) for a, b in zip(kept[0], past[0], strict=True))


def test_missing_package_is_reported_and_others_are_timed(monkeypatch):
    fixed_peaks.use(monkeypatch)
    absent = dataclasses.replace(prompts.PREFILL_CONTENDERS["eager"], package="no_such_engine")
    for table in (prompts.PREFILL_CONTENDERS, prompts.ALL_PREFILLS):
        monkeypatch.setitem(table, "absent", absent)
    told = []
    case = PrefillCase("tiny", tiny_config(), 16, "float32", only=("peakgpt", "absent", "eager"), rounds=3)
    results = case.measure(torch.device("cpu"), lambda name, error: told.append(f"{name}: {error}"))
    assert [r.contender for r in results] == ["peakgpt", "eager"]
    assert told == ["absent: not measured, no_such_engine is not installed: pip install no_such_engine"]
    assert all(r.flops == prefill.work_flops(tiny_config(), 16) and r.memory_bytes > r.base_bytes for r in results)
    assert "rounds" in tables(results)[0] and "3 of 3" in tables(results)[0]


def test_wrong_prefill_logits_are_reported(monkeypatch):
    right = PrefillCase._reference
    monkeypatch.setattr(PrefillCase, "_reference", lambda *a: right(*a).roll(1, -1))
    told = []
    case = PrefillCase("tiny", tiny_config(), 16, "float32", only=("eager",), rounds=3)
    results = case.measure(torch.device("cpu"), lambda name, error: told.append(str(error)))
    assert results == [] and "prefill: eager: result 0 is off eager" in told[0]


def test_prefill_work_flops():
    assert prefill.work_flops(preset("gpt2"), 512) == pytest.approx(86.59e9, rel=1e-3)
    one = prefill.work_flops(preset("gpt2"), 1)
    assert one == pytest.approx(forward_flops(preset("gpt2"), 1))
    oss, tokens = preset("gpt-oss-20b", n_layer=2), 100  # the last layer: 4 of 32 gated experts
    last = 2 * oss.n_embd * (oss.vocab_size + oss.n_head * oss.head_dim + 3 * 4 * oss.expert_inner)
    whole = tokens * forward_flops(oss, tokens, causal=True)
    assert prefill.work_flops(oss, tokens) == pytest.approx(whole - 99 * last)


def test_prefill_on_cuda_raises(monkeypatch):
    with pytest.raises(ValueError, match="expected --device cpu"):
        prefill.cases(None, torch.device("cuda"))
