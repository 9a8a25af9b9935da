"""peakgpt verify: find damage in everything that a resumed run or a load of its checkpoints would read."""

from __future__ import annotations

import argparse
from pathlib import Path

from peakgpt.engine.checkpoint.run_checkpoints import is_prepared, run_faults
from peakgpt.engine.data.run_layout import saved_steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run of `peakgpt train`")


def run(args: argparse.Namespace) -> int:
    folder = Path(args.run)
    if not saved_steps(folder) and not is_prepared(folder):
        raise ValueError(f"run folder {folder}: got no run in it, expected the folder of `peakgpt train`")
    count = 0
    for count, fault in enumerate(run_faults(folder), 1):  # noqa: B007
        print(fault)
    if count:
        print(f"{folder}: {count} faults")
        return 1
    steps = ", ".join(map(str, saved_steps(folder))) or "none yet"
    print(f"{folder}: every file is as it was written; checkpoints of steps: {steps}")
    return 0
