"""`peakgpt finetune` as a whole: resume to the bit, best checkpoint, early stopping, answers of the result."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sft_data import PLAIN, checkpoint, conversations, write_lines

from peakgpt import run_reporter
from peakgpt.cli import main
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

# <|im_end|> ends a turn; the checkpoint's end of text does not.
CHATML = PLAIN.replace("eos_token", "'<|im_end|>'")
RUN = ["finetune", "--task", "sft", "--init", "model", "--data", "data.jsonl", "--device", "cpu", "--dtype", "float32",
       "--batch", "2", "--tokens", "160", "--lr", "3e-3"]  # fmt: skip


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.setattr(run_reporter.RunReporter, "finish", lambda self: None)  # the report takes seconds
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "model", dropout=0.1)
    write_lines(tmp_path / "data.jsonl", [{"messages": messages} for messages in conversations(20)])


def rows(run):
    found = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss"), row.get("validation_loss")) for row in found]


def weights(run, step):
    return Path(run, "checkpoints", f"step-{step:08d}", "model.safetensors").read_bytes()


@pytest.mark.parametrize("options", [(), ("--packing", "false", "--micro-batch", "1")], ids=["packed", "padded"])
def test_a_resumed_run_has_the_same_bits_without_data_and_checkpoint(options):
    flags = ["--steps", "6", "--save-every", "2", "--validate-every", "3", "--keep-last", "9", *options]
    assert main([*RUN, *flags, "--out", "whole"]) == 0
    shutil.copytree("whole", "killed", symlinks=True)
    for step in (4, 6):
        shutil.rmtree(f"killed/checkpoints/step-{step:08d}")
    Path("killed/checkpoints/best").unlink(missing_ok=True)
    shutil.rmtree("model")
    Path("data.jsonl").unlink()
    assert main(["finetune", "--resume", "killed"]) == 0
    assert rows("killed") == rows("whole") and weights("killed", 6) == weights("whole", 6)
    assert main(["verify", "killed"]) == 0


def test_a_run_killed_before_its_first_checkpoint_begins_again():
    assert main([*RUN, "--steps", "2", "--out", "whole"]) == 0
    shutil.copytree("whole", "killed", symlinks=True)
    shutil.rmtree("killed/checkpoints")
    assert main(["finetune", "--resume", "killed"]) == 0
    assert rows("killed") == rows("whole")


def test_a_run_killed_by_sigkill_goes_on_to_the_same_bits(tmp_path):
    flags = [*RUN, "--steps", "40", "--save-every", "5", "--keep-last", "99"]
    assert main([*flags, "--out", "whole"]) == 0
    code = f"import sys; from peakgpt.cli import main; sys.exit(main({[*flags, '--out', 'killed']!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while not Path("killed/checkpoints/step-00000005").is_dir():
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    assert main(["finetune", "--resume", "killed"]) == 0
    assert rows("killed") == rows("whole") and weights("killed", 40) == weights("whole", 40)


def test_the_file_of_a_run_begins_it_again(capsys):
    assert main([*RUN, "--epochs", "2", "--packing", "false", "--out", "one"]) == 0
    assert "lr 0.003 (default 2e-05)" in capsys.readouterr().out
    assert main(["finetune", "--config", "one/config.toml", "--out", "two"]) == 0
    assert rows("one") == rows("two") and rows("one")[-1][0] == 19, "2 epochs of 19 examples, 2 a step"
    assert main(["train", "--resume", "one"]) == 2
    assert "got a run of `peakgpt finetune`, expected one of `peakgpt train`" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2"]])
def test_the_file_of_a_run_is_not_for_another_checkpoint(tmp_path, flags, capsys):
    """The file has the fields of its checkpoint, which another one may not have."""
    assert main([*RUN, "--steps", "1", "--out", "one"]) == 0
    checkpoint(tmp_path / "other", layer_norm_epsilon=1e-3)
    argv = ["finetune", "--config", "one/config.toml", "--init", "other", "--out", "two", *flags]
    assert main(argv) == 2 and not Path("two").exists()
    assert "layer_norm_epsilon is 1e-05, expected 0.001, that of init" in capsys.readouterr().err


def test_the_best_validation_is_kept_and_stops_the_run(capsys):
    flags = ["--steps", "60", "--validate-every", "1", "--patience", "2", "--lr", "0.3", "--schedule", "constant"]
    assert main([*RUN, *flags, "--warmup-steps", "0", "--out", "run"]) == 0
    losses = {step: loss for step, _, loss in rows("run") if loss is not None}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 2 < 60 and "stopped early" in capsys.readouterr().out
    assert Path("run/checkpoints/best").resolve().name == f"step-{best:08d}"


def test_validation_data_of_its_own_and_further_sets():
    write_lines(Path("held.jsonl"), [{"messages": messages} for messages in conversations(3)])
    flags = ["--validation-data", "held.jsonl", "--validation-sets", "again=held.jsonl", "--steps", "1", "--out", "run"]
    prompts = ["--prompts", "What is 1 plus 1?", "--sample-tokens", "3", "--sample-temperature", "0"]
    assert main([*RUN, *flags, *prompts]) == 0
    row = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert row["validation_loss"] == pytest.approx(row["again/validation_loss"])
    assert row["validation_tokens"] == row["again/validation_tokens"] > 0
    messages = [{"role": "user", "content": "What is 1 plus 1?"}]
    model, tokenizer = GPT.from_pretrained("run"), Tokenizer.load("run")
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=3)[0, len(prompt) :]
    assert row["samples"] == [{"prompt": "What is 1 plus 1?", "text": tokenizer.decode(answer)}]


@pytest.mark.parametrize("template", [PLAIN, CHATML])
def test_the_model_learns_its_answers_and_to_stop(tmp_path, capsys, template):
    """The same answer to the same question, word for word, by the command that a user calls."""
    folder = checkpoint(tmp_path / "base", None)
    tokenizer = Tokenizer.load(folder)
    tokenizer.library.add_special_tokens(["<|im_end|>"])
    sizes = {**GPT.from_pretrained(folder).config.to_dict(), "vocab_size": tokenizer.vocab_size}
    GPT(GPTConfig(**sizes)).save_pretrained(folder, tokenizer)
    Path("chat.jinja").write_text(template)
    chat = [{"role": "user", "content": "What is 2 plus 2?"}, {"role": "assistant", "content": "It is 4, of course."}]
    write_lines(Path("one.jsonl"), [{"messages": chat}] * 4)
    flags = ["--init", str(folder), "--data", "one.jsonl", "--chat-template", "chat.jinja", "--steps", "60"]
    assert main([*RUN, *flags, "--lr", "1e-2", "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["generate", "run", "--chat", "-p", "What is 2 plus 2?", "--temperature", "0", "-n", "50"]) == 0
    assert capsys.readouterr().out.startswith("It is 4, of course.\n\n[")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["finetune", "--init", "model", "--data", "data.jsonl"], "--task: got none, expected one of "),
        (["finetune", "--task", "sft", "--data", "data.jsonl"], "--init: got none, expected the checkpoint to adapt"),
        (["finetune", "--task", "sft", "--init", "model"], "--data: got none, expected files of JSON lines"),
        ([*RUN, "--data", "missing.jsonl"], "missing.jsonl"),
        ([*RUN, "--tokens", "600"], "tokens is 600, expected at most block_size 512"),
        ([*RUN, "--epochs", "1", "--steps", "2"], "got steps and epochs, expected one of"),
        ([*RUN, "--validation-share", "0.1", "--validation-data", "data.jsonl"], "validation_share: got it with"),
        ([*RUN, "--mask-prompt", "true"], "unrecognized arguments: --mask-prompt, expected --train-on (litgpt:"),
        ([*RUN, "--model-name-or-path", "x"], "expected --init (TRL: model_name_or_path)"),
        ([*RUN, "--learning-rate", "1"], "expected --lr ("),
        (["generate", "model", "-p", "x", "--system", "y"], "--system: got it without --chat, expected both"),
    ],
)
def test_a_wrong_call_is_one_sentence(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_one_example_is_too_few(capsys):
    write_lines(Path("data.jsonl"), [{"messages": conversations(1)[0]}])
    assert main(RUN) == 2
    assert "got 1 examples, expected at least 2" in capsys.readouterr().err


def test_micro_batches_weigh_every_answer_token_alike():
    for name, flags in {"whole": [], "parts": ["--micro-batch", "1"]}.items():
        options = ["--packing", "false", "--batch", "4", "--steps", "1", "--dropout", "0", *flags]
        assert main([*RUN, *options, "--out", name]) == 0
    one, two = (GPT.from_pretrained(name).state_dict() for name in ("whole", "parts"))
    assert rows("whole")[0][1] == pytest.approx(rows("parts")[0][1], rel=1e-6)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)
