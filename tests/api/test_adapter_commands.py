"""Commands on an adapter's folder: its base model and tokenizer are found, and the adapter is merged."""

import json

import pytest
import torch
from tiny_tokenizers import BUILDERS

from peakgpt.cli import main
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.lora import LoraConfig


@pytest.fixture
def folders(tmp_path):
    """Return the folders of a model with a tokenizer, and of an adapter for it without one."""
    torch.manual_seed(0)
    library = BUILDERS["byte_level"]()
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer = Tokenizer(library, "</s>", {"tokenizer_config.json": json.dumps(config).encode()})
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=330))
    model.save_pretrained(tmp_path / "model", tokenizer)
    model = GPT.from_pretrained(tmp_path / "model")
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 1.0)
    model.save_adapter(tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter"


def generate(capsys, *arguments):
    assert main(["generate", *map(str, arguments), "-p", "the canary", "-n", "12", "--temperature", "0"]) == 0
    return capsys.readouterr().out.partition("\n\n")


def test_an_adapter_generates_as_its_exported_merged_model(folders, tmp_path, capsys):
    model, adapter = folders
    plain, (text, _, notes) = generate(capsys, model)[0], generate(capsys, adapter)
    assert text != plain
    assert "torch ops" not in notes, "merged, so the C++ program runs it"
    assert generate(capsys, model, "--adapter", adapter)[0] == text
    assert main(["export", "--format", "safetensors", "--dtype", "f32", str(adapter), str(tmp_path / "merged")]) == 0
    assert "merged: f32, 0.1 MiB, with its tokenizer" in capsys.readouterr().out
    assert generate(capsys, tmp_path / "merged")[0] == text
    source = GPT.from_pretrained(adapter).merge_and_unload().state_dict()
    merged = GPT.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in source.items())


def test_other_commands_take_an_adapter(folders, tmp_path, capsys):
    _, adapter = folders
    text = tmp_path / "text"
    text.write_text("the canary sings a song\n" * 60)
    assert main(["score", str(adapter), "--text", str(text)]) == 0
    assert "perplexity" in capsys.readouterr().out
    flags = ["--steps", "1", "--batch", "2", "--tokens", "16", "--lr", "1e-9", "--out", str(tmp_path / "run")]
    assert main(["train", "--init", str(adapter), "--text", str(text), *flags]) == 0
    merged = GPT.from_pretrained(adapter, merge_adapter=True).state_dict()
    trained = GPT.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.allclose(trained[name], tensor, atol=1e-6) for name, tensor in merged.items())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["quantize", "ADAPTER", "OUT", "--bits", "8"], "an adapter, expected a model: write the merged one with"),
        (["export", "--format", "safetensors", "ADAPTER", "MODEL"], "exists already, expected a new or an empty"),
        (["export", "--format", "safetensors", "--dtype", "q8_0", "ADAPTER", "OUT"], "--dtype is q8_0, expected f32"),
        (["generate", "MODEL", "--adapter", "MODEL", "-p", "x"], "adapter_config.json"),
        (["generate", "MODEL", "--adapter", "missing", "-p", "x"], "got no such folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(command, message, folders, tmp_path, capsys):
    places = {"MODEL": folders[0], "ADAPTER": folders[1], "OUT": tmp_path / "out"}
    assert main([str(places.get(word, word)) for word in command]) == 2
    assert message in capsys.readouterr().err
