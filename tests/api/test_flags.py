"""Generated over the parsers: numbers out of range, abbreviations, and flags that a mode would ignore."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

from peakgpt.bench.command import BENCHES
from peakgpt.cli import COMMANDS, main
from peakgpt.engine.settings.values import show
from peakgpt.engine.training.run_config import run_settings
from peakgpt.kernels.command_line import Parser

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "examples" / "tasks"
# Flags for which 0 is right.
ZERO = (
    "--temperature", "--seed", "--end-id", "--top-k", "--min-p", "--shots", "--lm-loss-weight", "--classifier-dropout",
    "--lora-dropout",
)  # fmt: skip
ACCEPTED = {**dict.fromkeys(ZERO, ("0",)), "--transfer-layers": ("-1", "0")}
REQUIRED = {"generate": ["MISSING", "--prompt", "x"], "quantize": ["MISSING", "OUT", "--bits", "8"],
            "export": ["MISSING", "OUT", "--format", "gguf"],
            "score": ["MISSING", "--text", "x"], "evaluate": ["MISSING", "--task", "x.json"]}  # fmt: skip


def parser_of(command):
    parser = Parser(prog=command)
    importlib.import_module(f"peakgpt.commands.{command}").add_arguments(parser)
    return parser


def parsers():
    """Yield (argv that selects it, parser) of each command and benchmark."""
    for command in COMMANDS:
        parser = parser_of(command)
        yield [command], parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from (([command, name], sub) for name, sub in action.choices.items())


PARSERS = {" ".join(argv): (argv, parser) for argv, parser in parsers()}


def numeric_flags():
    for name, (_, parser) in PARSERS.items():
        for action in parser._actions:
            # serve has its own test; the settings of train are in tests/engine/training/test_settings.py
            if name == "serve" or action.dest in run_settings():
                continue
            if action.option_strings and action.type is not None:
                try:
                    action.type("x" * 3)
                except (ValueError, argparse.ArgumentTypeError):
                    yield name, action.option_strings[-1]


NUMERIC = list(numeric_flags())


def test_the_numeric_flags_are_found():
    assert set(BENCHES) < {name.split()[-1] for name in PARSERS} and len(NUMERIC) >= 20


@pytest.mark.parametrize(("name", "flag"), NUMERIC)
def test_a_number_out_of_range_is_one_sentence_before_loading(name, flag, capsys, tmp_path, monkeypatch):
    """Regression: `train --lr nan` trained and overwrote a good checkpoint; `bench --seconds nan` never ended."""
    monkeypatch.chdir(tmp_path)
    for value in ("-1", "0", "1e30", "1" + "0" * 30, "nan", "inf", "text", ""):
        if value in ACCEPTED.get(flag, ()):
            continue
        argv, _ = PARSERS[name]
        assert main([*argv, *REQUIRED.get(name, []), f"{flag}={value}"]) == 2, value
        error = capsys.readouterr().err
        assert error.startswith("peakgpt: error: ") and error.count("\n") == 1 and flag in error, error
    assert not list(tmp_path.iterdir())


def test_no_parser_takes_abbreviations():
    """Regression: --api-key SECRET was taken for --api-key-file, and the secret printed."""
    for name, (_, parser) in PARSERS.items():
        assert not parser.allow_abbrev, name
    for file in (ROOT / folder for folder in ("api", "bench", "kernels", "engine", "examples")):
        for source in file.rglob("*.py"):
            for call in re.findall(r"(?<!Parser\()argparse\.ArgumentParser\(.*", source.read_text()):
                assert "allow_abbrev=False" in call, f"{source}: {call}"


RESUME = parser_of("train")


@pytest.mark.parametrize(
    "action", [a for a in RESUME._actions if a.dest not in ("help", "resume")], ids=lambda a: a.dest
)
def test_a_resumed_run_takes_or_refuses_each_flag(action, tmp_path, capsys):
    declared = run_settings().get(action.dest)
    value = ["none"] if declared is None else show(declared.default, quoted=False).strip("[]").split(", ")
    value = ["cpu"] if action.dest == "device" else ["0"] if value == [""] else value
    assert main(["train", "--resume", str(tmp_path / "no"), action.option_strings[0], *value]) == 2
    error = capsys.readouterr().err
    refused = f"{action.option_strings[0]}: got it with --resume" in error
    assert refused != (declared.resumable if declared else action.dest == "device"), error
    assert refused or "got no such folder" in error, error


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        *((["generate", "M", "-p", "x", "--temperature", "0", f"--{f}", "1"], f)
          for f in ("top-k", "top-p", "min-p", "seed")),
        (["score", "M", "--text", "x", "--context", "y"], "context"),
        *((["score", "M", "--continuation", "x", f"--{f}", "9"], f) for f in ("window", "stride")),
        *((["evaluate", "M", "--task", f"{TASKS}/sentiment.jsonl", f"--{f}", "3"], f)
          for f in ("votes", "temperature", "max-tokens", "shots-from", "field", "include-path")),
        (["evaluate", "M", "--task", f"{TASKS}/arithmetic.jsonl", "--top-k", "3"], "top-k"),
        *((["evaluate", "M", "--task", "hellaswag", *f], f[0][2:])
          for f in (["--votes", "3"], ["--output-type", "generate_until"], ["--truncate"], ["--shots-from", "x"])),
    ],
)
def test_a_flag_that_a_mode_would_ignore_is_refused(argv, flag, capsys):
    assert main(argv) == 2
    assert re.search(rf"--{flag}: got it with(out)? ", capsys.readouterr().err)
