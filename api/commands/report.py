"""peakgpt report: write the page and the picture of a run again, from its metrics.jsonl; the run may be running."""

from __future__ import annotations

import argparse

from peakgpt.engine.training.run_report import settings_section, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run")


def run(args: argparse.Namespace) -> int:
    print(f"report: {write_report(args.run, settings_section(args.run))}")
    return 0
