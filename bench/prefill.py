"""A prompt up to its first token's logits, beside plain torch and other engines: `peakgpt bench prefill`.

Every contender runs the same random weights in a process of its own, keeps the prompt's keys and values, and computes
logits at the last position only:

    work FLOPs = T (2 N + 4 L H D (T + 1) / 2) - (T - 1) 2 (C V + H D C + 2 C F)

The last position needs the last block's keys and values of the whole prompt, but what follows its attention only once.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.bench.contenders import SEED, TUNED_MALLOC
from peakgpt.bench.eager_gpt import EagerGPT
from peakgpt.bench.findings import Failure, Findings
from peakgpt.bench.graphs import openvino_request
from peakgpt.bench.models import Contender, ctranslate2_generator, ctranslate2_prompts, our_model, transformers_model
from peakgpt.bench.ops import OnFailure, agree, raise_it
from peakgpt.bench.steppers import measure
from peakgpt.bench.worker import Worker
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.block_pool import blocks_for
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import forward_flops
from peakgpt.engine.model.presets import preset
from peakgpt.kernels.hardware.clock import Result
from peakgpt.kernels.hardware.device import peak_for

Keep = Callable[[int, Tensor, Tensor], None]  # layer, keys and values (B, H, T, D)
Prefill = Callable[[], Tensor]  # -> (1, V) logits at the last position
DTYPES = ("float32", "bfloat16", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--tokens", type=int, default=512, help="prompt tokens (default 512)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of the weights; repeatable; default: all")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="default: all")
    parser.add_argument("--rounds", type=int, default=15)


def run(args: argparse.Namespace, device: torch.device) -> Findings:
    """
    Raises:
        ValueError: another device than the CPU.
    """
    if device.type != "cpu":
        raise ValueError(f"bench prefill compares processes on the CPU, got device {device}: expected --device cpu")
    found, config = Findings(), preset(args.model)
    for dtype in args.dtype or DTYPES:
        tell = lambda name, error: found.add(Failure.of(error, name))  # noqa: E731
        found.results += compare_prefill(config, args.tokens, getattr(torch, dtype), args.contenders,
                                         rounds=args.rounds, on_failure=tell)  # fmt: skip
    return found


def compare_prefill(
    config: GPTConfig,
    tokens: int,
    dtype: torch.dtype,
    names: Sequence[str] | None = None,
    *,
    rounds: int = 15,
    on_failure: OnFailure = raise_it,
) -> list[Result]:
    """Time a prompt of one sequence, once each contender's logits are eager's in float32.

    Args:
        config: the model.
        tokens: of the prompt.
        dtype: to compute in; torch.int8: weights of 8 bits, each engine's own.
        names: of CONTENDERS; None means all.
        rounds: see clock.interleave.
        on_failure: told of a contender that is not installed, ends, or has other logits; the others are timed.
    Returns:
        A result a contender, with work FLOPs.
    """
    reference = reference_logits(config, tokens)
    request = {"make": f"{__name__}:prefill_step", "threads": torch.get_num_threads(),
               "config": dataclasses.asdict(config), "tokens": tokens, "dtype": _name(dtype)}  # fmt: skip
    limit = dtype if dtype.is_floating_point else torch.bfloat16  # whose error 8 bits must not exceed
    asked = [n for n in names or CONTENDERS if _name(dtype) in CONTENDERS[n].forms]

    def begin(name: str, logits: Path) -> Worker:
        CONTENDERS[name].expect_installed()
        return Worker(name, {**request, "contender": name, "logits": str(logits)}, CONTENDERS[name].environment)

    with tempfile.TemporaryDirectory() as folder:
        measured = measure(
            ((name, partial(begin, name, Path(folder, f"{name}.pt"))) for name in asked),
            lambda name, worker: (worker.step(), torch.load(Path(folder, f"{name}.pt")))[1],
            lambda name, logits: agree(f"prefill: {name}", [logits[name]], [reference], limit),
            rounds=rounds, warmup=2, on_failure=on_failure,
        )  # fmt: skip
    peak = peak_for("cpu", dtype)
    case = {"tokens": tokens, "n_layer": config.n_layer, "n_embd": config.n_embd}
    return [
        Result.of(
            found.timing.noted(found.note, who.version), bench="prefill", case=case, contender=n, backend=who.backend,
            device="cpu", dtype=_name(dtype), flops=work_flops(config, tokens), flops_kind="work",
            memory_bytes=found.memory_bytes, base_bytes=found.base_bytes,
            peak_flops_s=peak.flops_s, peak_source=peak.source,
        )
        for n, found in measured.items() for who in [CONTENDERS[n]]
    ]  # fmt: skip


def work_flops(config: GPTConfig, tokens: int) -> float:
    """What a prompt must compute: causal attention half, the head and the end of the last block at one position."""
    c = config
    once = 2.0 * c.n_embd * (c.vocab_size + c.n_head * c.head_dim + 2 * c.n_inner)
    return tokens * forward_flops(c, tokens, causal=True) - (tokens - 1) * once


def start(config: GPTConfig, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    """(initial weights, (1, T) int64 prompt), the same in each process."""
    torch.manual_seed(SEED)
    return GPT(config).state_dict(), torch.randint(config.vocab_size, (1, tokens))


def reference_logits(config: GPTConfig, tokens: int) -> Tensor:
    """(1, V), by eager in float32."""
    state, ids = start(config, tokens)
    model = EagerGPT(config)
    model.load_state_dict(state, assign=True)
    with torch.inference_mode():
        return model(ids)[:, -1]


def prefill_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """A contender's prefill, for a worker.

    Args:
        request: contender, config, tokens, dtype, logits (the file into which the first ones are written).
    Returns:
        A function that runs the prompt and returns one logit.
    """
    config = GPTConfig(**request["config"])
    state, ids = start(config, request["tokens"])
    prefill = CONTENDERS[request["contender"]].build(state, config, ids, getattr(torch, request["dtype"]))
    torch.save(prefill().clone(), request["logits"])
    return lambda: float(prefill()[0, 0])


# ---- contenders: each makes a Prefill of a state, which it may take the tensors of


def _ours(state: Mapping[str, Tensor], config: GPTConfig, ids: Tensor, dtype: torch.dtype) -> Prefill:
    from peakgpt.engine.inference.program_executor import (
        ProgramExecutor,  # needs the C++ extension, which nothing else here does
    )

    blocks = range(blocks_for(ids.shape[1]))
    executor, chunk = ProgramExecutor(our_model(state, config, _name(dtype)), len(blocks)), Chunk(ids[0], 0, blocks)
    return lambda: executor.step([chunk])


class PromptGPT(EagerGPT):
    """GPT-2 in plain torch for a prompt from its start: logits at the last position; `keep` gets keys and values."""

    def forward(self, ids: Tensor, keep: Keep) -> Tensor:
        t = self.transformer
        x = t["wte"](ids) + t["wpe"](torch.arange(ids.shape[1]))  # (B, T, C)
        for layer, block in enumerate(t["h"]):
            qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            q, k, v = (s.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2) for s in qkv)
            keep(layer, k, v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return F.linear(t["ln_f"](x)[:, -1], t["wte"].weight)


def _static_cache(compiled: bool, state, config: GPTConfig, ids: Tensor, dtype: torch.dtype) -> Prefill:
    """Plain torch as a good user writes it: keys and values go into one tensor that was there before."""
    model = _loaded(PromptGPT(config), state, dtype)
    cache = torch.zeros(config.n_layer, 2, len(ids), config.n_head, config.block_size, config.head_dim, dtype=dtype)

    def keep(layer: int, k: Tensor, v: Tensor) -> None:
        cache[layer, 0, :, :, : k.shape[2]] = k
        cache[layer, 1, :, :, : v.shape[2]] = v

    run = torch.compile(model) if compiled else model
    return torch.inference_mode()(lambda: run(ids, keep))


def _eager(*args) -> Prefill:
    return _static_cache(False, *args)


def _compiled(*args) -> Prefill:
    return _static_cache(True, *args)


def _transformers(state, config: GPTConfig, ids: Tensor, dtype: torch.dtype) -> Prefill:
    model = transformers_model(state, config, dtype)
    return torch.inference_mode()(lambda: model(ids, use_cache=True, logits_to_keep=1).logits[:, -1])


def _ctranslate2(state, config: GPTConfig, ids: Tensor, dtype: torch.dtype) -> Prefill:
    """One generated token: its own way to logits of the last position only."""
    generator, prompts = ctranslate2_generator(state, config, _name(dtype)), ctranslate2_prompts(ids)
    options = {"max_length": 1, "sampling_topk": 1, "include_prompt_in_result": False, "return_logits_vocab": True}

    def run() -> Tensor:
        (found,) = generator.generate_batch(prompts, **options)
        return torch.from_numpy(np.array(found.logits[0][0])).view(1, -1)

    return run


class _WithCache(nn.Module):
    """What a graph can express: the cache as results."""

    def __init__(self, model: PromptGPT):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        cache: list[Tensor] = []
        return self.model(ids, lambda layer, k, v: cache.extend((k, v))), *cache


def _openvino(state, config: GPTConfig, ids: Tensor, dtype: torch.dtype) -> Prefill:
    """OpenVINO on the graph of plain torch: its own SDPA, its latency setting; see openvino_request."""
    import openvino

    model = _WithCache(_loaded(PromptGPT(config), state, torch.float32))
    with torch.no_grad():
        graph = openvino.convert_model(torch.export.export(model, (ids,)))
    request, prompt = openvino_request(graph, _name(dtype)), ids.numpy()
    return lambda: torch.from_numpy(request.infer({0: prompt}, share_inputs=True, share_outputs=True)[0])


def _loaded(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    model.load_state_dict(state, assign=True)
    return model.to(dtype).eval()


TUNED = {"GLIBC_TUNABLES": TUNED_MALLOC}
CONTENDERS = {
    "peakgpt": Contender(partial(_ours), forms=("float32", "bfloat16", "int8")),
    "peakgpt, tuned malloc": Contender(partial(_ours), TUNED),
    "eager": Contender(_eager),
    "eager, tuned malloc": Contender(_eager, TUNED),
    "compile": Contender(_compiled),
    "compile, tuned malloc": Contender(_compiled, TUNED),
    "transformers": Contender(_transformers, package="transformers"),
    "openvino": Contender(_openvino, package="openvino", forms=DTYPES),
    "ctranslate2": Contender(_ctranslate2, package="ctranslate2", forms=("float32", "int8")),
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
