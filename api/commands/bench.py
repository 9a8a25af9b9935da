"""peakgpt bench: measure peakgpt against PyTorch, contenders interleaved in one run, results as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import time
from pathlib import Path

from peakgpt.bench.report import comparisons, notes, tables, verdicts
from peakgpt.kernels.hardware.clock import environment, write_results
from peakgpt.kernels.hardware.device import choose_device

# Each name is a module of peakgpt.bench with add_arguments(parser) and run(args, device) -> Findings.
BENCHES = {
    "ops": "every op, forward and backward",
    "passes": "memory-bound CPU kernels versus plain streams of the same reads and writes",
    "train": "a training step of GPT-2",
    "fp8": "training with 8-bit GEMMs: loss and time versus bfloat16",
    "patch": "models of transformers, patched versus unpatched",
    "prefill": "prefill of a GPT-2 prompt on CPU, versus plain torch and other engines",
    "products": "the linear layers of GPT-2 124M with weights of 16, 8 and 4 bits",
    "decode": "greedy decoding with a KV cache",
    "serve": "many concurrent streams from the server, versus the engine alone",
    "device": "every benchmark for a machine with a GPU, in one run",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="{" + ",".join(BENCHES) + "}")
    for name, text in BENCHES.items():
        bench = benches.add_parser(name, help=text, description=text)
        bench.add_argument("--device", help='"cpu" or "cuda" (default: "cuda" if available)')
        bench.add_argument("--out", type=Path, help="folder for the JSON (default: bench/results below this folder)")
        bench.add_argument("--commit", help="commit of the source tree, if it has no git history")
        importlib.import_module(f"peakgpt.bench.{name}").add_arguments(bench)


def run(args: argparse.Namespace) -> int:
    if getattr(args, "rounds", 1) < 1:
        raise ValueError(f"--rounds is {args.rounds}, expected at least 1")
    device = choose_device(args.device)
    env = environment(device, commit=args.commit)  # before measuring: raises for a missing device
    out = args.out or Path("bench", "results")
    out.mkdir(parents=True, exist_ok=True)
    findings = importlib.import_module(f"peakgpt.bench.{args.bench}").run(args, device)
    path = out / f"{args.bench}-{device.type}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    checks, failures = ([dataclasses.asdict(row) for row in rows] for rows in (findings.checks, findings.failures))
    env["clocks"] = environment(device)["clocks"]  # after the measurement, when a GPU runs at its working clocks
    write_results(path, findings.results, env, checks=checks, failures=failures)
    lines = [*tables(findings.results), *comparisons(findings.results), *notes(findings.results), *verdicts(findings)]
    print(*lines, f"written: {path}", sep="\n")
    return findings.exit_code
