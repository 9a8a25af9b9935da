"""The parts of `bench device`: checks of every op against float64, and the cases of ops, training and decoding.

On a CPU the same parts have tiny sizes, as a dry run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from peakgpt.bench.case import Case, run_case
from peakgpt.bench.check import CASES, LARGE_CASES, check
from peakgpt.bench.contenders.contender import Workload
from peakgpt.bench.device_decode import FirstTokenCase, StepsCase
from peakgpt.bench.fp8 import Fp8Case
from peakgpt.bench.isolated_jobs import Job, Part
from peakgpt.bench.ops import OpCase
from peakgpt.bench.run_results import Emit
from peakgpt.bench.train import TrainCase
from peakgpt.engine.model.presets import preset
from peakgpt.engine.training.train_config import TrainConfig

DTYPES = ("float32", "bfloat16")
FORWARD, ONE_BY_ONE, WHOLE, REPLAYED = ("forward",), ("forward", "backward"), ("forward+backward",), ("replayed",)


def _passes(
    op: str, sizes: Sequence[dict[str, int]], passes: Sequence[str], dtypes: Sequence[str] = ("bfloat16",),
    **fields: Any,
) -> list[Case]:  # fmt: skip
    return [OpCase(op, direction, dtype, size, rounds=30, **fields)
            for size in sizes for direction in passes for dtype in dtypes]  # fmt: skip


# ---- ops

# 16k tokens at hidden size 2048, as in the literature; one query with 8k cached keys, larger than L2 together.
ATTENTION = [
    *_passes("attention", [{"batch": (1 << 14) // t, "tokens": t, "heads": 2048 // d, "head_dim": d}
                           for d in (64, 128) for t in (2048, 8192, 16384)], ONE_BY_ONE),
    *_passes("attention_qkv", [{"batch": 8, "tokens": 2048, "heads": 16, "head_dim": 128, **pairs}
                               for pairs in ({}, {"pairs": 16}, {"pairs": 64})], ONE_BY_ONE),
    *_passes("attention", [{"batch": b, "tokens": 1, "heads": 32, "head_dim": 128, "keys": 8192} for b in (8, 1)],
             FORWARD, params={"causal": False}),
    *_passes("attention_decode", [{"batch": b, "heads": 32, "head_dim": 128, "keys": 8192, "block": block}
                                  for b in (32, 8, 1) for block in (8192, 16)], FORWARD),
]  # fmt: skip
ROWS = 1 << 15  # tokens of a GPT-2 batch: 32 sequences of 1024
LAYERNORM = [
    *_passes("layernorm", [{"rows": ROWS, "width": c} for c in (768, 1024, 2048, 4096)], ONE_BY_ONE),
    *_passes("add_layernorm", [{"rows": ROWS, "width": 768}], ONE_BY_ONE),
    *_passes("rmsnorm", [{"rows": ROWS, "width": 2048}], ONE_BY_ONE),
]
MLP = _passes("mlp", [{"rows": ROWS, "width": c, "hidden": 4 * c} for c in (768, 1600)], ONE_BY_ONE)
# One and eight tokens through the linear layers of GPT-2 1558M, and through the head of 124M.
LINEAR = _passes(
    "linear",
    [
        {"rows": rows, "width": c, "out": f}
        for c, f in ((1600, 4800), (1600, 6400), (6400, 1600), (768, 50304))
        for rows in (1, 8)
    ],
    REPLAYED,
)
LOSS = [
    case
    for v, way in ((50304, "memory"), (131072, "memory"), (50304, "time"))
    for case in _passes("linear_cross_entropy", [{"rows": ROWS, "width": 768, "vocab": v}], WHOLE,
                        params={"prefer": way})
]  # fmt: skip
ADAMW = [
    *_passes("adamw", [{"count": 124_000_000}], FORWARD, DTYPES),
    *_passes("adamw", [{"count": 1_558_000_000}], FORWARD, DTYPES, checked={"count": 1 << 20}),
]

WITHOUT_COMPILE = ("peakgpt", "eager", "sdpa flash", "torch fused")  # compiling for a CPU takes longer than all jobs
TINY = {
    "attention": [
        *_passes("attention", [{"batch": 1, "tokens": 64, "heads": 2, "head_dim": 64}], ONE_BY_ONE),
        *_passes("attention_decode", [{"batch": 1, "heads": 2, "head_dim": 64, "keys": 64}], FORWARD),
    ],
    "layernorm": _passes("layernorm", [{"rows": 64, "width": 256}], ONE_BY_ONE),
    "mlp": _passes("mlp", [{"rows": 64, "width": 64, "hidden": 256}], ONE_BY_ONE),
    "linear": _passes("linear", [{"rows": 8, "width": 64, "out": 64}], REPLAYED),
    "loss": _passes("linear_cross_entropy", [{"rows": 64, "width": 64, "vocab": 512}], WHOLE),
    "adamw": _passes("adamw", [{"count": 4096}], FORWARD, DTYPES, checked={"count": 1024}),
}


# ---- the model

SMALL, LARGE = "gpt2", "gpt2-xl"  # 124M and 1558M parameters
PADDED_VOCAB = 50304  # a multiple of 128, the usual padding for GPT-2
TINY_RUN = (
    preset("gpt2-tiny", n_layer=1, vocab_size=512),
    TrainConfig(batch=1, tokens=32, dtype=torch.bfloat16, warmup=0.0),
)


def _recipe(device: torch.device, share: int = 1, **changes) -> TrainConfig:
    """Return the training of 1/share of the largest power of two up to 32 of 1024-token sequences that fit.

    A sequence takes 2 GiB (about eager's logits).
    """
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    batch = next(b for b in (32, 16, 8, 4, 2, 1) if 2 * b <= gib or b == 1)
    return TrainConfig(batch=max(1, batch // share), tokens=1024, dtype=torch.bfloat16, **changes)


def _train(device: torch.device) -> list[Case]:
    if device.type != "cuda":
        return [TrainCase("tiny", *TINY_RUN, only=WITHOUT_COMPILE, rounds=20)]
    return [TrainCase(SMALL, preset(SMALL, vocab_size=PADDED_VOCAB), _recipe(device, warmup=0.0), rounds=20)]


def _large(device: torch.device) -> list[Case]:
    """GPT-2 1558M, peakgpt only: the other contenders do not fit in the time."""
    if device.type != "cuda":
        return [TrainCase("tiny", *TINY_RUN, only=("peakgpt",))]
    recipe = _recipe(device, 4, warmup=0.0)
    return [TrainCase(LARGE, preset(LARGE, vocab_size=PADDED_VOCAB), recipe, only=("peakgpt",), rounds=10)]


def _fp8(device: torch.device) -> list[Case]:
    if device.type != "cuda":
        return [Fp8Case("tiny", *TINY_RUN, 3)]
    return [Fp8Case(SMALL, preset(SMALL, vocab_size=PADDED_VOCAB), _recipe(device, 2, lr=6e-4), 50, rounds=20)]


# Model, streams, contenders.
DECODING = [
    (LARGE, 1, ("peakgpt",)),
    (SMALL, 1, WITHOUT_COMPILE),
    (SMALL, 64, WITHOUT_COMPILE),
    (LARGE, 64, ("peakgpt",)),
]
COMPILED_DECODING = (SMALL, 1, ("peakgpt", "compile"))  # last, if time is left


def _decode(device: torch.device) -> list[Case]:
    full = device.type == "cuda"

    def steps(model: str, streams: int, names: tuple[str, ...]) -> Case:
        if not full:
            return StepsCase("tiny", TINY_RUN[0], Workload(2, 8, 4), only=WITHOUT_COMPILE)
        return StepsCase(model, preset(model), Workload(streams, 128, 128), only=names, rounds=20)

    first = [FirstTokenCase(name, preset(name) if full else TINY_RUN[0], 1024 if full else 32, rounds=20)
             for name in (SMALL, LARGE)]  # fmt: skip
    return [*(steps(*row) for row in DECODING), *first, steps(*COMPILED_DECODING)]


# ---- jobs


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


def _jobs_of(cases: Callable[[torch.device], Sequence[Case]]) -> Callable[[torch.device], dict[str, Job]]:
    return lambda device: {case.name: functools.partial(_measure, case, device) for case in cases(device)}


def _measure(case: Case, device: torch.device, budget_s: float, emit: Emit) -> None:
    run_case(dataclasses.replace(case, seconds=budget_s), device, emit)


def _op_jobs(part: str, cases: Sequence[Case]) -> Callable[[torch.device], dict[str, Job]]:
    tiny = [dataclasses.replace(case, only=WITHOUT_COMPILE) for case in TINY[part]]
    return _jobs_of(lambda device: cases if device.type == "cuda" else tiny)


# The budgets sum to 465 s. `check` spends most of its time compiling Triton kernels, two dtypes of every case. `train`
# and `decode` spend most of theirs in torch.compile.
PARTS = {
    "check": Part(_check_jobs, budget_s=95, patience_s=40),
    "attention": Part(_op_jobs("attention", ATTENTION), budget_s=60, patience_s=40),
    "layernorm": Part(_op_jobs("layernorm", LAYERNORM), budget_s=30, patience_s=30),
    "mlp": Part(_op_jobs("mlp", MLP), budget_s=30, patience_s=30),
    "linear": Part(_op_jobs("linear", LINEAR), budget_s=15, patience_s=15),
    "loss": Part(_op_jobs("loss", LOSS), budget_s=25, patience_s=25),
    "adamw": Part(_op_jobs("adamw", ADAMW), budget_s=15, patience_s=15),
    "train": Part(_jobs_of(_train), budget_s=85, patience_s=85),
    "large": Part(_jobs_of(_large), budget_s=30, patience_s=30),
    "fp8": Part(_jobs_of(_fp8), budget_s=20, patience_s=20),
    "decode": Part(_jobs_of(_decode), budget_s=60, patience_s=45),
}
