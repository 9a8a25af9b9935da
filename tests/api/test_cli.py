"""The command line: help, one sentence and exit code 2 for bad input, and a whole quickstart."""

import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fixed_peaks
import pytest
import torch
from rich.console import Console

from peakgpt import progress, quickstart_session
from peakgpt.bench.contenders.eager_gpt import EagerTrainer
from peakgpt.bench.run_results import RunResults
from peakgpt.cli import COMMANDS, main
from peakgpt.commands import quickstart
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.time_limit import TimeLimit
from peakgpt.engine.training.train_config import best_dtype
from peakgpt.engine.training.trainer import Trainer
from peakgpt.quickstart_session import Plan, Session


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and COMMANDS[command] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["fly"], "unknown command: got 'fly', expected one of quickstart"),
        (["doctor", "--loud"], "unrecognized arguments: --loud"),
        (["doctor", "--device", "cuda"], "got 'cuda', and torch sees no CUDA device"),
        (["quickstart", "--minutes", "0"], "--minutes is 0.0, expected at least 0.5"),
        (["quickstart", "--text", "EMPTY"], "EMPTY"),
        (["quickstart", "--text", "BINARY"], "BINARY"),
        (["quickstart", "--text", "MISSING"], "MISSING"),
        (["quickstart", "--text", "GOOD", "--out", "FULL"], "expected a new or empty one"),
        (["quickstart", "--text", "GOOD", "--out", "EMPTY/run"], "EMPTY"),
        (["generate", "MISSING", "--prompt", "x"], "MISSING"),
        (["generate", "FULL", "--prompt", "x"], "config.json"),
        (["generate", "FULL"], "--prompt"),
        (["generate", "FULL", "--prompt", "x", "--temperature", "0", "--top-k", "5"], "--top-k: got it with --temp"),
        (["score", "FULL", "--text", "GOOD", "--context", "x"], "--context: got it without --continuation"),
        (["score", "FULL", "--continuation", "x", "--window", "8"], "--window: got it without --text"),
        (["generate", "FULL", "--file", "MISSING"], "prompt file MISSING"),
        (["evaluate", "FULL", "--task", "MISSING.jsonl"], "MISSING.jsonl: got No such file"),
        (["train", "--resume", "FULL"], "metrics.jsonl"),
        (["train", "--resume", "MISSING"], "run folder MISSING: got no such folder"),
        (["bench", "memory_bound", "--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["train", "--preset", "gpt5"], "--preset is 'gpt5', expected one of"),
        (["train", "--steps", "0"], "--steps is 0"),
        (["train", "--text", "GOOD", "--tokens", "900", "--vocab", "300"], "tokens is 900, expected at most block"),
        (["train", "--text", "GOOD", "--out", "new/run", "--vocab", "20"], "vocab_size: got 20, expected at least 257"),
        (["train", "--text", "GOOD", "--device", "cuda"], "torch sees no CUDA device"),
        (["generate", "FULL", "--prompt", "x", "--device", "fpga"], "expected a cpu or cuda device, got 'fpga'"),
        (["bench", "ops", "--device", "fpga"], "expected a cpu or cuda device, got 'fpga'"),
        (["quickstart", "--text", "SHORT"], "training data: got"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(argv, text, tmp_path, capsys, monkeypatch):
    if torch.cuda.is_available() and "cuda" in argv:
        pytest.skip("this machine has a CUDA device")
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "BINARY").write_bytes(b"\x00\x01\xff")
    (tmp_path / "SHORT").write_text("a line\n" * 9)
    (tmp_path / "GOOD").write_text("some text to train on\n" * 50)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("peakgpt: error: ") and message.count("\n") == 1 and text in message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before, "the command left files behind"


EXAMPLE = Path(__file__).parents[2] / "examples" / "occupation_bias.py"


@pytest.mark.parametrize(
    ("run", "name", "missing", "argument", "text"),
    [
        (runpy.run_path, str(EXAMPLE), "peakgpt", "--help", "usage: "),
        (runpy.run_path, str(EXAMPLE), "peakgpt", "FOLDER", "error: "),
        (runpy.run_path, str(EXAMPLE), None, "FOLDER", "FOLDER: got no such folder, and HF_HUB_OFFLINE is set"),
    ],
)
def test_missing_packages_give_one_sentence(run, name, missing, argument, text, monkeypatch, capsys):
    """Regression: these programs printed tracebacks."""
    monkeypatch.setattr(sys, "argv", ["program", argument])
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as stop:
        run(name, run_name="__main__")
    output = capsys.readouterr()
    assert text in f"{output.out}{output.err}{stop.value.code}"


@pytest.fixture
def library(tmp_path):
    """A folder with a few files of Python's library."""
    folder, source = tmp_path / "text", Path(json.__file__).parent
    folder.mkdir()
    for file in (*source.glob("*.py"), source.parent / "argparse.py"):
        (folder / file.name).write_text(file.read_text())
    return folder


@pytest.mark.parametrize("left_s", [0.0, 5.0])
def test_quickstart_compares_decoding_only_if_there_is_time(left_s, monkeypatch, capsys):
    """Mutation that makes it fail: three rounds after the end of the budget."""
    compared = []
    monkeypatch.setattr(quickstart_session, "compare_decoding", lambda *args, **kw: compared.append(kw) or [])
    monkeypatch.setattr("peakgpt.commands.generate.stream_text", lambda *args, **kw: "text")
    session = SimpleNamespace(model=SimpleNamespace(eval=lambda: None), tokenizer=SimpleNamespace(encode=lambda t: [1]),
                              device="cpu", config=SimpleNamespace(seed=1))  # fmt: skip
    budget = SimpleNamespace(left_s=lambda phase: left_s, clock=iter([0.0, 1.0]).__next__)
    assert Session.sample(session, Console(), RunResults(), budget) == "text"
    assert [options["budget_s"] for options in compared] == ([left_s] if left_s else [])
    assert ("no time left to compare decoding" in capsys.readouterr().out) == (not left_s)


def assert_quickstart_is_complete(run, printed):
    """Check metrics, report, checkpoint and output of a finished `peakgpt quickstart`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {c: [r["loss"] for r in rows if r["contender"] == c and "loss" in r] for c in ("peakgpt", "eager")}
    steps = min(map(len, losses.values()))
    assert steps >= 3 and losses["peakgpt"][-1] < losses["peakgpt"][0] - 0.3, "the model learns, on a busy machine too"
    ours, eager = losses["peakgpt"][:steps], losses["eager"][:steps]
    # Later losses differ: at this learning rate, bf16 rounding errors grow. test_golden.py compares complete runs.
    assert all(abs(a - b) < 5e-3 for a, b in zip(ours[:5], eager[:5], strict=True)), "same weights, same batches"
    page = (run / "report.html").read_text()
    assert page.count("<svg") >= 1 and "bits per byte" in page and "src=" not in page
    assert "against eager" in printed and "validation texts" in printed
    model, tokenizer = GPT.from_pretrained(run / "checkpoint"), Tokenizer.load(run / "checkpoint")
    assert model.config.vocab_size == tokenizer.vocab_size


def test_quickstart_trains_and_writes_a_checkpoint_and_a_report(library, tmp_path, capsys, monkeypatch):
    """A complete run with small batches: tokenizer, training in turns with eager, checkpoint, sample, report.

    It has 60 steps, whatever the speed of the machine. test_time_and_progress.py tests how time becomes steps.
    """

    def plan(limit, trainer):
        trainer.steps = 60

    monkeypatch.setattr(Session, "plan", lambda session, budget: Plan(60, 5, 2))
    monkeypatch.setattr(TimeLimit, "plan", plan)
    monkeypatch.setattr(TimeLimit, "fitting_steps", lambda limit: 60)
    fixed_peaks.use(monkeypatch)
    monkeypatch.setattr(quickstart_session, "DECODINGS", 1e9)  # of the fewest tokens
    monkeypatch.setattr(quickstart_session, "OP_S", 0.01)
    monkeypatch.setattr(quickstart, "CONFIG", replace(quickstart.CONFIG, batch=2, tokens=32))
    monkeypatch.setattr(quickstart, "VOCAB", 400)
    run = tmp_path / "run"
    assert main(["quickstart", "--text", str(library), "--out", str(run)]) == 0
    assert_quickstart_is_complete(run, capsys.readouterr().out)
    assert main(["generate", str(run / "checkpoint"), "--prompt", "def ", "--max-tokens", "5"]) == 0
    assert "5 tokens" in capsys.readouterr().out


def test_quickstart_refuses_a_budget_that_the_machine_exceeds(library, tmp_path, capsys, monkeypatch):
    """Regression: half a minute became three on a busy machine. Nothing is left behind."""
    monkeypatch.setattr(Session, "plan", lambda session, budget: Plan(1, 4, 1, least_s=100.0))
    monkeypatch.setattr(quickstart, "VOCAB", 400)
    command = ["quickstart", "--text", str(library), "--minutes", "0.5", "--out", str(tmp_path / "run")]
    fixed_peaks.use(monkeypatch)
    assert main(command) == 2
    assert re.search(r"--minutes is 0\.5, expected at least 2\.\d at the present speed", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_quickstart_of_half_a_minute_as_a_process(library, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "peakgpt", "quickstart", "--minutes", "0.5", "--text", library, "--out", run]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert_quickstart_is_complete(run, completed.stdout)
    command = [sys.executable, "-m", "peakgpt", "generate", run / "checkpoint", "--prompt", "def ", "--max-tokens", "5"]
    assert "5 tokens" in subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout


@pytest.mark.parametrize(
    ("number", "trainer", "code"),
    [(signal.SIGINT, None, 130), (signal.SIGTERM, Trainer, 143), (signal.SIGHUP, EagerTrainer, 129), (0, Trainer, 141)],
    ids=["ctrl-c while it plans", "kill", "closed terminal, in a step of eager", "closed pipe"],
)
def test_quickstart_that_is_stopped_leaves_a_checkpoint(number, trainer, code, tmp_path, capsys, monkeypatch, request):
    """Regression: only Ctrl-C saved the model; a kill or `| head` lost it."""
    if number and signal.getsignal(number) is signal.SIG_IGN:  # the tests run under nohup
        signal.signal(number, signal.SIG_DFL)
        request.addfinalizer(lambda: signal.signal(number, signal.SIG_IGN))

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    def stop():
        if number:
            os.kill(os.getpid(), number)
        else:
            monkeypatch.setattr(sys, "stdout", Closed())

    def plan(session, budget):
        if trainer:
            step = trainer.step
            monkeypatch.setattr(trainer, "step", lambda *args: (stop(), step(*args))[1])
        else:
            stop()
        return Plan(40, 4, 10)

    monkeypatch.setattr(Session, "plan", plan)
    monkeypatch.setattr(quickstart, "CONFIG", replace(quickstart.CONFIG, batch=2, tokens=32))
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    run = tmp_path / "run"
    assert main(["quickstart", "--text", str(Path(json.__file__).parent), "--out", str(run)]) == code
    assert GPT.from_pretrained(run / "checkpoint") and Tokenizer.load(run / "checkpoint")
    assert number == 0 or f"checkpoint in {run / 'checkpoint'}" in capsys.readouterr().out.replace("\n", "")


def test_a_run_folder_whose_name_is_not_utf8_is_refused_before_the_text_is_read(tmp_path, capsys):
    """Regression: the refusal named a lone surrogate in the text, after the tokenizer was trained."""
    run = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/run")
    for command in ("train", "quickstart"):
        assert main([command, "--text", str(Path(json.__file__).parent), "--out", run]) == 2
        assert "expected UTF-8" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_command_runs_with_a_closed_standard_stream(closed, tmp_path, monkeypatch):
    """Regression: `peakgpt train >&-` ended in a traceback."""
    monkeypatch.setattr(sys, closed, None)
    (tmp_path / "text").write_text("the cat sat on the mat and saw a hat\n" * 90)
    sizes = ["--steps", "1", "--batch", "1", "--tokens", "8", "--vocab", "280"]
    assert main(["train", "--text", str(tmp_path / "text"), "--out", str(tmp_path / "run"), *sizes]) == 0
    assert main(["train", "--steps", "0"]) == 2


def test_resumed_run_has_same_losses_as_an_uninterrupted_run(library, tmp_path, capsys, monkeypatch):
    sizes = ["--steps", "6", "--batch", "2", "--tokens", "32", "--vocab", "300"]
    losses, step = {}, Trainer.step
    for name in ("uninterrupted", "resumed"):
        run = tmp_path / name
        argv = ["train", "--text", str(library), "--out", str(run), *sizes]
        if name == "resumed":
            monkeypatch.setattr(Trainer, "step", lambda t, *pair: ctrl_c_if(t.steps_done == 2) or step(t, *pair))
            assert main(argv) == 130
            assert "--resume" in capsys.readouterr().out
            monkeypatch.setattr(Trainer, "step", step)
            argv = ["train", "--resume", str(run)]
        assert main(argv) == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [r["loss"] for r in rows if "loss" in r]
    assert len(losses["uninterrupted"]) == 6 and losses["uninterrupted"] == losses["resumed"]


def ctrl_c_if(condition):
    if condition:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("bits", [8, 4])
def test_generate_from_quantized_checkpoint_equals_engine(bits, tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sat on the mat, the cat sat on the hat "] * 20, 280)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=tokenizer.vocab_size))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    source, small = tmp_path / "float", tmp_path / "small"
    model.save_pretrained(source, tokenizer)
    group = ["--group", "32"] if bits == 4 else []
    assert main(["quantize", str(source), str(small), "--bits", str(bits), *group]) == 0
    capsys.readouterr()
    assert main(["generate", str(small), "--prompt", "the cat", "-n", "20", "--temperature", "0"]) == 0
    output = capsys.readouterr().out
    engine = Engine(GPT.from_pretrained(small).to(best_dtype(torch.device("cpu"))), tokenizer)
    params = SamplingParams(max_tokens=20, temperature=0, stop_token_ids=(tokenizer.end_id,))
    text = "".join(part.text for part in engine.stream(tokenizer.encode("the cat"), params))
    assert output.startswith(f"the cat{text}\n\n[") and " tokens/s]" in output and "torch ops" not in output
    assert main(["generate", str(small), "--prompt", "the cat", "--max-tokens", "1"]) == 0
    assert "\n[1 token, " in capsys.readouterr().out
    assert main(["quantize", str(small), str(tmp_path / "again"), "--bits", "8"]) == 2
    assert "IN has quantized weights of peakgpt already, expected floats, GPTQ or AWQ" in capsys.readouterr().err
    assert main(["generate", str(small), "--prompt", "the cat " * 100]) == 2
    assert "tokens, expected fewer than the model's 64" in capsys.readouterr().err
    assert len(text) > 5


def test_speculative_decoding_gives_the_same_text(tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sat on the mat, the cat sat on the hat "] * 20, 280)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 128}
    GPT(GPTConfig(**sizes, vocab_size=tokenizer.vocab_size)).save_pretrained(tmp_path, tokenizer)
    (tmp_path / "prompt.json").write_text(json.dumps({"input": "on", "examples": [["sat", "cat"]], "stop": ["never"]}))
    for draft in ("lookup", str(tmp_path)):
        argv = ["generate", str(tmp_path), "--file", str(tmp_path / "prompt.json"), "--max-tokens", "40"]
        assert main([*argv, "--temperature", "0", "--speculative-model", draft]) == 0
        output = capsys.readouterr().out
        assert output.startswith("sat\ncat\n\non\n") and "text the same]" in output and "40 tokens," in output
