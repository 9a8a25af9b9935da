"""peakgpt verify: find damage in everything that a resumed run or a load of its checkpoints would read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from peakgpt.engine.checkpoint.run_checkpoints import is_prepared, run_faults
from peakgpt.engine.data.dataset import RECORD, TrainingData
from peakgpt.engine.data.run_layout import TOKENS, saved_steps
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.training.run_config import RunConfig
from peakgpt.engine.training.run_file import read_run_file
from peakgpt.engine.training.validation_config import HELD_OUT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run of `peakgpt train`")


def run(args: argparse.Namespace) -> int:
    folder = Path(args.run)
    if not saved_steps(folder) and not is_prepared(folder):
        raise ValueError(f"run folder {folder}: got no run in it, expected the folder of `peakgpt train`")
    count = 0
    for count, fault in enumerate((*run_faults(folder), *_data_faults(folder)), 1):  # noqa: B007
        print(fault)
    if count:
        print(f"{folder}: {count} faults")
        return 1
    steps = ", ".join(map(str, saved_steps(folder))) or "none yet"
    print(f"{folder}: every file is as it was written; checkpoints of steps: {steps}")
    return 0


def _data_faults(run: Path) -> Iterator[str]:
    """Read the prepared folders outside of the run that a resumed run reads. Yield one sentence for a fault."""
    try:
        config = RunConfig.of(read_run_file(run))
    except ValueError:  # without one the run is not resumed; damage in it is found with the run's other files
        return
    try:
        if config.data.dataset is not None and (run / TOKENS / RECORD).exists():
            TrainingData.open(config.data, run / TOKENS)
        for path in config.validation.named_sets().values():
            if Path(path).is_dir():
                TokenShards.open(path, HELD_OUT)
    except ValueError as error:
        yield str(error)
