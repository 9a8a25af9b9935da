"""The JSON file of a run: rows are printed and on disk as soon as they are finished."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peakgpt.bench.environment import environment
from peakgpt.bench.report import comparisons, notes, row_line, tables, verdicts
from peakgpt.bench.run_results import Failure, Row, RunResults
from peakgpt.bench.schema import read_results, write_results

STOPPED = 130  # exit code after Ctrl-C


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

    @classmethod
    def create(cls, args: argparse.Namespace, device: torch.device) -> ResultsFile:
        """Return the file of a new run of `peakgpt bench NAME`.

        Args:
            args: bench (the name), out (folder) and commit; the last two may be None.
            device: where the contenders run.
        Raises:
            OSError: the folder cannot be written to.
        """
        env = environment(device, commit=args.commit)
        out = folder_of(args)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # an error before measuring, not after
            pass
        name = f"{args.bench}-{device.type}-{time.strftime('%Y%m%d-%H%M%S')}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))  # runs of one second
        return cls(next(path for path in (out / f"{name}.json" for name in names) if not path.exists()), env)

    @classmethod
    def load(cls, path: Path) -> ResultsFile:
        """Return the file of an earlier run with its rows.

        Raises:
            ValueError: the file is invalid; see `read_results`.
        """
        results, env = read_results(path)
        file = cls(path, env)
        file.rows.results = results
        file.rows.failures = [Failure(**row) for row in json.loads(path.read_text())["failures"]]
        return file

    def add(self, row: Row) -> None:
        """Keep, print and write a row."""
        self.rows.add(row)
        print_row(row)
        self.write()

    def write(self) -> None:
        """Replace the file by one with all rows so far."""
        rows = self.rows
        checks, failures = ([dataclasses.asdict(row) for row in kind] for kind in (rows.checks, rows.failures))
        write_results(self.path, rows.results, self.env, checks=checks, failures=failures)

    def text(self) -> str:
        """Return the tables, notes and failures."""
        results = self.rows.results
        return "\n".join([*tables(results), *comparisons(results), *notes(results), *verdicts(self.rows)])


def print_row(row: Row) -> None:
    """Print a finished row to standard error."""
    print(row_line(row), file=sys.stderr, flush=True)


def folder_of(args: argparse.Namespace) -> Path:
    """Return the folder of the results."""
    return args.out or Path("bench", "results")


def fill(file: ResultsFile, device: torch.device, measure: Callable[[ResultsFile], None]) -> int:
    """Measure, print the tables and return the exit code of the command.

    Args:
        file: of this run.
        device: where the contenders run.
        measure: adds the rows. If it raises after the first row, the exception becomes a row.
    """
    stopped = False
    try:
        measure(file)
    except (Exception, KeyboardInterrupt) as error:
        if not file.path.exists():  # nothing is lost, for example after a wrong argument
            raise
        stopped = isinstance(error, KeyboardInterrupt)
        file.add(Failure.of(error))
    file.env["clocks"] = environment(device)["clocks"]  # read again, because a GPU under load has other clocks
    file.write()
    print(file.text(), f"written: {file.path}", sep="\n")
    return STOPPED if stopped else file.rows.exit_code
