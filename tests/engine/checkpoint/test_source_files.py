"""A loaded model that is saved again keeps every field and file that saving does not change."""

import json

import pytest
import torch
from small_configs import SMALL

from peakgpt.engine.checkpoint.families.catalogue import FAMILIES
from peakgpt.engine.gpt import GPT

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CONFIG_MAPPING = transformers.models.auto.configuration_auto.CONFIG_MAPPING


class Tokens:
    """A tokenizer without files."""

    def __init__(self, end_id):
        self.begin_id, self.end_id = None, end_id

    def save(self, folder):
        pass


@pytest.fixture
def source(request, tmp_path):
    """A folder with token ids, fields of other libraries, and a generation_config.json."""
    model_type = getattr(request, "param", "gpt2")
    ids = {"bos_token_id": 5, "eos_token_id": [7, 9], "pad_token_id": 0}
    fields = {**SMALL[model_type], **ids, "vocab_size": 64, "task": "chat", "n_ctx": 32}
    config = CONFIG_MAPPING[model_type](**fields)
    model = getattr(transformers, FAMILIES[model_type].architecture)(config)
    model.generation_config = transformers.GenerationConfig(**ids, temperature=0.6, do_sample=True, top_k=11)
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def contents(folder):
    return {name: json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")}


@pytest.mark.parametrize("source", SMALL, indirect=True)
@pytest.mark.parametrize("tokenizer", [None, Tokens(9)], ids=["no tokenizer", "its tokenizer"])
def test_every_field_is_kept(source, tokenizer, tmp_path):
    GPT.from_pretrained(source).save_pretrained(tmp_path / "again", tokenizer)
    before, after = contents(source), contents(tmp_path / "again")
    assert after["generation_config.json"] == before["generation_config.json"]
    changed = {name for name, value in before["config.json"].items() if after["config.json"].get(name) != value}
    assert changed <= {"architectures", "dtype"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.generation_config.eos_token_id == [7, 9] and loaded.config.eos_token_id == [7, 9]


def test_another_tokenizer_replaces_the_end_everywhere(source, tmp_path):
    GPT.from_pretrained(source).save_pretrained(tmp_path / "again", Tokens(3))
    for content in contents(tmp_path / "again").values():
        assert (content["bos_token_id"], content["eos_token_id"], content["pad_token_id"]) == (3, 3, 0)
    assert contents(tmp_path / "again")["generation_config.json"]["temperature"] == 0.6


def test_a_changed_model_is_not_contradicted_by_old_fields(source, tmp_path):
    """A field of an older release must not bring the old value back."""
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, "torch_dtype": "float64", "attn_pdrop": 0.3}))
    model = GPT.from_pretrained(source, dtype=torch.bfloat16, dropout=0.25)
    model.save_pretrained(tmp_path / "again")
    written = contents(tmp_path / "again")["config.json"]
    assert written["attn_pdrop"] == 0.25 and written["torch_dtype"] == "bfloat16" and "dtype" not in written
    assert GPT.from_pretrained(tmp_path / "again").config == model.config


@pytest.mark.parametrize("source", SMALL, indirect=True)
def test_a_missing_token_id_stays_missing(source, tmp_path):
    """Regression: null was written, which in transformers is not the same as the family's default."""
    content = json.loads((source / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del content[name]
    (source / "config.json").write_text(json.dumps(content))
    GPT.from_pretrained(source).save_pretrained(tmp_path / "again")
    before, after = (transformers.AutoConfig.from_pretrained(folder) for folder in (source, tmp_path / "again"))
    assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)


def test_a_new_model_writes_no_generation_config(tmp_path):
    GPT.from_preset("gpt2", n_layer=1, n_head=2, n_embd=8, vocab_size=16).save_pretrained(tmp_path, Tokens(3))
    assert not (tmp_path / "generation_config.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 3
