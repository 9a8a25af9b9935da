"""All cases in one run, or those behind the README's tables: `peakgpt bench suite`, `make bench`, `make bench-all`.

A run that was stopped continues: the next call measures the cases that are missing, if commit, machine and cases are
the same. A case that was being measured is measured again. At the end a report is written beside the JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peakgpt.bench.case import Case, run_case
from peakgpt.bench.cases import readme_cases, select, suite_cases
from peakgpt.bench.results_file import ResultsFile, fill, folder_of, print_row
from peakgpt.bench.run_results import Row
from peakgpt.bench.suite_report import write_suite_report

# Keys of the environment that must be the same to continue a run.
SAME = ("commit", "device", "threads", "cpu_quota", "isa", "malloc")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--readme", action="store_true", help="only the README's cases, about 16 minutes on 2 cores")
    parser.add_argument("--case", action="append", metavar="PATTERN",
                        help='only cases whose names match, such as "ops/*/float32"; repeatable')  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the names of the cases and measure nothing")


def run(args: argparse.Namespace, device: torch.device) -> int:
    cases = readme_cases(device) if args.readme else suite_cases(device)
    if args.case:
        cases = select(cases, args.case)
    if args.list:
        print(*(f"{case.name}: {', '.join(case.contenders(device))}" for case in cases), sep="\n")
        return 0
    file = _file(args, device, cases)
    code = fill(file, device, lambda file: measure_suite(cases, device, file))
    report = write_suite_report(file)
    print(f"report: {report}")
    return code


def measure_suite(cases: Sequence[Case], device: torch.device, file: ResultsFile) -> None:
    """Measure the cases that are not finished; after each one the file says so."""
    progress = file.env["suite"]
    for number, case in enumerate(cases, 1):
        if case.name in progress["finished"]:
            continue
        start, rows = time.perf_counter(), []

        def emit(row: Row, rows: list[Row] = rows) -> None:
            print_row(row)
            rows.append(row)

        print(f"case {number} of {len(cases)}: {case.name}", file=sys.stderr, flush=True)
        run_case(case, device, emit)
        for row in rows:  # all at once, so that the file has no part of a case
            file.rows.add(row)
        progress["finished"].append(case.name)
        progress["seconds"][case.name] = round(time.perf_counter() - start, 1)
        file.write()


def _file(args: argparse.Namespace, device: torch.device, cases: Sequence[Case]) -> ResultsFile:
    """Return the newest unfinished file of the same commit, machine and cases, or a new file."""
    file = ResultsFile.create(args, device)
    names = [case.name for case in cases]
    for path in sorted(folder_of(args).glob(f"{args.bench}-{device.type}-*.json"), reverse=True):
        earlier = _unfinished(path, file.env, names)
        if earlier is not None:
            done = len(earlier.env["suite"]["finished"])
            print(f"continues {path}: {done} of {len(names)} cases are finished", file=sys.stderr, flush=True)
            return earlier
    file.env["suite"] = {"cases": names, "finished": [], "seconds": {}}
    return file


def _unfinished(path: Path, env: dict[str, Any], names: Sequence[str]) -> ResultsFile | None:
    """Return the file if its run can be continued, without the rows of the case that was stopped."""
    try:
        file = ResultsFile.load(path)
    except ValueError:  # written by another version
        return None
    progress = file.env.get("suite", {})
    if progress.get("cases") != list(names) or len(progress["finished"]) == len(names):
        return None
    if not _known(env["commit"]) or any(file.env[key] != env[key] for key in SAME):
        return None
    file.rows.failures = [failure for failure in file.rows.failures if failure.job in progress["finished"]]
    return file


def _known(commit: str | None) -> bool:
    """Return whether a commit states the source; changes in the working tree are not stated."""
    return commit is not None and not commit.endswith("+dirty")
