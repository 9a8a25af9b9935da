"""Checks and benchmarks for a machine with a GPU, in under 8 minutes: `python -m peakgpt.bench device`.

Every op is checked against float64. Then ops, training and decoding are timed versus PyTorch's and other projects'
kernels. Each part has a process of its own (isolated_jobs). On a CPU the same parts run at tiny sizes, as a dry run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence

import torch

from peakgpt.bench.check import CASES, LARGE_CASES, check
from peakgpt.bench.contenders.contender import Workload
from peakgpt.bench.contenders.op_peers import peers
from peakgpt.bench.device_decode import compare_first_token, compare_steps
from peakgpt.bench.fp8 import compare as compare_fp8
from peakgpt.bench.isolated_jobs import Job, Part, run_part
from peakgpt.bench.op_cases import OpCase
from peakgpt.bench.ops import compare
from peakgpt.bench.run_results import Emit, Failure, record_failures
from peakgpt.bench.train import compare_training
from peakgpt.engine.model.presets import preset
from peakgpt.engine.training.train_config import TrainConfig

FLOAT32, BFLOAT16 = (torch.float32,), (torch.bfloat16,)
ONE_BY_ONE = ("forward", "backward")
WHOLE = ("forward+backward",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=tuple(PARTS), metavar="PART",
                        help=f"one of {', '.join(PARTS)}; repeatable, default all")  # fmt: skip


def run(args: argparse.Namespace, device: torch.device, emit: Emit) -> None:
    run_parts(__name__, [p for p in PARTS if p in (args.only or PARTS)], device, emit)


def run_parts(module: str, names: Sequence[str], device: torch.device, emit: Emit) -> None:
    """Run parts of a module's PARTS in order, with a line on standard error after each."""
    for name in names:
        start = time.perf_counter()
        rows = run_part(module, name, device)
        for row in rows:
            emit(row)
        failed = sum(isinstance(row, Failure) for row in rows)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {failed} failures", file=sys.stderr, flush=True)


# ---- check


def _check_jobs(device: torch.device) -> dict[str, Job]:
    small = [("adamw", {"count": 1025}, {"lr": 1e-2}), *CASES]
    cases = [*LARGE_CASES, *small] if device.type == "cuda" else small
    return {
        f"{name} {sizes} {params} {dtype}": functools.partial(_check, (name, sizes, params, dtype, device))
        for (name, sizes, params), dtype in itertools.product(cases, (torch.float32, torch.bfloat16))
    }


def _check(case: tuple, budget_s: float, emit: Emit) -> None:
    for row in check(*case):
        emit(row)


# ---- ops

