"""`generate` and `stream`: one pass over the prompts, then steps of one token per sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peakgpt.engine.inference.decoder import make_decoder
from peakgpt.engine.inference.sampling import draw_seed, sample, uniforms
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.model.transformer import Transformer

STOP_CHECK = 16  # steps between two checks on a GPU whether all sequences stopped: each check waits for the device


def sampling_params(
    method: str, *, max_new_tokens: int | None, do_sample: bool, temperature: float, top_k: int | None,
    top_p: float | None, eos_token_id: int | Sequence[int] | None, seed: int | None,
) -> SamplingParams:  # fmt: skip
    """Convert the arguments of GPT.generate or GPT.stream, which have transformers' names.

    Raises:
        ValueError: an argument out of range, or a sampling argument without do_sample.
    """
    if max_new_tokens is not None and (not isinstance(max_new_tokens, int) or max_new_tokens < 0):
        raise ValueError(f"{method}: max_new_tokens is {max_new_tokens!r}, expected at least 0, or None")
    if not do_sample:
        for name, value, default in (
            ("temperature", temperature, 1.0), ("top_k", top_k, None), ("top_p", top_p, None), ("seed", seed, None)
        ):  # fmt: skip
            if value != default:
                raise ValueError(f"{method}: got {name} {value} without do_sample=True, expected both or neither")
        temperature = 0.0
    elif temperature == 0:
        raise ValueError(f"{method}: got temperature 0 with do_sample=True, expected do_sample=False for greedy text")
    eos = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    return SamplingParams(max_tokens=max_new_tokens, stop_token_ids=eos, temperature=temperature, top_k=top_k,
                          top_p=top_p, seed=seed)  # fmt: skip


def check_prompt(model: Transformer, input_ids: Tensor, max_new_tokens: int | None) -> int:
    """Check a prompt and return the number of tokens to add.

    Raises:
        ValueError: not a Tensor, or an empty or too long prompt.
    """
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"generate: input_ids is {input_ids!r:.60}, expected a Tensor of integers")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        shape = tuple(input_ids.shape)
        raise ValueError(f"generate: input_ids have shape {shape}, expected (B, T) with at least one token")
    max_count = model.config.block_size - input_ids.shape[1]
    count = max_count if max_new_tokens is None else max_new_tokens
    if not 0 <= count <= max_count:
        raise ValueError(
            f"generate: {input_ids.shape[1]} prompt tokens and max_new_tokens {count}, "
            f"expected at most block_size {model.config.block_size} in all"
        )
    return count


def generate(
    model: Transformer, input_ids: Tensor, params: SamplingParams, start: Tensor | None, pad_token_id: int | None
) -> Tensor:
    """Continue a batch of prompts; see GPT.generate."""
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
    batch, device = input_ids.shape[0], input_ids.device
    decoder = make_decoder(model, batch, input_ids.shape[1] + count, count, start)
    if params.temperature:
        seed = draw_seed() if params.seed is None else params.seed
        u = torch.stack([uniforms(seed, sequence, 0, count) for sequence in range(batch)], 1).to(device)  # (count, B)
    for i in range(count):
        logits = decoder.step(input_ids)
        if params.temperature:
            token = sample(logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, u=u[i])
        else:
            token = logits.argmax(-1)
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
