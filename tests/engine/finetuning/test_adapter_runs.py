"""`peakgpt finetune` with LoRA: the run saves the adapter alone, continues to the bit, and is read as an adapter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sft_data import PLAIN, checkpoint, conversations, write_lines

from peakgpt.cli import main
from peakgpt.engine.checkpoint.adapters.attach import SavedAdapter
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

FLAGS = ["--lora-rank", "3", "--lora-targets", "all-linear", "--lora-dropout", "0.1", "--steps", "4", "--batch", "2",
         "--tokens", "256", "--save-every", "2", "--validate-every", "4", "--lr", "0.01"]  # fmt: skip
IDS = torch.arange(40)[None]


@pytest.fixture
def files(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"messages": messages} for messages in conversations()])
    return checkpoint(tmp_path / "base"), data


def finetune(init, data, out, *more):
    return main(["finetune", "--task", "sft", "--init", str(init), "--data", data, "--out", str(out), *FLAGS, *more])


def adapter_of(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "adapter_model.safetensors")


def losses_of(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_saves_its_adapter_and_continues_to_the_bit(dtype, files, tmp_path, capsys):
    init, data = files
    run = tmp_path / "run"
    assert finetune(init, data, run, "--dtype", dtype) == 0, capsys.readouterr().err
    assert "are trained" in capsys.readouterr().out
    step = run / "checkpoints" / "step-00000004"
    assert not (step / "model.safetensors").exists()
    content = json.loads((step / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], content["r"], content["lora_alpha"]) == (init, 3, 16.0)
    assert not same(adapter_of(run, 2), adapter_of(run, 4))

    again = tmp_path / "again"
    shutil.copytree(run, again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / step.name)
    assert main(["finetune", "--resume", str(again)]) == 0, capsys.readouterr().err
    assert same(adapter_of(again, 4), adapter_of(run, 4))
    assert losses_of(again) == losses_of(run)

    model = GPT.from_pretrained(run)
    assert same(SavedAdapter(model, None).tensors(model.state_dict()), adapter_of(run, 4))
    assert main(["generate", str(run), "-p", "What is", "-n", "3", "--temperature", "0"]) == 0
    assert main(["verify", str(run)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("bits", ["4", "8"])
def test_an_adapter_trains_over_quantized_weights(bits, files, tmp_path, capsys):
    init, data = files
    quantized, run = tmp_path / "quantized", tmp_path / "run"
    assert main(["quantize", init, str(quantized), "--bits", bits]) == 0
    assert finetune(quantized, data, run, "--recompute", "block") == 0, capsys.readouterr().err
    rates = losses_of(run)
    assert rates[-1] < rates[0]
    model = GPT.from_pretrained(run, merge_adapter=True)
    assert model.active_adapter == "default", "an adapter of quantized weights stays beside them"
    before = model(IDS)
    model.set_adapter(None)
    assert not torch.allclose(model(IDS), before, atol=1e-4)
    capsys.readouterr()
    assert main(["generate", str(run), "-p", "What is", "-n", "3", "--temperature", "0"]) == 0
    assert "supports no adapters that are not merged, got default" in capsys.readouterr().out
    assert main(["export", "--format", "safetensors", str(run), str(tmp_path / "out")]) == 2
    assert "got quantized weights of peakgpt, expected others with dequantize=True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora-targets", "typo"], "target_modules: got 'typo', expected the end of a name of a linear layer"),
        (["--optimizer", "muon"], "lora_rank: got it with optimizer muon, expected it only with optimizer adamw"),
        (["--lora-rank", "0"], "is 0, expected at least 1"),
    ],
)
def test_bad_settings_are_refused(more, message, files, tmp_path, capsys):
    assert finetune(*files, tmp_path / "run", *more) == 2
    assert message in capsys.readouterr().err


def test_settings_without_a_rank_and_adapters_as_init_are_refused(files, tmp_path, capsys):
    init, data = files
    command = ["finetune", "--task", "sft", "--init", init, "--data", data, "--lora-alpha", "3"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "lora_alpha: got it with lora_rank none, expected it only with lora_rank set" in capsys.readouterr().err
    assert finetune(init, data, tmp_path / "run") == 0
    capsys.readouterr()
    assert finetune(tmp_path / "run", data, tmp_path / "other") == 2
    assert "an adapter, expected a model with lora_rank" in capsys.readouterr().err


def test_an_adapter_stops_at_the_token_that_it_has_learned(tmp_path):
    """<|im_end|> ends a turn; the end of text of the base model does not."""
    folder = checkpoint(tmp_path / "base", None)
    tokenizer = Tokenizer.load(folder)
    tokenizer.library.add_special_tokens(["<|im_end|>"])
    sizes = {**GPT.from_pretrained(folder).config.to_dict(), "vocab_size": tokenizer.vocab_size}
    chat = tokenizer.with_chat_template(PLAIN.replace("eos_token", "'<|im_end|>'"))
    GPT(GPTConfig(**sizes)).save_pretrained(folder, chat)
    data = write_lines(tmp_path / "data.jsonl", [{"messages": messages} for messages in conversations()])
    run, end = tmp_path / "run", tokenizer.library.token_to_id("<|im_end|>")
    assert finetune(folder, data, run, "--steps", "1") == 0
    assert end not in GPT.from_pretrained(folder).generation_config.eos_token_id
    for merge in (False, True):
        assert end in GPT.from_pretrained(run, merge_adapter=merge).generation_config.eos_token_id
