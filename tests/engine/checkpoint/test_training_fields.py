"""Fields that only training reads do not change the layout of a checkpoint, and come back with it."""

import json

import pytest
import torch

from peakgpt.engine.checkpoint.families.catalogue import FAMILIES, family_of
from peakgpt.engine.checkpoint.families.family import SECTION
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.presets import PRESETS

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 37}


def test_a_gpt2_with_a_z_loss_is_saved_as_gpt2_and_read_with_it(tmp_path):
    """Mutation that makes it fail: config_json without the section."""
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(**TINY, label_smoothing=0.1, z_loss=1e-4, attention_dropout=0.2)
    model = GPT(config).eval()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == "gpt2" and content[SECTION] == {"label_smoothing": 0.1, "z_loss": 1e-4}
    assert GPT.from_pretrained(tmp_path).config == config
    assert GPT.from_pretrained(tmp_path, dropout=0.0).config == GPTConfig(**TINY, label_smoothing=0.1, z_loss=1e-4)
    ids = torch.arange(8)[None]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_loaded_model_without_its_z_loss_is_saved_without_the_section(tmp_path):
    GPT(GPTConfig(**TINY, z_loss=1e-4)).save_pretrained(tmp_path / "a")
    source = GPT.from_pretrained(tmp_path / "a")
    plain = GPT(GPTConfig(**TINY))
    plain.source_files = source.source_files
    plain.save_pretrained(tmp_path / "b")
    assert SECTION not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert GPT.from_pretrained(tmp_path / "b").config == plain.config


@pytest.mark.parametrize("name", PRESETS)
def test_training_fields_change_the_family_of_no_preset(name):
    plain = {**PRESETS[name], "z_loss": 0.0, "label_smoothing": 0.0}
    config = GPTConfig(**{**plain, "z_loss": 1e-4, "label_smoothing": 0.1})
    family = family_of(config)
    assert family is family_of(GPTConfig(**plain))
    assert family.config(json.loads(json.dumps(family.config_json(config)))) == config


@pytest.mark.parametrize("section", [[1], {"n_layer": 3}, "text"])
def test_a_damaged_section_is_one_sentence(section):
    content = FAMILIES["gpt2"].config_json(GPTConfig(**TINY)) | {SECTION: section}
    with pytest.raises(ValueError, match=rf"{SECTION} is .*, expected an object with dropout, "):
        FAMILIES["gpt2"].config(content)
