"""From logits to the next token, a row at a time: no row's token depends on what else is in the batch.

    p = softmax(z / temperature), kept where top-k, top-p and min-p keep it
    token = the first v with  p_0 + ... + p_v > u (p_0 + ... + p_V-1)

top-k keeps the k largest logits (Fan et al. 2018, arXiv:1805.04833), top-p the fewest tokens whose probabilities reach
p (Holtzman et al. 2020, arXiv:1904.09751), min-p those at least that likely as the likeliest (Nguyen et al. 2024,
arXiv:2407.01082). u is number `index` of Philox under (seed, stream), so that the i-th token of a request has one,
wherever and beside whatever it is chosen. One number a token and a binary search cost less than a race of exponentials,
which wants a random number for every token of the vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.kernels.ops.philox import philox

STRIDES = 16  # logits of one maximum; the k largest are sought under the k largest maxima
FIRST = 512  # likeliest tokens that mostly reach top_p; the others are looked at only where they do not
EVERY, NEAR = 16, 128  # NEAR is 4.5 deviations of a rank among one of 16 of GPT-2's vocabulary
MARGIN = 1e-3  # so that no rounding of two sums matters
DRAWN = 256  # uniforms at once: torch's calls, not Philox, are what they cost


class Uniforms:
    """The uniform numbers of one stream of a seed, in (0, 1)."""

    def __init__(self, seed: int, stream: int = 0):
        self.key, self.stream, self.drawn = _signed(seed), stream, {}

    def __getitem__(self, index: int) -> float:
        part, at = divmod(index, DRAWN)
        if part not in self.drawn:
            self.drawn = {part: uniforms(self.key, self.stream, part * DRAWN, DRAWN).tolist()}
        return self.drawn[part][at]


def uniforms(seed: int, stream: int, first: int, count: int) -> Tensor:
    """(count,) float64: numbers first .. first + count - 1 of a stream."""
    counters = torch.arange(first, first + count)
    low, high, *_ = philox((counters, stream & 0xFFFFFFFF, stream >> 32, 0), torch.tensor([_signed(seed)]))
    # 48 bits and a half: u times a sum stays below the sum when rounded.
    return ((low << 16 | high >> 16).double() + 0.5) / (1 << 48)


def draw_seed() -> int:
    """A seed from torch's generator."""
    return int(torch.randint(1 << 62, ()))


def _signed(seed: int) -> int:
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def choose(logits: Tensor, params: Sequence[SamplingParams], u: Sequence[float]) -> Tensor:
    """Choose a token a row.

    Args:
        logits: (B, V) float32, after penalties and bias.
        params: of each row.
        u: uniform numbers, one a row; greedy rows need none.
    Returns:
        (B,) int64; V where the logits are no numbers
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for row, p in enumerate(params):
        groups[("greedy",) if p.temperature == 0 else (p.top_k, p.top_p is not None, p.min_p is not None)].append(row)
    if len(groups) == 1:
        return _choose_alike(logits, params, u)
    tokens = torch.empty(len(params), dtype=torch.int64)
    for rows in groups.values():
        index = torch.tensor(rows)
        tokens[index] = _choose_alike(logits[index], [params[r] for r in rows], [u[r] for r in rows]).cpu()
    return tokens


def _choose_alike(logits: Tensor, params: Sequence[SamplingParams], u: Sequence[float]) -> Tensor:
    """Rows that differ in numbers only, not in what is done."""
    p = params[0]
    if p.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        return _or_none(tokens, logits.gather(-1, tokens), logits)
    column = lambda name: _column([getattr(q, name) for q in params], logits.device)  # noqa: E731
    return sample(
        logits, temperature=column("temperature"), top_k=p.top_k, top_p=None if p.top_p is None else column("top_p"),
        min_p=None if p.min_p is None else column("min_p"), u=torch.tensor(u, dtype=torch.float64),
    )  # fmt: skip


def _column(values: list[float], device: torch.device) -> float | Tensor:
    return values[0] if values.count(values[0]) == len(values) else torch.tensor(values, device=device)[:, None]


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    u: Tensor,
) -> Tensor:
    """Draw a token a row.

    Args:
        logits: (B, V).
        temperature, top_p, min_p: numbers, or (B, 1) float32; temperature more than 0.
        top_k, top_p, min_p: what may be chosen; top_k first.
        u: (B,) float64 in (0, 1).
    Returns:
        (B,) int64; V where the logits are no numbers
    """
    p, ids = probabilities(logits, temperature, top_k, top_p, min_p)
    reached = p.cumsum(-1, dtype=torch.float64)
    total = reached[:, -1:]
    at = torch.searchsorted(reached, u.to(p.device)[:, None] * total, right=True)
    at = at.clamp(max=p.shape[-1] - 1)  # NaN is past all; a gather past the end ends a CUDA process
    return _or_none(at if ids is None else ids.gather(-1, at), total, logits)


def _or_none(tokens: Tensor, values: Tensor, logits: Tensor) -> Tensor:
    """The tokens, (B, 1), as (B,); V, which is none, where the values that led to them are no numbers."""
    return torch.where(values.isfinite(), tokens, logits.shape[-1])[:, 0]


def probabilities(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `sample` draws from, up to a factor.

    Returns:
        (p, ids): float32 (B, n), and the tokens that these are; or (B, V) and None.
    """
    z, ids = logits.float() / temperature, None
    if top_k is not None:
        z, ids = largest(z, min(top_k, z.shape[-1]))
    p = z.softmax(-1)
    if top_p is not None:
        p, ids = _fewest(p, top_p) if ids is None else (_until(p, top_p), ids)
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
    return p, ids


