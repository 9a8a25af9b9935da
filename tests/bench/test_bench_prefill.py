"""`bench prefill`: every contender computes the same logits, and its work FLOPs are counted right."""

import dataclasses

import fixed_peaks
import pytest
import torch

from peakgpt.bench import prefill
from peakgpt.bench.agreement import expect_close
from peakgpt.bench.contenders.eager_gpt import EagerGPT
from peakgpt.bench.prefill import PrefillCase
from peakgpt.bench.report import tables
from peakgpt.engine.model.flops import forward_flops
from peakgpt.engine.model.presets import preset


def tiny_config():
    return preset("gpt2-tiny", n_layer=1, vocab_size=64, n_embd=48)


def small_prompt(contender, dtype=torch.float32):
    config = tiny_config()
    state, ids = prefill.prefill_inputs(config, 16)
    return prefill.PREFILL_CONTENDERS[contender].build(state, config, ids, dtype), prefill.reference_logits(config, 16)


@pytest.mark.parametrize(
    ("contender", "dtype"),
    [
        (name, getattr(torch, form))
        for name in ("peakgpt", "eager", "transformers", "openvino", "ctranslate2")
        for form in prefill.PREFILL_CONTENDERS[name].formats
    ],
)
def test_every_contender_computes_the_last_logits(contender, dtype):
    pytest.importorskip(prefill.PREFILL_CONTENDERS[contender].package)
    run, reference = small_prompt(contender, dtype)
    for _ in range(2):  # the second run must not see the cache of the first
        expect_close(contender, [run()], [reference], dtype if dtype.is_floating_point else torch.bfloat16)
    assert reference.shape == (1, 64)


def test_prompt_gpt_stores_keys_and_values():
    model, kept = prefill.PromptGPT(tiny_config()), {}
    ids = torch.randint(64, (1, 5))
    model(ids, lambda layer, k, v: kept.update({layer: (k, v)}))
    past = [[]]
    EagerGPT.forward(model, ids, past=past)
    assert list(kept) == [0] and all(torch.equal(a, b) for a, b in zip(kept[0], past[0], strict=True))


def test_missing_package_is_reported_and_others_are_timed(monkeypatch):
    fixed_peaks.use(monkeypatch)
    absent = dataclasses.replace(prefill.PREFILL_CONTENDERS["eager"], package="no_such_engine")
    monkeypatch.setitem(prefill.PREFILL_CONTENDERS, "absent", absent)
    told = []
    case = PrefillCase("tiny", tiny_config(), 16, "float32", only=("peakgpt", "absent", "eager"), rounds=3)
    results = case.measure(torch.device("cpu"), lambda name, error: told.append(f"{name}: {error}"))
    assert [r.contender for r in results] == ["peakgpt", "eager"]
    assert told == ["absent: not measured, no_such_engine is not installed: pip install no_such_engine"]
    assert all(r.flops == prefill.work_flops(tiny_config(), 16) and r.memory_bytes > r.base_bytes for r in results)
    assert "rounds" in tables(results)[0] and "3 of 3" in tables(results)[0]


def test_wrong_prefill_logits_are_reported(monkeypatch):
    right = prefill.reference_logits
    monkeypatch.setattr(prefill, "reference_logits", lambda *a: right(*a).roll(1, -1))
    told = []
    case = PrefillCase("tiny", tiny_config(), 16, "float32", only=("eager",), rounds=3)
    results = case.measure(torch.device("cpu"), lambda name, error: told.append(str(error)))
    assert results == [] and "prefill: eager: result 0 is off eager" in told[0]


def test_prefill_work_flops():
    assert prefill.work_flops(preset("gpt2"), 512) == pytest.approx(86.59e9, rel=1e-3)
    one = prefill.work_flops(preset("gpt2"), 1)
    assert one == pytest.approx(forward_flops(preset("gpt2"), 1))


def test_prefill_on_cuda_raises(monkeypatch):
    with pytest.raises(ValueError, match="expected --device cpu"):
        prefill.cases(None, torch.device("cuda"))
