"""`generate` and `stream`: one pass over the prompts, then steps of one token per sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.inference.decoder import make_decoder
from peakgpt.engine.inference.generation_config import GenerationConfig
from peakgpt.engine.inference.logit_changes import LogitChanges
from peakgpt.engine.inference.sampling import draw_seed, sample, uniforms
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.model.transformer import Transformer

SAMPLING, BEAMS = ("temperature", "top_k", "top_p", "min_p", "seed"), ("length_penalty", "early_stopping")
# Values without effect, which are accepted everywhere.
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "length_penalty": 1.0, "early_stopping": False}
STOP_CHECK = 16  # steps between two checks on a GPU whether all sequences stopped: each check waits for the device


def with_arguments(method: str, config: GenerationConfig, **arguments: Any) -> GenerationConfig:
    """Return how to generate: the arguments of a call, and for those not given the defaults of the checkpoint.

    Args:
        method: "GPT.generate" or "GPT.stream", for messages.
        config: the defaults of the checkpoint.
        arguments: by transformers' names, and seed; one that is None is not given.
    Raises:
        ValueError: an argument that would be ignored.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    needless = [name for name, value in given.items() if name in NEUTRAL and value == NEUTRAL[name]]
    samples = bool(given.get("do_sample", config.do_sample))
    beams = given.get("num_beams", 1 if config.num_beams is None else config.num_beams)
    for name, value in given.items():
        if name in SAMPLING and not samples and name not in needless:
            raise ValueError(f"{method}: got {name} {value} without do_sample=True, expected both or neither")
        if name in BEAMS and beams == 1 and name not in needless:
            raise ValueError(f"{method}: got {name} {value} with num_beams 1, expected at least 2")
    if samples and given.get("temperature") == 0:
        raise ValueError(f"{method}: got temperature 0 with do_sample=True, expected do_sample=False for greedy text")
    if samples and beams > 1:
        raise ValueError(f"{method}: got do_sample=True with num_beams {beams}, expected one of the two")
    if isinstance(eos := given.get("eos_token_id"), int):
        given["eos_token_id"] = (eos,)
    given.pop("seed", None)
    given["top_k"] = given.get("top_k", config.top_k) or None  # 0: all tokens
    return replace(config, **{**given, "do_sample": samples, "num_beams": beams})


def sampling_params(config: GenerationConfig, max_new_tokens: int, seed: int | None) -> SamplingParams:
    """Return the parameters of a generation.

    Raises:
        InvalidParam: a value out of range.
    """
    return SamplingParams(
        max_tokens=max_new_tokens, stop_token_ids=tuple(config.eos_token_id), seed=seed, **config.sampling()
    )


def check_prompt(
    model: Transformer, input_ids: Tensor, max_new_tokens: int | None, config: GenerationConfig | None = None,
    method: str = "generate",
) -> int:  # fmt: skip
    """Check a prompt and return the number of tokens to add.

    Args:
        max_new_tokens: None: as many as the checkpoint allows, and the model's context holds.
        config: the checkpoint's limit.
    Raises:
        ValueError: not a Tensor, an empty or too long prompt, or max_new_tokens is not a number from 0.
    """
    if max_new_tokens is not None and (not isinstance(max_new_tokens, int) or max_new_tokens < 0):
        raise ValueError(f"{method}: max_new_tokens is {max_new_tokens!r}, expected at least 0, or None")
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"generate: input_ids is {input_ids!r:.60}, expected a Tensor of integers")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        shape = tuple(input_ids.shape)
        raise ValueError(f"generate: input_ids have shape {shape}, expected (B, T) with at least one token")
    max_count = model.config.block_size - input_ids.shape[1]
    count = max_count if max_new_tokens is None else max_new_tokens
    if max_new_tokens is None and config and (limit := config.max_tokens(input_ids.shape[1])) is not None:
        count = min(count, limit)
    if not 0 <= count <= max_count:
        raise ValueError(
            f"generate: {input_ids.shape[1]} prompt tokens and max_new_tokens {count}, "
            f"expected at most block_size {model.config.block_size} in all"
        )
    return count


def generate(
    model: Transformer, input_ids: Tensor, params: SamplingParams, config: GenerationConfig, start: Tensor | None
) -> Tensor:
    """Continue a batch of prompts; see GPT.generate."""
    pad_token_id = config.pad_token_id
    steps = decode(model, input_ids, params, start)
    device, has_eos = input_ids.device, bool(params.stop_token_ids)
    eos = torch.tensor(list(params.stop_token_ids), device=device)
    pad = eos[:1] if pad_token_id is None else torch.tensor([pad_token_id], device=device)
    stopped = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=device)
    columns = [input_ids]
    check_every = 1 if device.type == "cpu" else STOP_CHECK
    for i, token in enumerate(steps, 1):
        if has_eos:
            token = torch.where(stopped, pad, token)
            stopped = stopped | torch.isin(token, eos)
        columns.append(token[:, None].to(input_ids.dtype))
        if has_eos and i % check_every == 0 and stopped.all():
            break
    out = torch.cat(columns, 1)
    return _trim(out, input_ids.shape[1], eos) if has_eos else out


def stream(model: Transformer, input_ids: Tensor, params: SamplingParams) -> Iterator[int]:
    """Continue one sequence token by token; see GPT.stream."""
    steps = decode(model, input_ids, params)
    if input_ids.shape[0] != 1:
        raise ValueError(f"stream: input_ids have shape {tuple(input_ids.shape)}, expected (1, T)")
    return _until_eos(steps, frozenset(params.stop_token_ids))


def decode(
    model: Transformer, input_ids: Tensor, params: SamplingParams, start: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield the next token of each sequence, (B,) int64 on the device, without waiting for its value.

    Raises:
        ValueError: an empty or too long prompt.
    """
    return _decode(model, input_ids, check_prompt(model, input_ids, params.max_tokens), params, start)


@torch.no_grad()
def _decode(
    model: Transformer, input_ids: Tensor, count: int, params: SamplingParams, start: Tensor | None
) -> Iterator[Tensor]:
    (batch, prompt), device = input_ids.shape, input_ids.device
    decoder = make_decoder(model, batch, prompt + count, count, start)
    if params.temperature:
        seed = draw_seed() if params.seed is None else params.seed
        u = torch.stack([uniforms(seed, sequence, 0, count) for sequence in range(batch)], 1).to(device)  # (count, B)
    if params.changes_logits:
        change = LogitChanges(params, device, start)
        history = torch.cat([input_ids, input_ids.new_zeros(batch, count)], 1).long()
    for i in range(count):
        logits = decoder.step(input_ids)
        if params.changes_logits:
            logits = change(logits, history[:, : prompt + i])
        if params.temperature:
            token = sample(
                logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
                u=u[i],
            )  # fmt: skip
        else:
            token = logits.argmax(-1)
        if params.changes_logits:
            history[:, prompt + i] = token
        yield token
        input_ids = token[:, None]


def _trim(out: Tensor, prompt: int, eos: Tensor) -> Tensor:
    """Cut the columns after every sequence has stopped."""
    is_eos = torch.isin(out[:, prompt:], eos)
    running = (is_eos.cumsum(1) - is_eos.int() == 0).any(0)  # some sequence has no eos before this column
    return out[:, : prompt + int(running.sum())]


def _until_eos(tokens: Iterator[Tensor], eos: frozenset[int]) -> Iterator[int]:
    for token in tokens:
        value = int(token)
        if value in eos:
            return
        yield value
