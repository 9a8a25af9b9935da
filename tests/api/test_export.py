"""peakgpt export: a run or a checkpoint folder as a .gguf file, which every command reads."""

import json
import re
import sys

import pytest
import torch
from tiny_tokenizers import BUILDERS

from peakgpt.cli import main
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

pytest.importorskip("gguf", reason="needs the package gguf")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    library = BUILDERS["byte_level"]()
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    side_files = {"tokenizer_config.json": json.dumps(config).encode()}
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=330))
    model.save_pretrained(tmp_path / "model", Tokenizer(library, "</s>", side_files))
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [None, "f32", "bf16", "q8_0", "q4_0"])
def test_an_exported_file_generates_what_the_folder_does(dtype, folder, tmp_path, capsys):
    out = tmp_path / "out" / "m.gguf"
    options = [] if dtype is None else ["--dtype", dtype]
    assert main(["export", "--format", "gguf", str(folder), str(out), *options]) == 0
    assert f"m.gguf: gpt2 of llama.cpp, {dtype or 'f16'}, 0." in capsys.readouterr().out
    texts = []
    for source in (folder, out):
        assert main(["generate", str(source), "-p", "the canary", "-n", "8", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out.partition("\n\n")[0])
    assert texts[0].startswith("the canary")
    if dtype in (None, "f32"):
        assert texts[0] == texts[1]
    text = tmp_path / "text"
    text.write_text("the canary sings a song")
    assert main(["score", str(out), "--text", str(text)]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_file_is_exported_again_with_another_dtype(folder, tmp_path, capsys):
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert main(["export", "--format", "gguf", str(folder), str(first), "--dtype", "q8_0"]) == 0
    assert main(["export", "--format", "gguf", str(first), str(second), "--dtype", "f32"]) == 0
    a, b = GPT.from_pretrained(first, dequantize=True).state_dict(), GPT.from_pretrained(second).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    assert Tokenizer.load(first).digest == Tokenizer.load(second).digest


def test_a_run_begins_with_the_weights_of_a_file(folder, tmp_path, capsys):
    out, text = tmp_path / "m.gguf", tmp_path / "text"
    text.write_text("the canary sings a song\n" * 60)
    assert main(["export", "--format", "gguf", str(folder), str(out), "--dtype", "q8_0"]) == 0
    flags = ["--steps", "1", "--batch", "2", "--tokens", "16", "--lr", "1e-9", "--out", str(tmp_path / "run")]
    assert main(["train", "--init", str(out), "--text", str(text), *flags]) == 0
    trained, source = GPT.from_pretrained(tmp_path / "run"), GPT.from_pretrained(out, dequantize=True)
    assert trained.config.to_dict() == source.config.to_dict()
    for name, tensor in source.state_dict().items():
        assert torch.allclose(trained.state_dict()[name], tensor, atol=1e-6), name
    assert Tokenizer.load(tmp_path / "run").digest == Tokenizer.load(out).digest


def test_a_folder_without_a_tokenizer_gives_a_file_without_one(folder, tmp_path, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert main(["export", "--format", "gguf", str(folder), str(tmp_path / "m.gguf")]) == 0
    assert "without a tokenizer, as MODEL has none" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"m\.gguf: got no tokenizer, expected one"):
        Tokenizer.load(tmp_path / "m.gguf")


@pytest.mark.parametrize("change, message", [
    (lambda args, folder: args.__setitem__(4, str(folder / "config.json")), r"json exists, expected a new file"),
    (lambda args, folder: args.__setitem__(3, str(folder / "none")), "got no such folder"),
    (lambda args, folder: args.extend(["--dtype", "q2_k"]), "invalid choice: 'q2_k'"),
])  # fmt: skip
def test_bad_input_is_one_sentence(change, message, folder, tmp_path, capsys):
    args = ["export", "--format", "gguf", str(folder), str(tmp_path / "m.gguf")]
    change(args, folder)
    assert main(args) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_without_the_package_the_extra_is_named(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", "--format", "gguf", str(folder), str(tmp_path / "m.gguf")]) == 2
    assert "expected the package gguf: pip install 'peakgpt[gguf]'" in capsys.readouterr().err
