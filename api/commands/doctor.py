"""peakgpt doctor: print the machine, its peaks, and the backend of each op with the reason."""

from __future__ import annotations

import argparse

from peakgpt.kernels.doctor import doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help='"cpu" or "cuda" (default: "cuda" if available)')


def run(args: argparse.Namespace) -> int:
    print(doctor(args.device))
    return 0