# 16k tokens at hidden size 2048, as in the literature; one query with 8k cached keys, larger than L2 together.
ATTENTION = [
    *(OpCase("attention", {"batch": (1 << 14) // t, "tokens": t, "heads": 2048 // d, "head_dim": d}, passes=ONE_BY_ONE)
      for d in (64, 128) for t in (2048, 8192, 16384)),
    *(OpCase("attention_qkv", {"batch": 8, "tokens": 2048, "heads": 16, "head_dim": 128, **pairs}, passes=ONE_BY_ONE)
      for pairs in ({}, {"pairs": 16}, {"pairs": 64})),
    *(OpCase("attention", {"batch": b, "tokens": 1, "heads": 32, "head_dim": 128, "keys": 8192}, {"causal": False},
           passes=("forward",)) for b in (8, 1)),
    *(OpCase("attention_decode", {"batch": b, "heads": 32, "head_dim": 128, "keys": 8192, "block": block})
      for b in (32, 8, 1) for block in (8192, 16)),
]  # fmt: skip
ROWS = 1 << 15  # tokens of a GPT-2 batch: 32 sequences of 1024
LAYERNORM = [
    *(OpCase("layernorm", {"rows": ROWS, "width": c}, passes=ONE_BY_ONE) for c in (768, 1024, 2048, 4096)),
    OpCase("add_layernorm", {"rows": ROWS, "width": 768}, passes=ONE_BY_ONE),
    OpCase("rmsnorm", {"rows": ROWS, "width": 2048}, passes=ONE_BY_ONE),
]
MLP = [OpCase("mlp", {"rows": ROWS, "width": c, "hidden": 4 * c}, passes=ONE_BY_ONE) for c in (768, 1600)]
# One and eight tokens through the linear layers of GPT-2 1558M, and through the head of 124M.
LINEAR = [
    OpCase("linear", {"rows": rows, "width": c, "out": f}, passes=("replayed",))
    for c, f in ((1600, 4800), (1600, 6400), (6400, 1600), (768, 50304))
    for rows in (1, 8)
]
LOSS = [
    OpCase("linear_cross_entropy", {"rows": ROWS, "width": 768, "vocab": v}, {"prefer": way}, passes=WHOLE)
    for v, way in ((50304, "memory"), (131072, "memory"), (50304, "time"))
]
ADAMW = [
    OpCase("adamw", {"count": 124_000_000}),
    OpCase("adamw", {"count": 1_558_000_000}, checked={"count": 1 << 20}),
]

TINY = {
    "attention": [
        OpCase("attention", {"batch": 1, "tokens": 64, "heads": 2, "head_dim": 64}, passes=ONE_BY_ONE),
        OpCase("attention_decode", {"batch": 1, "heads": 2, "head_dim": 64, "keys": 64}),
    ],
    "layernorm": [OpCase("layernorm", {"rows": 64, "width": 256}, passes=ONE_BY_ONE)],
    "mlp": [OpCase("mlp", {"rows": 64, "width": 64, "hidden": 256}, passes=ONE_BY_ONE)],
    "linear": [OpCase("linear", {"rows": 8, "width": 64, "out": 64}, passes=("replayed",))],
    "loss": [OpCase("linear_cross_entropy", {"rows": 64, "width": 64, "vocab": 512}, passes=WHOLE)],
    "adamw": [OpCase("adamw", {"count": 4096}, checked={"count": 1024})],
}


def _op_jobs(
    part: str, cases: Sequence[OpCase], dtypes: Sequence[torch.dtype] = BFLOAT16
) -> Callable[[torch.device], dict[str, Job]]:
    def jobs(device: torch.device) -> dict[str, Job]:
        todo = [
            (case, direction, dtype)
            for case in (cases if device.type == "cuda" else TINY[part])
            for direction in case.directions
            for dtype in dtypes
        ]
        return {
            f"{case.op} {dict(case.sizes)} {direction} {dtype}": functools.partial(
                _compare, case, direction, dtype, device
            )
            for case, direction, dtype in todo
        }

    return jobs


def _compare(
    case: OpCase, direction: str, dtype: torch.dtype, device: torch.device, budget_s: float, emit: Emit
) -> None:  # fmt: skip
    for row in compare(
        case, direction, device, dtype, budget_s=budget_s, peers=peers, on_failure=record_failures(emit)
    ):
        emit(row)


# ---- the model

TINY_RUN = (
    preset("gpt2-tiny", n_layer=1, vocab_size=512),
    TrainConfig(batch=1, tokens=32, dtype=torch.bfloat16, warmup=0.0),
)
PADDED_VOCAB = 50304  # a multiple of 128, the usual padding for GPT-2


def _train_jobs(device: torch.device) -> dict[str, Job]:
    def job(budget_s: float, emit: Emit) -> None:
        if device.type == "cuda":
            config = preset("gpt2", vocab_size=PADDED_VOCAB)
            recipe = TrainConfig(batch=_batch(device), tokens=1024, dtype=torch.bfloat16, warmup=0.0)
        else:
            config, recipe = TINY_RUN
        names = ["peakgpt", "eager", "compile"] if device.type == "cuda" else ["peakgpt", "eager"]
        for row in compare_training(config, recipe, device, names, rounds=20, budget_s=budget_s,
                                    on_failure=record_failures(emit)):  # fmt: skip
            emit(row)

    return {"train": job}


def _large_jobs(device: torch.device) -> dict[str, Job]:
    """GPT-2 1558M, peakgpt only: the other contenders do not fit in the time."""

    def job(budget_s: float, emit: Emit) -> None:
        if device.type == "cuda":
            config = preset("gpt2-xl", vocab_size=PADDED_VOCAB)
            recipe = TrainConfig(batch=max(1, _batch(device) // 4), tokens=1024, dtype=torch.bfloat16, warmup=0.0)
        else:
            config, recipe = TINY_RUN
        for row in compare_training(config, recipe, device, ["peakgpt"], rounds=10, budget_s=budget_s,
                                    on_failure=record_failures(emit)):  # fmt: skip
            emit(row)

    return {"train 1558M": job}


def _fp8_jobs(device: torch.device) -> dict[str, Job]:
    def job(budget_s: float, emit: Emit) -> None:
        if device.type == "cuda":
            config = preset("gpt2", vocab_size=PADDED_VOCAB)
            recipe = TrainConfig(batch=max(1, _batch(device) // 2), tokens=1024, dtype=torch.bfloat16, lr=6e-4)
            steps = 50
        else:
            (config, recipe), steps = TINY_RUN, 3
        for row in compare_fp8(config, recipe, steps, device, budget_s=budget_s / 3):
            emit(row)

    return {"fp8": job}


def _batch(device: torch.device) -> int:
    """Return the largest power of two up to 32 of 1024-token sequences, at 2 GiB each (about eager's logits)."""
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return next(b for b in (32, 16, 8, 4, 2, 1) if 2 * b <= gib or b == 1)


# Model, streams, contenders. Compiled contenders run last, if time is left. 1558M is measured for peakgpt only.
DECODING = {
    "1558M, 1 stream": ("gpt2-xl", 1, ["peakgpt"]),
    "124M, 1 stream": ("gpt2", 1, ["peakgpt", "eager"]),
    "124M, 64 streams": ("gpt2", 64, ["peakgpt", "eager"]),
    "1558M, 64 streams": ("gpt2-xl", 64, ["peakgpt"]),
    "124M, 1 stream, compiled": ("gpt2", 1, ["peakgpt", "compile"]),
}


def _decode_jobs(device: torch.device) -> dict[str, Job]:
    full = device.type == "cuda"
    config_of = lambda name: preset(name) if full else TINY_RUN[0]  # noqa: E731

    def steps(name: str, streams: int, contenders: list[str], budget_s: float, emit: Emit) -> None:
        case = Workload(streams, 128, 128) if full else Workload(2, 8, 4)
        contenders = (
            contenders if full else ["peakgpt", "eager"]
        )  # compilation for a CPU takes longer than all other jobs
        for row in compare_steps(config_of(name), case, device, contenders, budget_s=budget_s,
                                 on_failure=record_failures(emit)):  # fmt: skip
            emit(row)

    def first_token(name: str, budget_s: float, emit: Emit) -> None:
        for row in compare_first_token(config_of(name), 1024 if full else 32, device, budget_s=budget_s):
            emit(row)

    jobs = {name: functools.partial(steps, *row) for name, row in DECODING.items()}
    first = {f"first token, {name}": functools.partial(first_token, name) for name in ("gpt2", "gpt2-xl")}
    *plain, compiled = jobs
    return {**{name: jobs[name] for name in plain}, **first, compiled: jobs[compiled]}


# Budgets sum to 465 s. Compiling takes most of check (Triton, two dtypes of every case), of train and of decode
# (torch.compile).
PARTS = {
    "check": Part(_check_jobs, budget_s=95, patience_s=40),
    "attention": Part(_op_jobs("attention", ATTENTION), budget_s=60, patience_s=40),
    "layernorm": Part(_op_jobs("layernorm", LAYERNORM), budget_s=30, patience_s=30),
    "mlp": Part(_op_jobs("mlp", MLP), budget_s=30, patience_s=30),
    "linear": Part(_op_jobs("linear", LINEAR), budget_s=15, patience_s=15),
    "loss": Part(_op_jobs("loss", LOSS), budget_s=25, patience_s=25),
    "adamw": Part(_op_jobs("adamw", ADAMW, (*FLOAT32, *BFLOAT16)), budget_s=15, patience_s=15),
    "train": Part(_train_jobs, budget_s=85, patience_s=85),
    "large": Part(_large_jobs, budget_s=30, patience_s=30),
    "fp8": Part(_fp8_jobs, budget_s=20, patience_s=20),
    "decode": Part(_decode_jobs, budget_s=60, patience_s=45),
}
