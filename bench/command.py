"""The command `peakgpt bench`: measure against PyTorch and other engines, interleaved in one run; results as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import time
from pathlib import Path

from peakgpt.bench.environment import environment
from peakgpt.bench.report import comparisons, notes, tables, verdicts
from peakgpt.bench.schema import write_results
from peakgpt.kernels.hardware.device import choose_device

# Each is a module of peakgpt.bench with add_arguments(parser) and run(args, device) -> RunResults.
BENCHES = {
    "ops": "every op, forward and backward, versus PyTorch",
    "memory_bound": "memory-bound CPU kernels without dispatch, versus streams of the same reads and writes",
    "train": "a training step of GPT-2 versus PyTorch",
    "fp8": "training with fp8 GEMMs versus bfloat16: loss and time",
    "patch": "patched versus unpatched transformers models",
    "prefill": "prefill of GPT-2 on a CPU versus PyTorch and other engines",
    "gemm": "GPT-2 124M's linear layers with 16-, 8- and 4-bit weights on a CPU",
    "decode": "greedy decoding with a KV cache versus PyTorch and other engines",
    "serve": "the server under many streams versus the engine alone",
    "device": "checks and benchmarks for a machine with a GPU, in under 8 minutes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="{" + ",".join(BENCHES) + "}")
    for name, text in BENCHES.items():
        bench = benches.add_parser(name, help=text, description=text)
        bench.add_argument("--device", help='"cpu" or "cuda"; default: the CUDA device if there is one')
        bench.add_argument("--out", type=Path, help="folder for the JSON (default: bench/results below this folder)")
        bench.add_argument("--commit", help="commit of the source, if it has no git history")
        importlib.import_module(f"peakgpt.bench.{name}").add_arguments(bench)


def run(args: argparse.Namespace) -> int:
    if getattr(args, "rounds", 1) < 1:
        raise ValueError(f"--rounds is {args.rounds}, expected at least 1")
    device = choose_device(args.device)
    env = environment(device, commit=args.commit)  # before measuring, so that a missing device is an error at once
    out = args.out or Path("bench", "results")
    out.mkdir(parents=True, exist_ok=True)
    results = importlib.import_module(f"peakgpt.bench.{args.bench}").run(args, device)
    path = out / f"{args.bench}-{device.type}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    checks, failures = ([dataclasses.asdict(row) for row in rows] for rows in (results.checks, results.failures))
    env["clocks"] = environment(device)["clocks"]  # of a GPU at work
    write_results(path, results.results, env, checks=checks, failures=failures)
    lines = [*tables(results.results), *comparisons(results.results), *notes(results.results), *verdicts(results)]
    print(*lines, f"written: {path}", sep="\n")
    return results.exit_code
