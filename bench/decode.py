"""Greedy decoding with a cache beside plain PyTorch, from the same weights, in the same run; on the CPU also with
weights of 8 and 4 bits and beside other engines, each in a process of its own (bench/streams.py).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from peakgpt.bench.decoders import CONTENDERS, FORMS, Case
from peakgpt.bench.eager_gpt import EagerGPT
from peakgpt.bench.findings import Failure, Findings
from peakgpt.bench.ops import agree
from peakgpt.bench.streams import compare_streams
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.presets import preset
from peakgpt.kernels.hardware.clock import Result, interleave
from peakgpt.kernels.hardware.device import peak_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens (default 32)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add (default 64)")
    parser.add_argument("--streams", type=int, action="append", help="repeatable; default 1 and 8, on the CPU")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="on the CPU; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="on the CPU (default 7)")
    parser.add_argument("--dtype", action="append", choices=FORMS,
                        help="of the weights; repeatable; default: float32 and bfloat16, on the CPU also int8 and int4")


def run(args: argparse.Namespace, device: torch.device) -> Findings:
    """
    Raises:
        ValueError: small weights on another device than the CPU.
    """
    found = Findings()
    if device.type == "cpu":
        tell = lambda name, error: found.add(Failure.of(error, name))  # noqa: E731
        for streams in args.streams or (1, 8):
            found.results += compare_streams(
                preset(args.model), Case(streams, args.prompt, args.tokens), args.dtype or FORMS, args.contenders,
                rounds=args.rounds, on_failure=tell,
            )  # fmt: skip
        return found
    for form in args.dtype or ("float32", "bfloat16"):
        if (dtype := getattr(torch, form, None)) not in (torch.float32, torch.bfloat16):
            raise ValueError(f"bench decode: got --dtype {form} on {device}, expected float32 or bfloat16 there")
        model = GPT.from_preset(args.model).to(device, dtype).eval()
        ids = torch.randint(model.config.vocab_size, (1, args.prompt), device=device)
        found.results += compare_decoding(model, ids, count=args.tokens)
    return found


def compare_decoding(model: GPT, ids: Tensor, *, count: int, rounds: int = 5, budget_s: float = 20.0) -> list[Result]:
    """Time `count` greedy tokens after a prompt, ours and eager's, once the prompt's logits agree.

    Args:
        model: in the dtype to decode in.
        ids: (B, T) prompt.
        count: tokens to add.
        rounds, budget_s: see clock.interleave.
    Returns:
        Results whose bytes are the weights and cache read once a token.
    Raises:
        ValueError: our logits are not eager's.
    """
    weight = next(model.parameters())
    eager = EagerGPT(model.config).to(weight.device, weight.dtype)
    eager.load_state_dict(model.state_dict())
    count = min(count, model.config.block_size - ids.shape[1])
    was, _ = model.training, model.eval()
    with torch.no_grad():
        agree("decode: peakgpt", [model(ids)], [eager(ids)], weight.dtype)
    contenders = {
        "peakgpt": lambda: model.generate(ids, max_new_tokens=count),
        "eager": lambda: eager.generate(ids, count),
    }
    timings = interleave(contenders, rounds=rounds, warmup=1, device=weight.device, budget_s=budget_s)
    model.train(was)
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
