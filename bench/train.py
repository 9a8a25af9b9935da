"""A GPT-2 training step, forward, backward and AdamW, beside PyTorch: `peakgpt bench train`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools

import torch

from peakgpt.bench.contenders import CONTENDERS, random_batch
from peakgpt.bench.worker import Worker
from peakgpt.engine.config import GPTConfig
from peakgpt.engine.flops import training_flops
from peakgpt.engine.presets import preset
from peakgpt.engine.train import Recipe
from peakgpt.kernels.clock import Result, Timing, interleave
from peakgpt.kernels.device import peak_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="context length (default 256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="repeatable; default both")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="default: all that the device has")
    parser.add_argument("--rounds", type=int, default=9)


def run(args: argparse.Namespace, device: torch.device) -> list[Result]:
    recipes = [
        Recipe(batch=args.batch, tokens=args.tokens, dtype=getattr(torch, d))
        for d in args.dtype or ("float32", "bfloat16")
    ]
    config = preset(args.model)
    time = _in_processes if device.type == "cpu" else _in_one_process
    return list(itertools.chain(*(time(args, config, recipe, device) for recipe in recipes)))


def _in_processes(args, config: GPTConfig, recipe: Recipe, device: torch.device) -> list[Result]:
    """On CPU each contender has its own process, since the allocator's settings are a process's."""
    names = args.contenders or list(CONTENDERS)
    request = {
        "config": dataclasses.asdict(config), "batch": recipe.batch, "tokens": recipe.tokens,
        "dtype": str(recipe.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
    }  # fmt: skip
    workers = {n: Worker({**request, "contender": n}, CONTENDERS[n].environment) for n in names}
    try:
        pids = [w.process.pid for w in workers.values()]
        timings = interleave({n: w.step for n, w in workers.items()}, rounds=args.rounds, warmup=3, workers=pids)
        return [_result(config, recipe, device, n, t, workers[n].last) for n, t in timings.items()]
    finally:
        for worker in workers.values():
            worker.close()


def _in_one_process(args, config: GPTConfig, recipe: Recipe, device: torch.device) -> list[Result]:
    names = args.contenders or [n for n, c in CONTENDERS.items() if not c.environment]
    batch = random_batch(config, recipe, device)
    trainers = {n: CONTENDERS[n].build(config, recipe, device) for n in names}
    timings = interleave({n: lambda t=t: t.step(*batch) for n, t in trainers.items()}, rounds=args.rounds, warmup=3,
                         device=device)  # fmt: skip
    return [_result(config, recipe, device, n, t, {}) for n, t in timings.items()]


def _result(config, recipe, device, name: str, timing: Timing, extra: dict) -> Result:
    dtype = str(recipe.dtype).removeprefix("torch.")
    peak = peak_for(device, recipe.dtype)
    case = {"batch": recipe.batch, "tokens": recipe.tokens, "n_layer": config.n_layer, "n_embd": config.n_embd}
    said = [timing.note] + [f"{name}, {dtype}: {extra[k] / s:.2f} {text}" for k, s, text in
                            (("peak_bytes", 2**30, "GiB at most"), ("faults", 1, "page faults in the last step"))
                            if k in extra]  # fmt: skip
    return Result.of(
        dataclasses.replace(timing, note="; ".join(filter(None, said))), bench="train", case=case, contender=name,
        backend="auto" if name == "peakgpt" else "torch", device=str(device), dtype=dtype,
        flops=training_flops(config, recipe.tokens) * recipe.batch * recipe.tokens, flops_kind="model",
        peak_flops_s=peak.flops_s, peak_source=peak.source,
    )  # fmt: skip
