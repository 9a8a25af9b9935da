"""`bench load`: each program loads the folder in a process of its own and says when it had the token."""

import pytest
import torch

from peakgpt.bench import load
from peakgpt.bench.contenders.models import write_random_model
from peakgpt.bench.interleave import raise_failure
from peakgpt.bench.load import LoadCase
from peakgpt.engine.checkpoint.families.catalogue import family_of
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.presets import preset

CPU = torch.device("cpu")


def tiny():
    config = preset("llama-3.2-1b", n_layer=1, n_embd=64, n_head=4, n_kv_head=2, n_inner=64, vocab_size=64)
    return LoadCase("tiny", config, 8, rounds=1)


@pytest.mark.slow
def test_a_result_of_each_contender_for_the_process_and_for_the_load():
    pytest.importorskip("transformers")
    results = tiny().measure(CPU, raise_failure)
    parts = [(r.contender, r.case.get("time")) for r in results]
    assert parts == [(name, part) for name in load.PROGRAMS for part in (None, "from from_pretrained")]
    for whole, loading in zip(results[::2], results[1::2], strict=True):
        assert loading.median_s < whole.median_s and whole.memory_bytes > 64 << 20
    assert len({r.note.partition(";")[0] for r in results[::2]}) == 1, "the same first token"


def test_a_program_that_fails_is_reported(monkeypatch):
    monkeypatch.setitem(load.PROGRAMS, "peakgpt", ("", "raise SystemExit(3)"))
    failures = []
    case = LoadCase("tiny", tiny().config, 8, rounds=1, only=("peakgpt",))
    assert case.measure(CPU, lambda name, error: failures.append(f"{name}: {error}")) == []
    assert failures == ["peakgpt: load: peakgpt ended with exit code 3; its message is above"]


def test_the_folder_has_every_weight_in_bfloat16_and_no_digests(tmp_path):
    config = tiny().config
    write_random_model(tmp_path, config)
    assert b"sha256" not in (tmp_path / "model.safetensors").read_bytes()
    model = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.config == config and family_of(config).model_type == "llama"
    assert (model.transformer.ln_f.weight == 1).all() and model.transformer.wte.weight.std() > 0
