"""Greedy decoding with a KV cache versus plain PyTorch and other engines: `peakgpt bench decode`.

On a CPU each contender has a process of its own, and weights of several formats are compared in one interleaved run.
One step decodes all streams from the prompt to the end, prefill included. `bytes`, for MBU, count the weights and
the KV cache, read once for each new token of all streams together.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peakgpt.bench.agreement import expect_close
from peakgpt.bench.contenders.contender import SEED, WEIGHT_FORMATS, Workload
from peakgpt.bench.contenders.decoding import DECODING_CONTENDERS, eager_decoder
from peakgpt.bench.contenders.eager_gpt import EagerGPT
from peakgpt.bench.contenders.time_contenders import time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess
from peakgpt.bench.interleave import OnFailure, interleave, raise_failure
from peakgpt.bench.run_results import Emit, record_failures
from peakgpt.bench.schema import Result
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.presets import preset
from peakgpt.kernels.command_line import integer, refuse_ignored
from peakgpt.kernels.hardware.peaks import peak_for

MIN_EQUAL_TOKENS = 4  # first tokens, in float32; later, rounding may decide between two almost equally likely tokens
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4.5}  # per weight; int4: a 16-bit scale for each 32 weights
HEAD_BITS = {**BITS, "int4": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--prompt", type=integer(), default=32, help="prompt tokens (default 32)")
    parser.add_argument("--tokens", type=integer(), default=64, help="tokens to add (default 64)")
    parser.add_argument("--streams", type=integer(), action="append", help="on the CPU; repeatable; default 1 and 8")
    parser.add_argument("--contenders", nargs="+", choices=tuple(DECODING_CONTENDERS), help="on the CPU; default: all")
    parser.add_argument("--rounds", type=integer(), help="timings of each contender, on the CPU (default 7)")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=WEIGHT_FORMATS,
        help="weight format; repeatable; default: float32 and bfloat16, on the CPU also int8 and int4",
    )


def run(args: argparse.Namespace, device: torch.device, emit: Emit) -> None:
    """
    Raises:
        ValueError: int8 or int4 weights, or a flag of the CPU's benchmark, on a GPU.
    """
    if device.type == "cpu":
        for streams in args.streams or (1, 8):
            for row in compare_streams(
                preset(args.model), Workload(streams, args.prompt, args.tokens), args.dtype or WEIGHT_FORMATS,
                args.contenders, rounds=args.rounds or 7, on_failure=record_failures(emit),
            ):  # fmt: skip
                emit(row)
        return
    refuse_ignored(args, ("streams", "contenders", "rounds"), f"on {device}, expected it on the CPU only")
    for dtype_name in args.dtype or ("float32", "bfloat16"):
        if (dtype := getattr(torch, dtype_name, None)) not in (torch.float32, torch.bfloat16):
            raise ValueError(f"bench decode: got --dtype {dtype_name} on {device}, expected float32 or bfloat16")
        model = GPT.from_preset(args.model).to(device, dtype).eval()
        ids = torch.randint(model.config.vocab_size, (1, args.prompt), device=device)
        for row in compare_decoding(model, ids, count=args.tokens):
            emit(row)


def compare_decoding(model: GPT, ids: Tensor, *, count: int, rounds: int = 5, budget_s: float = 20.0) -> list[Result]:
    """Time greedy decoding of `count` tokens by peakgpt and eager, after checking the logits of the prompt.

    Args:
        model: in the dtype to decode in.
        ids: (B, T) prompt.
        count: tokens to add.
        rounds, budget_s: see `interleave`.
    Returns:
        Results; bytes are the weights and the cache, read once per token.
    Raises:
        ValueError: the logits of peakgpt are wrong; see `expect_close`.
    """
    weight = next(model.parameters())
    eager = EagerGPT(model.config).to(weight.device, weight.dtype)
    eager.load_state_dict(model.state_dict())
    count = min(count, model.config.block_size - ids.shape[1])
    was_training, _ = model.training, model.eval()
    with torch.no_grad():
        truth = lambda: [copy.deepcopy(eager).double()(ids)]  # noqa: E731
        expect_close("decode: peakgpt", [model(ids)], [eager(ids)], weight.dtype, truth)
    contenders = {
        "peakgpt": lambda: model.generate(ids, max_new_tokens=count),
        "eager": lambda: eager.generate(ids, count),
    }
    timings = interleave(contenders, rounds=rounds, warmup=1, device=weight.device, budget_s=budget_s)
    model.train(was_training)
    c, peak = model.config, peak_for(weight.device, weight.dtype)
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    cached = 2 * c.n_layer * c.n_kv_head * c.head_dim * (ids.shape[1] + count / 2) * ids.shape[0]
    return [
        Result.of(
            timing, bench="decode", contender=name, backend="auto" if name == "peakgpt" else "torch",
            device=str(weight.device), dtype=str(weight.dtype).removeprefix("torch."),
            case={"n_layer": c.n_layer, "n_embd": c.n_embd, "prompt": ids.shape[1], "tokens": count,
                  "batch": ids.shape[0]},
            bytes=count * (weights + cached) * weight.element_size(), peak_bytes_s=peak.bandwidth_bytes_s,
            peak_source=peak.source,
        )
        for name, timing in timings.items()
    ]  # fmt: skip


# ---- on a CPU


def compare_streams(
    config: GPTConfig,
    workload: Workload,
    formats: Sequence[str] = WEIGHT_FORMATS,
    names: Sequence[str] | None = None,
    *,
    rounds: int = 7,
    on_failure: OnFailure = raise_failure,
) -> list[Result]:
    """Time decoding on the CPU, after checking that each contender's first tokens are those of eager in float32.

    Args:
        config: the model.
        workload: streams, prompt and new tokens.
        formats: weight formats; a contender is timed once in each format that it supports.
        names: keys of DECODING_CONTENDERS; None means all.
        rounds: see `interleave`.
        on_failure: called with a contender that is not installed, ends, or decodes different tokens.
    Returns:
        A result for each contender and format; its dtype is the format.
    """
    state, ids = decoding_inputs(config, workload)
    expected, agreement = eager_decoder(state, config, ids, workload, "float32")(), {}
    request = {"make": f"{__name__}:decode_step", "threads": torch.get_num_threads(),
               "config": dataclasses.asdict(config), "workload": dataclasses.asdict(workload)}  # fmt: skip
    chosen = {
        f"{name} {weights}": (name, weights)
        for weights in formats
        for name in names or DECODING_CONTENDERS
        if weights in DECODING_CONTENDERS[name].formats
    }

    def start(key: str, output: Path) -> WorkerProcess:
        name, weights = chosen[key]
        DECODING_CONTENDERS[name].expect_installed()
        return WorkerProcess(key, {**request, "contender": name, "weights": weights, "output": str(output)}, {})

    def expect_correct(key: str, outputs: Mapping[str, Tensor]) -> None:
        name, weights = chosen[key]
        agreement[key] = _expect_equal_start(name, outputs[key], expected, weights)

    with tempfile.TemporaryDirectory() as folder:
        measured = time_contenders(
            ((key, partial(start, key, Path(folder, f"{key}.pt"))) for key in chosen),
            lambda key, worker: (worker.step(), torch.load(Path(folder, f"{key}.pt")))[1],
            expect_correct, rounds=rounds, on_failure=on_failure,
        )  # fmt: skip
    peak = peak_for("cpu", torch.float32)
    return [
        Result.of(
            m.timing.noted(agreement[key], contender.version), bench="decode", contender=name,
            backend=contender.backend,
            device="cpu", dtype=weights,
            case={"n_layer": config.n_layer, "n_embd": config.n_embd, "prompt": workload.prompt,
                  "tokens": workload.tokens, "batch": workload.streams},
            bytes=read_bytes(config, workload, weights), peak_bytes_s=peak.bandwidth_bytes_s, peak_source=peak.source,
        )
        for key, m in measured.items() for name, weights in [chosen[key]] for contender in [DECODING_CONTENDERS[name]]
    ]  # fmt: skip


def read_bytes(config: GPTConfig, workload: Workload, weights: str) -> float:
    """Return the bytes of the weights and of the past keys and values of all streams, read once per new token."""
    with torch.device("meta"):
        model = GPT(config)
    bits = {"wpe": 0, "wte": HEAD_BITS[weights]}  # one row of the position embedding is read: negligible
    weight_bytes = sum(
        p.numel() * next((b for part, b in bits.items() if part in name), BITS[weights]) / 8
        for name, p in model.named_parameters()
    )
    cached = (
        2
        * config.n_layer
        * config.n_kv_head
        * config.head_dim
        * (workload.prompt + workload.tokens / 2)
        * workload.streams
    )
    return workload.tokens * (weight_bytes + cached * (4 if weights == "float32" else 2))


def decoding_inputs(config: GPTConfig, workload: Workload) -> tuple[dict[str, Tensor], Tensor]:
    """Return (state dict, prompts (streams, prompt) int64), the same in each process.

    The position embedding is 20 times that of GPT-2's initialization; otherwise the tied head repeats one token.
    """
    torch.manual_seed(SEED)
    state = GPT(config).state_dict()
    state["transformer.wpe.weight"] *= 20
    return state, torch.randint(config.vocab_size, (workload.streams, workload.prompt))


def _expect_equal_start(name: str, tokens: Tensor, expected: Tensor, weights: str) -> str:
    """Return a note on the number of first tokens that are equal.

    Raises:
        ValueError: too few are equal in float32, or the shapes differ.
    """
    if tokens.shape != expected.shape:
        raise ValueError(f"decode: {name}: tokens have shape {tuple(tokens.shape)}, expected {tuple(expected.shape)}")
    same = int((tokens == expected).long().cumprod(1).sum(1).min())
    if weights == "float32" and same < min(MIN_EQUAL_TOKENS, expected.shape[1]):
        raise ValueError(
            f"decode: {name}: only the first {same} tokens equal those of eager, expected at least {MIN_EQUAL_TOKENS}"
        )
    return f"{name}, {weights}: at least {same} of {expected.shape[1]} tokens equal those of eager in float32"


def decode_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """Return the step of a contender: `make` of a worker process.

    Args:
        request: contender, config, workload, weights, output (file for the tokens of the first run).
    Returns:
        A function that decodes all streams and returns one token.
    """
    config, workload = GPTConfig(**request["config"]), Workload(**request["workload"])
    state, ids = decoding_inputs(config, workload)
    decode = DECODING_CONTENDERS[request["contender"]].build(state, config, ids, workload, request["weights"])
    torch.save(decode(), request["output"])
    return lambda: float(decode()[0, -1])
