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

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.engine.params import SamplingParams
from peakgpt.kernels.philox import philox

STRIDES = 16  # logits of one maximum; the k largest are sought under the k largest maxima
FIRST = 512  # likeliest tokens that mostly reach top_p; the others are ordered only where they do not
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
        (B,) int64
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
        return logits.argmax(-1)
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
        (B,) int64
    """
    p, ids = probabilities(logits, temperature, top_k, top_p, min_p)
    reached = p.cumsum(-1, dtype=torch.float64)
    at = torch.searchsorted(reached, u.to(p.device)[:, None] * reached[:, -1:], right=True)
    return (at if ids is None else ids.gather(-1, at))[:, 0]


def probabilities(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `sample` draws from, up to a factor.

    Returns:
        (p, ids): float32 (B, n), largest first, and the tokens that these are; or (B, V) and None.
    """
    z = logits.float() / temperature
    if top_k is not None:
        z, ids = largest(z, min(top_k, z.shape[-1]))
        p = z.softmax(-1)
    elif top_p is not None:
        p, ids = _likeliest(z.softmax(-1), top_p)
    else:
        p, ids = z.softmax(-1), None
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return p, ids


def _likeliest(p: Tensor, top_p: float | Tensor) -> tuple[Tensor, Tensor]:
    """All that may be among the fewest tokens that reach top_p, largest first."""
    if p.device.type != "cpu":  # looking would wait for the device
        return p.sort(descending=True, stable=True)
    first, ids = largest(p, min(FIRST, p.shape[-1]))
    short = (first.cumsum(-1)[:, -1:] < top_p + MARGIN)[:, 0].nonzero()[:, 0]
    if not len(short) or first.shape == p.shape:
        return first, ids
    # Tokens less likely than `least` are no 1 - top_p all together: those that reach top_p first are others. 8 rows of
    # 50257 normal logits with deviation 4 take 2.0 ms, sorted whole 11.4 (2-core Zen 4, 2026-11-21).
    least = ((1.0 - top_p) / (2 * p.shape[-1]) * torch.ones(len(p), 1))[short].numpy()
    orders = [_descending(row, bound) for row, bound in zip(p[short].numpy(), least, strict=True)]
    width = max(first.shape[1], *map(len, orders))
    every, every_ids = (F.pad(t, (0, width - first.shape[1])) for t in (first, ids))
    for row, order in zip(short.tolist(), orders, strict=True):
        every_ids[row, : len(order)] = order
        every[row, : len(order)] = p[row][order]
    return every, every_ids


def _descending(p: np.ndarray, least: float) -> Tensor:
    """Which of (V,) are at least `least`, largest first."""
    kept = np.flatnonzero(p >= least)
    return torch.from_numpy(kept[np.argsort(-p[kept])])


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
