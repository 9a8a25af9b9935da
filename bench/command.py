"""The command `peakgpt bench`: compare with PyTorch and other engines in one interleaved run; write results as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peakgpt.bench.environment import environment
from peakgpt.bench.report import comparisons, notes, row_line, tables, verdicts
from peakgpt.bench.run_results import Failure, Row, RunResults
from peakgpt.bench.schema import write_results
from peakgpt.kernels.hardware.device import choose_device

# Each key is a module of peakgpt.bench with add_arguments(parser) and run(args, device, emit); `emit` takes a Row.
BENCHES = {
    "ops": "every op, forward and backward, versus PyTorch",
    "memory_bound": "memory-bound CPU kernels without dispatch, versus streams of the same reads and writes",
    "train": "a training step of GPT-2 versus PyTorch",
    "packing": "a training step on packed documents with masked attention versus whole rows",
    "fp8": "training with fp8 GEMMs versus bfloat16: loss and time",
    "patch": "patched versus unpatched transformers models",
    "prefill": "prefill of GPT-2 on a CPU versus PyTorch and other engines",
    "gemm": "GPT-2 124M's linear layers with 16-, 8- and 4-bit weights on a CPU",
    "decode": "greedy decoding with a KV cache versus PyTorch and other engines",
    "serve": "the server under many streams versus the engine alone",
    "device": "checks and benchmarks for a machine with a GPU, in under 8 minutes",
}

# Each key is a module of peakgpt.bench with add_arguments(parser) and run(args) -> exit code. They measure nothing.
TOOLS = {
    "compare": "test for each row whether one of two commits or runs is slower",
    "readme": "write the tables of README.md and docs/ from the committed results",
}

STOPPED = 130  # exit code after Ctrl-C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="{" + ",".join((*BENCHES, *TOOLS)) + "}")
    for name, text in BENCHES.items():
        bench = benches.add_parser(name, help=text, description=text)
        bench.add_argument("--device", help='"cpu" or "cuda"; default: the CUDA device if there is one')
        bench.add_argument("--out", type=Path, help="folder for the JSON (default: ./bench/results)")
        bench.add_argument("--commit", help="commit of the source, if it has no git history")
        importlib.import_module(f"peakgpt.bench.{name}").add_arguments(bench)
    for name, text in TOOLS.items():
        tool = benches.add_parser(name, help=text, description=text)
        importlib.import_module(f"peakgpt.bench.{name}").add_arguments(tool)


def run(args: argparse.Namespace) -> int:
    if args.bench in TOOLS:
        return importlib.import_module(f"peakgpt.bench.{args.bench}").run(args)
    device = choose_device(args.device)
    env = environment(device, commit=args.commit)  # before measuring, so that a missing device is an error at once
    out = args.out or Path("bench", "results")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):  # a folder that cannot be written to is an error before measuring
        pass
    file = ResultsFile(out / f"{args.bench}-{device.type}-{time.strftime('%Y%m%d-%H%M%S')}.json", env)
    stopped = False
    try:
        importlib.import_module(f"peakgpt.bench.{args.bench}").run(args, device, file.add)
    except (Exception, KeyboardInterrupt) as error:
        if not file.path.exists():  # nothing is lost, for example after a wrong argument
            raise
        stopped = isinstance(error, KeyboardInterrupt)
        file.add(Failure.of(error))
    env["clocks"] = environment(device)["clocks"]  # read again, because a GPU under load has other clocks
    file.write()
    results = file.rows.results
    lines = [*tables(results), *comparisons(results), *notes(results), *verdicts(file.rows)]
    print(*lines, f"written: {file.path}", sep="\n")
    return STOPPED if stopped else file.rows.exit_code


class ResultsFile:
    """The rows of a run, written to a JSON file and printed to standard error as soon as each one is finished."""

    def __init__(self, path: Path, env: dict[str, Any]):
        """
        Args:
            path: of the JSON file; it exists after the first row.
            env: from `environment`.
        """
        self.path = path
        self.env = env
        self.rows = RunResults()

    def add(self, row: Row) -> None:
        """Keep, print and write a row."""
        self.rows.add(row)
        print(row_line(row), file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Replace the file by one with all rows so far."""
        rows = self.rows
        checks, failures = ([dataclasses.asdict(row) for row in kind] for kind in (rows.checks, rows.failures))
        write_results(self.path, rows.results, self.env, checks=checks, failures=failures)