def _until(p: Tensor, top_p: float | Tensor) -> Tensor:
    """Probabilities, largest first, with 0 behind the one that reaches top_p."""
    return p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)


def _fewest(p: Tensor, top_p: float | Tensor) -> tuple[Tensor, Tensor | None]:
    """The fewest tokens that reach top_p, and zeros: p and ids, as `probabilities` gives them. May write into p."""
    if p.device.type != "cpu":  # looking would wait for the device
        p, ids = p.sort(descending=True, stable=True)
        return _until(p, top_p), ids
    top_p = torch.as_tensor(top_p, dtype=torch.float32).expand(len(p), 1)  # a row's is the same number in any batch
    count = min(FIRST, p.shape[-1])
    many = p.amax(-1, keepdim=True) * count < top_p - MARGIN  # seen at once, where logits are flat
    if not many.all():
        first, ids = largest(p, count)
        many = first.sum(-1, keepdim=True) < top_p + MARGIN
        first = _until(first, top_p)
        if not many.any():
            return first, ids
    rows = many[:, 0].nonzero()[:, 0].tolist()
    for row in rows:
        _cut(p[row].numpy(), float(top_p[row]))
    if len(rows) == len(p):
        return p, None
    found = [p[row].nonzero()[:, 0] for row in rows]
    more = max(0, *(len(kept) - count for kept in found))
    first, ids = (F.pad(t, (0, more)) for t in (first, ids))
    for row, kept in zip(rows, found, strict=True):
        first[row] = 0.0
        first[row, : len(kept)], ids[row, : len(kept)] = p[row, kept], kept
    return first, ids


def _cut(p: np.ndarray, top_p: float) -> None:
    """Set all of (V,) to 0 but the fewest that reach top_p, among equal ones the first.

    One number of 16 tells nearly how large the least is that is kept; who is near it is sorted, and all are where that
    guess is wrong. 8 rows of 50257 equal, nearly equal and normal logits take 4.3, 3.2 and 3.1 ms; sorted whole they
    took 5.3, 25 and 25 (2-core Zen 4, kept pages, 2026-11-21).
    """
    some = np.sort(p[::EVERY])
    reached = some[::-1].cumsum(dtype=np.float64)
    at = len(some) - 1 - int(np.searchsorted(reached, top_p * reached[-1]))
    low, high = some[max(at - NEAR, 0)], some[min(at + NEAR, len(some) - 1)]
    near, wanted = p[(p >= low) & (p <= high)], top_p - (p * (p > high)).sum(dtype=np.float64)
    if not 0 < wanted <= near.sum(dtype=np.float64):
        near, wanted = p, top_p
    near = np.sort(near)
    reached = near[::-1].cumsum(dtype=np.float64)
    wanted = min(wanted, reached[-1])  # all together may miss it, by a rounding
    least = near[len(near) - 1 - int(np.searchsorted(reached, wanted))]
    larger = len(near) - int(np.searchsorted(near, least, side="right"))
    wanted -= reached[larger - 1] if larger else 0.0
    kept, equal = p > least, np.flatnonzero(p == least)
    kept[equal[: math.ceil(wanted / float(least))]] = True
    p *= kept


def largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first, and where they are: z.topk(k), of candidates.

    The k largest lie in the k of all strides whose maxima are largest: topk over those costs a fraction.
    """
    width = z.shape[-1] // STRIDES
    if k * STRIDES * 4 > z.shape[-1] or width <= k:
        return z.topk(k)
    strided = z[:, : STRIDES * width].unflatten(-1, (STRIDES, width))  # (B, STRIDES, width)
    chosen = strided.amax(1).topk(k).indices  # (B, k)
    ids = (chosen[:, None] + width * torch.arange(STRIDES, device=z.device)[:, None]).flatten(1)
    rest = torch.arange(STRIDES * width, z.shape[-1], device=z.device).expand(len(z), -1)
    ids = torch.cat([ids, rest], -1)
    values, at = z.gather(-1, ids).topk(k)
    return values, ids.gather(-1, at)


def adjust(z: Tensor, params: SamplingParams, prompt: Sequence[int], text: Sequence[int]) -> None:
    """Apply penalties and bias to one row of logits, (V,) float32, in place; see SamplingParams."""
    if params.repetition_penalty != 1.0 and (prompt or text):
        seen = torch.tensor([*prompt, *text], device=z.device)
        values = z[seen]
        z[seen] = torch.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
    if text and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(list(text), device=z.device).unique(return_counts=True)
        z[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=z.device)
        z[ids] += torch.tensor(list(params.logit_bias.values()), device=z.device)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the likeliest tokens in its place with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def log_probabilities(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of a token a row, and of the `top` likeliest of each row.

    Args:
        logits: (B, V), the model's own.
    """
    if not len(tokens):
        return []
    # log_softmax does a row on one thread; a sum over rows would be cut by how many there are.
    log_p = logits.float().log_softmax(-1)
    chosen = log_p.gather(-1, torch.tensor(tokens, device=log_p.device)[:, None])[:, 0].tolist()
    best: list[tuple] = [()] * len(tokens)
    for n in {*top} - {0}:  # each by itself: among equal ones, which come first follows their number
        rows = [row for row, count in enumerate(top) if count == n]
        values, ids = log_p[rows].topk(min(n, log_p.shape[-1]))
        for row, v, i in zip(rows, values.tolist(), ids.tolist(), strict=True):
            best[row] = tuple(zip(i, v, strict=True))
    return [TokenLogprob(t, p, b) for t, p, b in zip(tokens, chosen, best, strict=True)]
