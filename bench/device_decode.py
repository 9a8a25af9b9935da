"""Decoding on a device: steps of one new token a text, and the time to a prompt's first token.

    bytes of a step = weights + keys and values of the texts so far, each read once

Steps are timed alone, the same ones again and again behind a prompt, so that what they read is the share of the
bandwidth measured in the same process. The compiled contender is plain torch as gpt-fast has it: keys and values in
place, one step compiled, replayed as a graph.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.bench.decoders import Case
from peakgpt.bench.eager_gpt import EagerGPT
from peakgpt.bench.ops import OnFailure, agree, raise_it
from peakgpt.bench.prefill import work_flops
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.block_pool import blocks_for
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.decoder import make_decoder
from peakgpt.engine.inference.executor import MIN_PACKED_TOKENS, make_executor
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.hardware.clock import Result, interleave
from peakgpt.kernels.hardware.device import Peak, peak_for

Step = Callable[[Tensor], Tensor]  # tokens (B,) -> logits (B, V)
Begin = Callable[[], Step]  # from behind the prompt, again
ROUNDS = 20


# ---- contenders: each runs the prompt


def _ours(model: GPT, ids: Tensor, case: Case) -> Begin:
    decoder = make_decoder(model, len(ids), case.prompt + case.tokens, max(case.tokens, MIN_PACKED_TOKENS))
    decoder.step(ids)

    def begin() -> Step:
        decoder.rewind(case.prompt)
        return lambda token: decoder.step(token[:, None])

    return begin


def _eager(model: GPT, ids: Tensor, case: Case) -> Begin:
    plain, after = _plain(EagerGPT, model), [[] for _ in range(model.config.n_layer)]
    plain(ids, past=after)

    def begin() -> Step:
        past = [list(layer) for layer in after]
        return lambda token: plain(token[:, None], past=past)[:, -1]

    return begin


class FixedGPT(EagerGPT):
    """A step whose shapes do not change with the length of the texts; a graph takes its `cache` where it lies."""

    def hold(self, batch: int, room: int) -> None:
        """Make the keys and values, (L, 2, B, H, room, D)."""
        c, weight = self.config, self.transformer["wte"].weight
        self.register_buffer("cache", weight.new_zeros(c.n_layer, 2, batch, c.n_head, room, c.head_dim))

    def forward(self, token: Tensor, at: Tensor) -> Tensor:
        """(B, T) tokens at places (T,) -> logits (B, V) of the last one."""
        t, heads = self.transformer, self.config.n_head
        x = t["wte"](token) + t["wpe"](at)  # (B, T, C)
        mask = torch.arange(self.cache.shape[4], device=at.device)[None] <= at[:, None]  # (T, room)
        for layer, block in enumerate(t["h"]):
            qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            q, *new = (s.unflatten(-1, (heads, -1)).transpose(1, 2) for s in qkv)
            k, v = (held.index_copy_(2, at, part) for held, part in zip(self.cache[layer], new, strict=True))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return F.linear(t["ln_f"](x)[:, -1], t["wte"].weight)


def _compiled(model: GPT, ids: Tensor, case: Case) -> Begin:
    plain = _plain(FixedGPT, model)
    plain.hold(len(ids), case.prompt + case.tokens)
    plain(ids, torch.arange(case.prompt, device=ids.device))
    compiled = torch.compile(plain, mode="reduce-overhead", fullgraph=True)

    def begin() -> Step:
        at = torch.full((1,), case.prompt - 1, device=ids.device)
        return lambda token: compiled(token[:, None], at.add_(1)).clone()

    return begin


def _plain(kind: type[EagerGPT], model: GPT) -> EagerGPT:
    """Plain torch with the model's own weights."""
    with torch.device("meta"):
        plain = kind(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain.eval()


CONTENDERS = {"peakgpt": _ours, "eager": _eager, "compile": _compiled}


# ---- timing


@torch.no_grad()
def compare_steps(
    config: GPTConfig, case: Case, device: torch.device, names: Sequence[str], *, budget_s: float,
    on_failure: OnFailure = raise_it,
) -> list[Result]:  # fmt: skip
    """Time case.tokens steps behind a prompt, in bfloat16, once each contender's first logits are eager's.

    Args:
        config: GPT-2's choices.
        case: streams, and tokens of prompt and continuation.
        names: of CONTENDERS.
        budget_s: see clock.interleave.
        on_failure: told of a contender that can not be built or has other logits; the others are timed.
    """
    model, ids = _random(config, device), torch.randint(config.vocab_size, (case.streams, case.prompt), device=device)
    expected, contenders = _eager(model, ids, case)()(ids[:, 0]), {}
    for name in names:
        try:
            begin = CONTENDERS[name](model, ids, case)
            agree(f"decode: {name}", [begin()(ids[:, 0])], [expected], torch.bfloat16)
            contenders[name] = lambda begin=begin: _greedy(begin(), ids[:, 0], case.tokens)
        except Exception as error:  # whatever a compiler does must not keep the others from being timed
            on_failure(name, error)
    with _uncaptured_is_told(on_failure):
        timings = (
            interleave(contenders, rounds=ROUNDS, warmup=1, device=device, budget_s=budget_s) if contenders else {}
        )
    c, peak = config, peak_for(device, torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    cached = 2 * c.n_layer * c.n_kv_head * c.head_dim * (case.prompt + (case.tokens + 1) / 2) * case.streams
    return [
        Result.of(
            timing, bench="decode", contender=name, backend="auto" if name == "peakgpt" else "torch",
            device=str(device), dtype="bfloat16",
            case={"n_layer": c.n_layer, "n_embd": c.n_embd, "prompt": case.prompt, "tokens": case.tokens,
                  "batch": case.streams, "timed": "steps"},
            bytes=case.tokens * (weights + cached) * 2, peak_bytes_s=peak.measured_bandwidth_bytes_s,
            peak_source=_measured(peak),
        )
        for name, timing in timings.items()
    ]  # fmt: skip


@contextlib.contextmanager
def _uncaptured_is_told(on_failure: OnFailure) -> Iterator[None]:
    """Our step goes on with a warning where it can not be recorded; its time is then no graph's."""
    with warnings.catch_warnings(record=True) as told:
        yield
    for warning in told:
        if "uncaptured" in str(warning.message):
            on_failure("peakgpt", warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _greedy(step: Step, token: Tensor, count: int) -> Tensor:
    for _ in range(count):
        token = step(token).argmax(-1)
    return token


@torch.no_grad()
def compare_first_token(config: GPTConfig, tokens: int, device: torch.device, *, budget_s: float) -> list[Result]:
    """Time a prompt to its first token on the host, in bfloat16, ours and eager's.

    Raises:
        ValueError: our logits are not eager's.
    """
    model, ids = _random(config, device), torch.randint(config.vocab_size, (1, tokens), device=device)
    blocks, eager = range(blocks_for(tokens)), _plain(EagerGPT, model)
    executor, host = make_executor(model, len(blocks)), ids[0].tolist()
    ours = lambda: executor.step([Chunk(host, 0, blocks)])  # noqa: E731
    theirs = lambda: eager(ids, past=[[] for _ in range(config.n_layer)])[:, -1]  # noqa: E731
    agree("first token: peakgpt", [ours()], [theirs()], torch.bfloat16)
    contenders = {"peakgpt": lambda: int(ours().argmax()), "eager": lambda: int(theirs().argmax())}
    timings = interleave(contenders, rounds=ROUNDS, warmup=1, device=device, budget_s=budget_s)
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


def _random(config: GPTConfig, device: torch.device) -> GPT:
    """Made on the device: drawing 1558M weights on a CPU takes longer than all that is timed."""
    with torch.device(device):
        return GPT(config).to(torch.bfloat16).eval()


def _measured(peak: Peak) -> str:
    return f"bandwidth measured in this process; {peak.source} has {peak.bandwidth_bytes_s / 1e9:.0f} GB/s"
