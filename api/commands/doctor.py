"""peakgpt doctor: the machine, its peaks, and each op's backend with the reason."""

from __future__ import annotations

import argparse

from peakgpt.kernels.doctor import doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help='"cpu" or "cuda"; the CUDA device where there is one by default')


def run(args: argparse.Namespace) -> int:
    print(doctor(args.device))
    return 0
