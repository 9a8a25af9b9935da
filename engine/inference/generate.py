"""Generation: one pass over the prompt, then one token a step against the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peakgpt.engine.inference.sampling import draw_seed, sample, uniforms
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.inference.stepper import stepper

if TYPE_CHECKING:
    from peakgpt.engine.model.transformer import Transformer

STOP_CHECK = 16  # tokens between looks at whether all sequences stopped, where a look waits for the device


def decode(model: Transformer, ids: Tensor, params: SamplingParams, start: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the next token of each sequence, (B,) int64 on the device, without waiting for it.

    Raises:
        ValueError: an empty or too long prompt.
    """
    return _decode(model, ids, check_prompt(model, ids, params.max_tokens, start), params, start)


def check_prompt(model: Transformer, ids: Tensor, max_new_tokens: int | None, start: Tensor | None) -> int:
    """How many tokens may be added.

    Raises:
        ValueError: no tensor, an empty or too long prompt, or it starts outside of itself.
    """
    for name, value in (("ids", ids), ("start", start)):
        if not isinstance(value, Tensor) and (name == "ids" or value is not None):
            raise ValueError(f"generate: {name} is {value!r:.60}, expected a Tensor of integers")
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"generate: ids have shape {tuple(ids.shape)}, expected (B, T) with at least one token")
    room = model.config.block_size - ids.shape[1]
    count = room if max_new_tokens is None else max_new_tokens
    if not 0 <= count <= room:
        raise ValueError(
            f"generate: {ids.shape[1]} prompt tokens and max_new_tokens {count}, "
            f"expected at most block_size {model.config.block_size} in all"
        )
    if start is not None and (start.shape != ids.shape[:1] or (start < 0).any() or (start >= ids.shape[1]).any()):
        raise ValueError(f"generate: start is {start.tolist()}, expected {ids.shape[0]} of 0 to {ids.shape[1] - 1}")
    return count


@torch.no_grad()
def _decode(
    model: Transformer, ids: Tensor, count: int, params: SamplingParams, start: Tensor | None
) -> Iterator[Tensor]:
    batch, device = ids.shape[0], ids.device
    step = stepper(model, batch, ids.shape[1] + count, count, start)
    if params.temperature:
        seed = draw_seed() if params.seed is None else params.seed
        u = torch.stack([uniforms(seed, text, 0, count) for text in range(batch)], 1).to(device)  # (count, B)
    for i in range(count):
        logits = step(ids)
        if params.temperature:
            token = sample(logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, u=u[i])
        else:
            token = logits.argmax(-1)
        yield token
        ids = token[:, None]


def generate(model: Transformer, ids: Tensor, params: SamplingParams, start: Tensor | None) -> Tensor:
    """Continue a batch; see GPT.generate."""
    steps = decode(model, ids, params, start)
    device, stop = ids.device, params.stop_token_ids
    ends = torch.tensor(list(stop), device=device)
    stopped = torch.zeros(ids.shape[0], dtype=torch.bool, device=device)
    tokens = [ids]
    every = 1 if device.type == "cpu" else STOP_CHECK
    for i, token in enumerate(steps, 1):
        if stop:
            token = torch.where(stopped, ends[0], token)
            stopped = stopped | torch.isin(token, ends)
        tokens.append(token[:, None].to(ids.dtype))
        if stop and i % every == 0 and stopped.all():
            break
    out = torch.cat(tokens, 1)
    return _trimmed(out, ids.shape[1], ends) if stop else out


def _trimmed(out: Tensor, prompt: int, ends: Tensor) -> Tensor:
    """Cut the columns after every sequence has stopped."""
    is_end = torch.isin(out[:, prompt:], ends)
    running = (is_end.cumsum(1) - is_end.int() == 0).any(0)  # no end before this column, in some sequence
    return out[:, : prompt + int(running.sum())]


def stream(model: Transformer, ids: Tensor, params: SamplingParams) -> Iterator[int]:
    """Continue one sequence token by token; see GPT.stream."""
    steps = decode(model, ids, params)
    if ids.shape[0] != 1:
        raise ValueError(f"stream: ids have shape {tuple(ids.shape)}, expected (1, T)")
    return _stream(steps, frozenset(params.stop_token_ids))


def _stream(tokens: Iterator[Tensor], stop: frozenset[int]) -> Iterator[int]:
    for token in tokens:
        value = int(token)
        if value in stop:
            return
        yield value
