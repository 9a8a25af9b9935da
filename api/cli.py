"""The command line `peakgpt COMMAND ...`. Bad input prints one sentence and exits with code 2."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence

from peakgpt.closed_output import PIPE_EXIT_CODE, discard_output
from peakgpt.heartbeat import heartbeat
from peakgpt.kernels.command_line import Parser

# Each key is a module of peakgpt.commands with add_arguments(parser) and run(args) -> exit code. It is imported on use.
COMMANDS = {
    "quickstart": "train a small GPT on text of this machine, compare with PyTorch eager, write a report",
    "dedup": "remove exact and near-duplicate documents from a corpus",
    "contamination": "find examples of an evaluation in a training corpus",
    "prepare": "turn text, data sets or token files into token shards to train on",
    "train": "train a GPT on text files",
    "finetune": "adapt a checkpoint to a task, with examples of it",
    "predict": "labels of examples, by a checkpoint that finetune adapted to them",
    "verify": "check every file of a run against its digests",
    "report": "write the report of a run again, from its metrics",
    "generate": "continue a prompt with a checkpoint",
    "quantize": "quantize the weights of a checkpoint to 8 or 4 bits",
    "export": "write a model as a .gguf file for llama.cpp",
    "evaluate": "answer the questions of tasks with a model, in context, and score the answers",
    "score": "log-probabilities of continuations, or the perplexity of a text",
    "serve": "OpenAI-compatible completions over HTTP",
    "bench": "measure ops, training and decoding against PyTorch",
    "doctor": "print the machine, its peaks, and the backend of each op",
    "aot": "compile every Triton kernel for GPUs without having them; count registers and spills",
}


# Long commands -> the stream for their progress lines. It is stderr where programs read the command's stdout.
HEARTBEATS = {
    **dict.fromkeys(("quickstart", "prepare", "train", "finetune", "bench"), "stdout"),
    **dict.fromkeys(("quantize", "export", "evaluate", "predict", "score", "aot", "dedup", "contamination"), "stderr"),
}


class BadInput(Exception):
    """The command line has wrong arguments."""


class _Parser(Parser):
    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if flags := [text.partition("=")[0] for text in unknown if text.startswith("-")] or unknown:
            self.error(f"unrecognized arguments: {' '.join(flags)}{self._instead(flags[0])}")  # values may be secret
        return parsed

    def _instead(self, flag: str) -> str:
        """Return the known flag that an unknown one may mean."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        other = self.other_name(flag.lstrip("-")) if self.other_name else None
        nearest = difflib.get_close_matches(flag, known, n=1)
        return f", {other}" if other else f", expected {nearest[0]}" if nearest else ""

    def error(self, message: str):
        # "argument --steps: is 0, expected at least 1" is how argparse gives the messages of `integer` and `number`.
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)
        raise BadInput(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0 for success, 1 for a failed check, 2 for bad input, 3 for a training whose numbers are not finite,
        128 + N after signal N, such as 130 after Ctrl-C, and 141 if nobody reads the output any more.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell closed it: `peakgpt ... >&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 as long as the process
    with contextlib.suppress(AttributeError, ValueError):  # a replaced standard output
        sys.stdout.reconfigure(line_buffering=True)  # a pipe gets each line at once, as a terminal does
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        discard_output()
        return PIPE_EXIT_CODE
    except FloatingPointError as error:
        print(f"peakgpt: error: {error}", file=sys.stderr)
        return 3
    except (BadInput, ValueError, NotImplementedError, OSError) as error:
        print(f"peakgpt: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    width = max(map(len, COMMANDS))
    listing = "commands:\n" + "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    top = _Parser(
        prog="peakgpt", epilog=listing, usage="peakgpt COMMAND [options]", formatter_class=argparse.RawTextHelpFormatter
    )
    top.add_argument("--version", action="store_true", help="print the version")
    if not argv:
        top.print_help()
        return 2
    if argv[0].startswith("-"):
        return _run_without_command(top, argv)
    if argv[0] not in COMMANDS:
        raise BadInput(f"unknown command: got {argv[0]!r}, expected one of {', '.join(COMMANDS)}")
    command = importlib.import_module(f"peakgpt.commands.{argv[0]}")
    parser = _Parser(prog=f"peakgpt {argv[0]}", description=COMMANDS[argv[0]])
    command.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    if argv[0] not in HEARTBEATS:
        return command.run(args)
    with heartbeat(HEARTBEATS[argv[0]], f"peakgpt {argv[0]}"):
        return command.run(args)


def _run_without_command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    if parser.parse_args(argv).version:
        from peakgpt import __version__

        print(f"peakgpt {__version__}")
    return 0
