"""The command `peakgpt bench`: compare with PyTorch and other engines in one interleaved run; write results as JSON."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from peakgpt.bench.case import limit, run_case
from peakgpt.bench.cases import KINDS, module_of
from peakgpt.bench.results_file import ResultsFile, fill
from peakgpt.kernels.command_line import integer, number
from peakgpt.kernels.hardware.device import choose_device

# Each key is a module of peakgpt.bench with add_arguments(parser) and run(args, device) -> exit code.
RUNS = {
    "suite": "all cases, or those of the README; continues a run that was stopped; writes a report",
    "device": "checks and benchmarks for a machine with a GPU, in under 8 minutes",
}
BENCHES = {**KINDS, **RUNS}

# Each key is a module of peakgpt.bench with add_arguments(parser) and run(args) -> exit code. They measure nothing.
TOOLS = {
    "compare": "test for each row whether one of two commits or runs is slower",
    "readme": "write the tables of README.md and docs/ from the committed results",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="{" + ",".join((*BENCHES, *TOOLS)) + "}")
    for name, text in BENCHES.items():
        bench = benches.add_parser(name, help=text, description=text)
        bench.add_argument("--device", help='"cpu" or "cuda"; default: the CUDA device if there is one')
        bench.add_argument("--out", type=Path, help="folder for the JSON (default: ./bench/results)")
        bench.add_argument("--commit", help="commit of the source, if it has no git history")
        if name in KINDS:
            _add_limits(bench)
        importlib.import_module(f"peakgpt.bench.{name}").add_arguments(bench)
    for name, text in TOOLS.items():
        tool = benches.add_parser(name, help=text, description=text)
        importlib.import_module(f"peakgpt.bench.{name}").add_arguments(tool)


def _add_limits(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--contenders", nargs="+", metavar="NAME", help="default: all that can run on the device")
    bench.add_argument("--rounds", type=integer(), help="maximum number of timings of each contender in a case")
    bench.add_argument("--seconds", type=number(), help="of each case, with start and check; at least 6 rounds run")


def run(args: argparse.Namespace) -> int:
    if args.bench in TOOLS:
        return importlib.import_module(f"peakgpt.bench.{args.bench}").run(args)
    device = choose_device(args.device)
    if args.bench in RUNS:
        return importlib.import_module(f"peakgpt.bench.{args.bench}").run(args, device)
    cases = limit(module_of(args.bench).cases(args, device), device, args.contenders, rounds=args.rounds,
                  seconds=args.seconds)  # fmt: skip

    def measure(file: ResultsFile) -> None:
        for case in cases:
            run_case(case, device, file.add)

    return fill(ResultsFile.create(args, device), device, measure)
