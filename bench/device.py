"""Checks and benchmarks for a machine with a GPU, in under 8 minutes: `python -m peakgpt.bench device`.

Every op is checked against float64. Then ops, training and decoding are timed versus PyTorch's and other projects'
kernels. Each part has a process of its own (isolated_jobs). The parts are in device_parts.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from peakgpt.bench import device_parts
from peakgpt.bench.isolated_jobs import run_part
from peakgpt.bench.results_file import ResultsFile, fill
from peakgpt.bench.run_results import Emit, Failure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=tuple(device_parts.PARTS), metavar="PART",
                        help=f"one of {', '.join(device_parts.PARTS)}; repeatable, default all")  # fmt: skip


def run(args: argparse.Namespace, device: torch.device) -> int:
    names = [name for name in device_parts.PARTS if name in (args.only or device_parts.PARTS)]
    file = ResultsFile.create(args, device)
    return fill(file, device, lambda file: run_parts(device_parts.__name__, names, device, file.add))


def run_parts(module: str, names: Sequence[str], device: torch.device, emit: Emit) -> None:
    """Run parts of a module's PARTS in order, with a line on standard error after each."""
    for name in names:
        start = time.perf_counter()
        rows = run_part(module, name, device)
        for row in rows:
            emit(row)
        failed = sum(isinstance(row, Failure) for row in rows)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {failed} failures", file=sys.stderr, flush=True)
