"""peakgpt bench: measurements beside PyTorch, contenders interleaved in one run, results as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import time
from pathlib import Path

from peakgpt.bench.report import comparisons, notes, tables, verdicts
from peakgpt.kernels.hardware.clock import environment, write_results
from peakgpt.kernels.hardware.device import choose_device

# Each is a module of peakgpt.bench with add_arguments(parser) and run(args, device) -> Findings.
BENCHES = {
    "ops": "every op, forward and backward",
    "passes": "the CPU's memory-bound kernels alone, beside streams of the same reads and writes",
    "train": "a training step of GPT-2",
    "fp8": "training with 8-bit products: the loss and the time beside bfloat16",
    "patch": "transformers' models patched, beside the same models as they are",
    "prefill": "a prompt of GPT-2 on CPU, beside plain torch and other engines",
    "products": "a pass of GPT-2 124M's linear layers with weights of 16, 8 and 4 bits",
    "decode": "greedy decoding with a cache",
    "serve": "many streams from the server at once, beside the engine alone",
    "device": "all that a machine with a GPU should be asked, in one go",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="{" + ",".join(BENCHES) + "}")
    for name, text in BENCHES.items():
        bench = benches.add_parser(name, help=text, description=text)
        bench.add_argument("--device", help='"cpu" or "cuda"; the CUDA device where there is one by default')
        bench.add_argument("--out", type=Path, help="folder for the JSON (default: bench/results below this folder)")
        bench.add_argument("--commit", help="the tree's commit, where it came without its history")
        importlib.import_module(f"peakgpt.bench.{name}").add_arguments(bench)


def run(args: argparse.Namespace) -> int:
    if getattr(args, "rounds", 1) < 1:
        raise ValueError(f"--rounds is {args.rounds}, expected at least 1")
    device = choose_device(args.device)
    env = environment(device, commit=args.commit)  # before measuring: a device that is not there is refused here
    out = args.out or Path("bench", "results")
    out.mkdir(parents=True, exist_ok=True)
    found = importlib.import_module(f"peakgpt.bench.{args.bench}").run(args, device)
    path = out / f"{args.bench}-{device.type}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    checks, failures = ([dataclasses.asdict(row) for row in rows] for rows in (found.checks, found.failures))
    env["clocks"] = environment(device)["clocks"]  # of a GPU that has just been at work
    write_results(path, found.results, env, checks=checks, failures=failures)
    said = [*tables(found.results), *comparisons(found.results), *notes(found.results), *verdicts(found)]
    print(*said, f"written: {path}", sep="\n")
    return found.exit_code
