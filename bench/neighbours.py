"""Decoding and training on a CPU that others use too: `peakgpt bench neighbours`.

Contenders run alone, beside one and two busy loops, under a quota of one CPU, and as two copies at once. What counts is
the share of its quiet speed that each one keeps.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from peakgpt.bench.busy_machine import time_on_busy_machine
from peakgpt.bench.case import Case, expect_cpu, joined
from peakgpt.bench.contenders.contender import WEIGHT_FORMATS, Workload
from peakgpt.bench.contenders.models import expect_family
from peakgpt.bench.contenders.time_contenders import Work, checked_contenders
from peakgpt.bench.cpu_quota import CpuQuota
from peakgpt.bench.decode import DecodeCase
from peakgpt.bench.interleave import OnFailure
from peakgpt.bench.model_choice import add_model_arguments, chosen_model
from peakgpt.bench.quiet_share import MACHINE, QUOTA
from peakgpt.bench.schema import Result
from peakgpt.bench.train import DTYPES, TrainCase
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.kernels.command_line import integer

# Kind of work -> its contenders; a second process of each one must fit into memory.
CONTENDERS = {"decode": ("peakgpt", "eager", "llama.cpp", "openvino"), "train": ("peakgpt", "eager, tuned malloc")}
STREAMS, PROMPT, TOKENS = (1, 8), 16, 32
BATCH, LENGTH = 4, 256


@dataclass(frozen=True)
class NeighboursCase(Case):
    """The work of another case, on a quiet and on a busy machine.

    Args:
        of: the other case; its limits do not count.
    """

    kind: ClassVar[str] = "neighbours"
    of: DecodeCase | TrainCase

    @property
    def name(self) -> str:
        return joined(self.kind, self.of.name)

    def all_contenders(self, device: torch.device) -> list[str]:
        return [name for name in self.of.all_contenders(device) if name in CONTENDERS[self.of.kind]]

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            work = stack.enter_context(self.of.work())
            quota, missing = _quota(stack)
            workers = stack.enter_context(_checked(work, self.contenders(device), on_failure))
            failed = lambda name, error: on_failure(f"{name}, second copy", error)  # noqa: E731
            copies = stack.enter_context(_checked(work, list(workers), failed))
            if not workers:
                return []
            timings = time_on_busy_machine(workers, copies, quota, rounds=self.rounds, budget_s=self.left_s(start),
                                           on_failure=on_failure)  # fmt: skip
            bits = {name: work.weight_bits(name) for name in workers}
        return [
            Result.of(
                timing.noted(workers[name].note, contender.version, missing), bench=self.kind, contender=name,
                backend=contender.backend, device="cpu", dtype=self.of.dtype, weight_bits=bits[name],
                case={"work": self.of.kind, **self.of.sizes, **({MACHINE: machine} if machine else {})},
            )
            for (name, machine), timing in timings.items() for contender in [work.contenders[name]]
        ]  # fmt: skip


def _quota(stack: contextlib.ExitStack) -> tuple[CpuQuota | None, str]:
    """Return a quota of one CPU, which ends with the stack, or None and a note with the reason."""
    try:
        quota = CpuQuota(1.0)
    except OSError as error:
        return None, f"no turns with a {QUOTA}: {error}"
    stack.callback(quota.close)
    return quota, ""


def _checked(work: Work, names: Sequence[str], on_failure: OnFailure):
    return checked_contenders(
        ((name, partial(work.start, name)) for name in names), work.first_output, work.expect_correct, on_failure
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--work", choices=CONTENDERS, action="append", help="repeatable; default both")
    parser.add_argument("--streams", type=integer(), action="append", help="of decode; repeatable; default 1 and 8")
    parser.add_argument(
        "--dtype", choices=WEIGHT_FORMATS, action="append",
        help="weight format; repeatable; default bfloat16; int8 and int4 are of decode alone",
    )  # fmt: skip


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """
    Raises:
        ValueError: no CPU, no family of transformers has the model, or a flag has no effect.
    """
    expect_cpu("neighbours", device)
    model, config = chosen_model(args)
    expect_family(config)
    works, dtypes = args.work or list(CONTENDERS), args.dtype or ["bfloat16"]
    if args.streams and "decode" not in works:
        raise ValueError("bench neighbours: got --streams without decoding, expected --work decode")
    found = []
    if "decode" in works:
        found += _decoding(model, config, args.streams or STREAMS, dtypes)
    if "train" in works:
        found += _training(model, config, [dtype for dtype in dtypes if dtype in DTYPES])
    if not found:
        raise ValueError(f"bench neighbours: got --work train with --dtype {dtypes[0]}, expected {' or '.join(DTYPES)}")
    return [NeighboursCase(case, rounds=7) for case in found]


def _decoding(model: str, config: GPTConfig, streams: Sequence[int], dtypes: Sequence[str]) -> list[DecodeCase]:
    workloads = [Workload(count, PROMPT, TOKENS) for count in streams]
    return [DecodeCase(model, config, workload, dtype) for workload in workloads for dtype in dtypes]


def _training(model: str, config: GPTConfig, dtypes: Sequence[str]) -> list[TrainCase]:
    recipe = partial(TrainConfig, batch=BATCH, tokens=LENGTH, warmup=0.0)
    return [TrainCase(model, config, recipe(dtype=getattr(torch, dtype))) for dtype in dtypes]
