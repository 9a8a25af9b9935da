"""Decoding of `bench device`: steps of one new token per sequence, and the time to the first token of a prompt.

    bytes of a step = weights + past keys and values, each read once

Only decoding steps are timed, always the same steps after one prompt. Their bytes are compared with the bandwidth
measured in the same process. The compiled contender is plain torch as in gpt-fast: a preallocated KV cache and one
compiled step, replayed as a CUDA graph.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.bench.agreement import expect_close
from peakgpt.bench.case import Case, joined
from peakgpt.bench.contenders.contender import Contender, Workload
from peakgpt.bench.contenders.eager_gpt import EagerGPT
from peakgpt.bench.interleave import OnFailure, interleave
from peakgpt.bench.prefill import work_flops
from peakgpt.bench.schema import Result
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.block_pool import blocks_for
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.decoder import make_decoder
from peakgpt.engine.inference.executor import MIN_GRAPH_TOKENS, make_executor
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.hardware.peaks import Peak, peak_for

Step = Callable[[Tensor], Tensor]  # tokens (B,) -> logits (B, V)
Begin = Callable[[], Step]  # restores the state after the prompt


# ---- contenders: building one computes its prompt


def _ours(model: GPT, ids: Tensor, workload: Workload) -> Begin:
    max_tokens = workload.prompt + workload.tokens
    decoder = make_decoder(model, len(ids), max_tokens, max(workload.tokens, MIN_GRAPH_TOKENS))
    decoder.step(ids)

    def begin() -> Step:
        decoder.rewind(workload.prompt)
        return lambda token: decoder.step(token[:, None])

    return begin


def _eager(model: GPT, ids: Tensor, workload: Workload) -> Begin:
    plain, after = _plain(EagerGPT, model), [[] for _ in range(model.config.n_layer)]
    plain(ids, past=after)

    def begin() -> Step:
        past = [list(layer) for layer in after]
        return lambda token: plain(token[:, None], past=past)[:, -1]

    return begin


class FixedGPT(EagerGPT):
    """GPT-2 with static shapes and a preallocated `cache`, as a CUDA graph needs."""

    def allocate_cache(self, batch: int, cache_tokens: int) -> None:
        """Allocate keys and values, (L, 2, B, H, cache_tokens, D)."""
        c, weight = self.config, self.transformer["wte"].weight
        self.register_buffer("cache", weight.new_zeros(c.n_layer, 2, batch, c.n_head, cache_tokens, c.head_dim))

    def forward(self, token: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (B, V) of the last of the tokens (B, T) at positions (T,)."""
        t, heads = self.transformer, self.config.n_head
        x = t["wte"](token) + t["wpe"](positions)  # (B, T, C)
        cache_positions = torch.arange(self.cache.shape[4], device=positions.device)
        mask = cache_positions[None] <= positions[:, None]  # (T, cache_tokens)
        for layer, block in enumerate(t["h"]):
            qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            q, *new = (s.unflatten(-1, (heads, -1)).transpose(1, 2) for s in qkv)
            k, v = (cached.index_copy_(2, positions, part) for cached, part in zip(self.cache[layer], new, strict=True))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return F.linear(t["ln_f"](x)[:, -1], t["wte"].weight)


def _compiled(model: GPT, ids: Tensor, workload: Workload) -> Begin:
    plain = _plain(FixedGPT, model)
    plain.allocate_cache(len(ids), workload.prompt + workload.tokens)
    plain(ids, torch.arange(workload.prompt, device=ids.device))
    compiled = torch.compile(plain, mode="reduce-overhead", fullgraph=True)

    def begin() -> Step:
        position = torch.full((1,), workload.prompt - 1, device=ids.device)
        return lambda token: compiled(token[:, None], position.add_(1)).clone()

    return begin


def _plain(model_class: type[EagerGPT], model: GPT) -> EagerGPT:
    """Return a plain torch model that shares the weights of `model`."""
    with torch.device("meta"):
        plain = model_class(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain.eval()


# build(model, ids (streams, prompt), workload) -> Begin
DEVICE_DECODING_CONTENDERS = {
    "peakgpt": Contender(_ours, package="peakgpt"),
    "eager": Contender(_eager),
    "compile": Contender(_compiled),
}


# ---- timing


@dataclass(frozen=True)
class StepsCase(Case):
    """workload.tokens steps after a prompt in bfloat16. The first logits of each contender are checked.

    Args:
        model: name of the model, for the name of the case.
        config: a GPT-2 architecture.
        workload: streams, prompt and new tokens.
    """

    kind: ClassVar[str] = "decode"
    model: str
    config: GPTConfig
    workload: Workload

    @property
    def name(self) -> str:
        return joined(self.kind, "steps", self.model, str(self.workload))

    def all_contenders(self, device: torch.device) -> list[str]:
        return list(DEVICE_DECODING_CONTENDERS)

    @torch.no_grad()
    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        start, config, workload = time.perf_counter(), self.config, self.workload
        model = _random_model(config, device)
        ids = torch.randint(config.vocab_size, (workload.streams, workload.prompt), device=device)
        expected, contenders = _eager(model, ids, workload)()(ids[:, 0]), {}
        for name in self.contenders(device):
            try:
                begin = DEVICE_DECODING_CONTENDERS[name].build(model, ids, workload)
                expect_close(f"decode: {name}", [begin()(ids[:, 0])], [expected], torch.bfloat16)
                contenders[name] = lambda begin=begin: _greedy(begin(), ids[:, 0], workload.tokens)
            except Exception as error:  # a failing compiler must not prevent the timing of the others
                on_failure(name, error)
        if not contenders:
            return []
        with _report_missing_graph(on_failure):
            timings = interleave(contenders, rounds=self.rounds, warmup=1, device=device, budget_s=self.left_s(start),
                                 on_failure=on_failure)  # fmt: skip
        peak = peak_for(device, torch.bfloat16)
        return [
            Result.of(
                timing, bench="decode", contender=name, backend="auto" if name == "peakgpt" else "torch",
                device=str(device), dtype="bfloat16",
                case={"n_layer": config.n_layer, "n_embd": config.n_embd, "prompt": workload.prompt,
                      "tokens": workload.tokens, "batch": workload.streams, "timed": "steps"},
                bytes=_steps_bytes(model, workload), peak_bytes_s=peak.measured_bandwidth_bytes_s,
                peak_source=_peak_source(peak),
            )
            for name, timing in timings.items()
        ]  # fmt: skip


def _steps_bytes(model: GPT, workload: Workload) -> float:
    """Return the bytes of the weights and of the past keys and values, each read once a step."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    cached = 2 * c.n_layer * c.n_kv_head * c.head_dim * (workload.prompt + (workload.tokens + 1) / 2) * workload.streams
    return workload.tokens * (weights + cached) * 2


@contextlib.contextmanager
def _report_missing_graph(on_failure: OnFailure) -> Iterator[None]:
    """Report a step that could not be captured as a failure: its time is not that of a CUDA graph."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if "uncaptured" in str(warning.message):
            on_failure("peakgpt", warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _greedy(step: Step, token: Tensor, count: int) -> Tensor:
    for _ in range(count):
        token = step(token).argmax(-1)
    return token


@dataclass(frozen=True)
class FirstTokenCase(Case):
    """Prefill by peakgpt and eager in bfloat16, until the first token is on the host. Their logits are compared.

    Args:
        model: name of the model, for the name of the case.
        config: a GPT-2 architecture.
        tokens: of the prompt.
    """

    kind: ClassVar[str] = "prefill"
    model: str
    config: GPTConfig
    tokens: int

    @property
    def name(self) -> str:
        return joined(self.kind, "first-token", self.model, str(self.tokens))

    def all_contenders(self, device: torch.device) -> list[str]:
        return ["peakgpt", "eager"]

    @torch.no_grad()
    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        """
        Raises:
            ValueError: the logits of peakgpt differ from those of eager.
        """
        start, config, tokens = time.perf_counter(), self.config, self.tokens
        model, ids = _random_model(config, device), torch.randint(config.vocab_size, (1, tokens), device=device)
        blocks, eager = range(blocks_for(tokens)), _plain(EagerGPT, model)
        executor, host = make_executor(model, len(blocks)), ids[0].tolist()
        logits = {
            "peakgpt": lambda: executor.step([Chunk(host, 0, blocks)]),
            "eager": lambda: eager(ids, past=[[] for _ in range(config.n_layer)])[:, -1],
        }
        expect_close("first token: peakgpt", [logits["peakgpt"]()], [logits["eager"]()], torch.bfloat16)
        contenders = {name: lambda run=logits[name]: int(run().argmax()) for name in self.contenders(device)}
        timings = interleave(contenders, rounds=self.rounds, warmup=1, device=device, budget_s=self.left_s(start),
                             on_failure=on_failure)  # fmt: skip
        peak = peak_for(device, torch.bfloat16)
        return [
            Result.of(
                timing, bench="prefill", contender=name, backend="auto" if name == "peakgpt" else "torch",
                device=str(device), dtype="bfloat16",
                case={"n_layer": config.n_layer, "n_embd": config.n_embd, "tokens": tokens, "batch": 1},
                flops=work_flops(config, tokens), flops_kind="work", peak_flops_s=peak.flops_s, peak_source=peak.source,
            )
            for name, timing in timings.items()
        ]  # fmt: skip


def _random_model(config: GPTConfig, device: torch.device) -> GPT:
    """Initialize on the device: 1558M weights on a CPU would take longer than the benchmark."""
    with torch.device(device):
        return GPT(config).to(torch.bfloat16).eval()


def _peak_source(peak: Peak) -> str:
    return f"bandwidth measured in this process; {peak.source} has {peak.bandwidth_bytes_s / 1e9:.0f} GB/s"
