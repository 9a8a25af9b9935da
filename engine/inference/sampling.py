"""Sampling: choose the next token from logits. The token of a row does not depend on the other rows of the batch.

    p = softmax(z / temperature), set to 0 outside of top-k, top-p and min-p
    token = the first v with  p_0 + ... + p_v > u (p_0 + ... + p_V-1)        (inverse transform sampling)

top-k keeps the k largest logits (Fan et al. 2018, arXiv:1805.04833), top-p the smallest set of tokens whose
probabilities sum to top_p (Holtzman et al. 2020, arXiv:1904.09751), min-p the tokens whose probability is at least
min_p times the largest (Nguyen et al. 2024, arXiv:2407.01082). u is random number `index` of the Philox generator with
key (seed, stream): token i of a request has the same u in every batch. One random number per token and a binary search
cost less than the Gumbel trick, which needs a random number for each token of the vocabulary.
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

STRIDES = 16  # `largest` takes the maximum of 16 logits at a time, and searches the k groups with the largest maxima
TOP_P_FIRST = 512  # the 512 most likely tokens usually reach top_p; only if they do not, the others are searched
# `_zero_outside_top_p` estimates the cutoff from every 16th probability. 128 ranks are 4.5 standard deviations of a
# rank in such a sample of GPT-2's vocabulary.
SAMPLE_EVERY, RANK_MARGIN = 16, 128
SUM_MARGIN = 1e-3  # larger than the rounding error of a sum of probabilities
UNIFORMS_AT_ONCE = 256  # the overhead of torch calls, not Philox, dominates the cost


class Uniforms:
    """The uniform random numbers of one stream of a seed, in (0, 1): uniforms[index]."""

    def __init__(self, seed: int, stream: int = 0):
        self.key, self.stream, self.cached = _signed(seed), stream, {}  # cached: part of the stream -> numbers

    def __getitem__(self, index: int) -> float:
        part, offset = divmod(index, UNIFORMS_AT_ONCE)
        if part not in self.cached:
            self.cached = {part: uniforms(self.key, self.stream, part * UNIFORMS_AT_ONCE, UNIFORMS_AT_ONCE).tolist()}
        return self.cached[part][offset]


def uniforms(seed: int, stream: int, first: int, count: int) -> Tensor:
    """Return the numbers first .. first + count - 1 of a stream, (count,) float64 in (0, 1)."""
    counters = torch.arange(first, first + count)
    low, high, *_ = philox((counters, stream & 0xFFFFFFFF, stream >> 32, 0), torch.tensor([_signed(seed)]))
    # 48 bits plus one half: u * total, rounded to float64, stays below total.
    return ((low << 16 | high >> 16).double() + 0.5) / (1 << 48)


def draw_seed() -> int:
    """Draw a seed from torch's generator."""
    return int(torch.randint(1 << 62, ()))


def _signed(seed: int) -> int:
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def choose(logits: Tensor, params: Sequence[SamplingParams], u: Sequence[float]) -> Tensor:
    """Choose a token for each row, by the row's own sampling parameters.

    Args:
        logits: (B, V) float32, after penalties and bias.
        params: B sampling parameters.
        u: B uniform random numbers; those of greedy rows are ignored.
    Returns:
        (B,) int64; V, which is not a token, in rows whose logits are not finite.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for row, p in enumerate(params):
        groups[("greedy",) if p.temperature == 0 else (p.top_k, p.top_p is not None, p.min_p is not None)].append(row)
    if len(groups) == 1:
        return _choose_same_kind(logits, params, u)
    tokens = torch.empty(len(params), dtype=torch.int64)
    for rows in groups.values():
        index = torch.tensor(rows)
        tokens[index] = _choose_same_kind(logits[index], [params[r] for r in rows], [u[r] for r in rows]).cpu()
    return tokens


def _choose_same_kind(logits: Tensor, params: Sequence[SamplingParams], u: Sequence[float]) -> Tensor:
    """Choose tokens for rows that use the same set of methods (greedy, top-k, top-p, min-p)."""
    p = params[0]
    if p.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        return _or_invalid(tokens, logits.gather(-1, tokens), logits)
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
    """Sample a token for each row.

    Args:
        logits: (B, V).
        temperature: more than 0; a number or (B, 1) float32.
        top_k: applied first.
        top_p, min_p: numbers or (B, 1) float32.
        u: (B,) uniform random numbers, float64 in (0, 1).
    Returns:
        (B,) int64; V, which is not a token, in rows whose logits are not finite.
    """
    p, ids = probabilities(logits, temperature, top_k, top_p, min_p)
    cdf = p.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    index = torch.searchsorted(cdf, u.to(p.device)[:, None] * total, right=True)
    index = index.clamp(max=p.shape[-1] - 1)  # NaN gives an index past the end, and such a gather aborts CUDA
    return _or_invalid(index if ids is None else ids.gather(-1, index), total, logits)


def _or_invalid(tokens: Tensor, values: Tensor, logits: Tensor) -> Tensor:
    """Return tokens, (B, 1), as (B,), with V in the rows whose values, (B, 1), are not finite."""
    return torch.where(values.isfinite(), tokens, logits.shape[-1])[:, 0]


def probabilities(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the unnormalized distribution that `sample` draws from.

    Args:
        logits, temperature, top_k, top_p, min_p: as in `sample`.
    Returns:
        (p, ids): probabilities of n candidate tokens, (B, n) float32, and their ids, (B, n); or probabilities of all
        tokens, (B, V), and None.
    """
    z, ids = logits.float() / temperature, None
    if top_k is not None:
        z, ids = largest(z, min(top_k, z.shape[-1]))
    p = z.softmax(-1)
    if top_p is not None:
        p, ids = _keep_top_p(p, top_p) if ids is None else (_zero_after_top_p(p, top_p), ids)
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
    return p, ids


def _zero_after_top_p(p: Tensor, top_p: float | Tensor) -> Tensor:
    """Set sorted probabilities, largest first, to 0 after the one with which their sum reaches top_p."""
    return p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)


def _keep_top_p(p: Tensor, top_p: float | Tensor) -> tuple[Tensor, Tensor | None]:
    """Keep the smallest set of tokens that reaches top_p; returns (p, ids) as `probabilities`. May write into p."""
    if p.device.type != "cpu":  # the cases below depend on values, and reading them would wait for the device
        p, ids = p.sort(descending=True, stable=True)
        return _zero_after_top_p(p, top_p), ids
    top_p = torch.as_tensor(top_p, dtype=torch.float32).expand(len(p), 1)  # float32 in every batch
    count = min(TOP_P_FIRST, p.shape[-1])
    # Rows that need more than the `count` most likely tokens. Flat logits show it without a sort.
    needs_more = p.amax(-1, keepdim=True) * count < top_p - SUM_MARGIN
    if not needs_more.all():
        candidates, ids = largest(p, count)
        needs_more = candidates.sum(-1, keepdim=True) < top_p + SUM_MARGIN
        candidates = _zero_after_top_p(candidates, top_p)
        if not needs_more.any():
            return candidates, ids
    rows = needs_more[:, 0].nonzero()[:, 0].tolist()
    for row in rows:
        _zero_outside_top_p(p[row].numpy(), float(top_p[row]))
    if len(rows) == len(p):
        return p, None
    kept_ids = [p[row].nonzero()[:, 0] for row in rows]
    padding = max(0, *(len(kept) - count for kept in kept_ids))
    candidates, ids = (F.pad(t, (0, padding)) for t in (candidates, ids))
    for row, kept in zip(rows, kept_ids, strict=True):
        candidates[row] = 0.0
        candidates[row, : len(kept)], ids[row, : len(kept)] = p[row, kept], kept
    return candidates, ids


def _zero_outside_top_p(p: np.ndarray, top_p: float) -> None:
    """Set all of p, (V,), to 0 except the smallest set that reaches top_p; of equal probabilities keep the first.

    Estimate the cutoff probability from every 16th element. Sort only the probabilities near it; sort all of them if
    the estimate was wrong. 8 rows of 50257 equal, nearly equal and normal logits take 4.3, 3.2 and 3.1 ms; a sort of
    all takes 5.3, 25 and 25 ms (2-core Zen 4, reused pages, 2026-11-21).
    """
    subset = np.sort(p[::SAMPLE_EVERY])
    sums = subset[::-1].cumsum(dtype=np.float64)
    rank = len(subset) - 1 - int(np.searchsorted(sums, top_p * sums[-1]))
    low, high = subset[max(rank - RANK_MARGIN, 0)], subset[min(rank + RANK_MARGIN, len(subset) - 1)]
    near, missing = p[(p >= low) & (p <= high)], top_p - (p * (p > high)).sum(dtype=np.float64)
    if not 0 < missing <= near.sum(dtype=np.float64):
        near, missing = p, top_p
    near = np.sort(near)
    sums = near[::-1].cumsum(dtype=np.float64)
    missing = min(missing, sums[-1])  # the sum of all may be below top_p by a rounding error
    cutoff = near[len(near) - 1 - int(np.searchsorted(sums, missing))]
    larger = len(near) - int(np.searchsorted(near, cutoff, side="right"))
    missing -= sums[larger - 1] if larger else 0.0
    keep, equal = p > cutoff, np.flatnonzero(p == cutoff)
    keep[equal[: math.ceil(missing / float(cutoff))]] = True
    p *= keep


def largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row, largest first, and their indices, as z.topk(k) does.

    Faster than topk of the whole row: take the maximum of each group of STRIDES values; the k largest values are in the
    k groups with the largest maxima.
    """
    width = z.shape[-1] // STRIDES
    if k * STRIDES * 4 > z.shape[-1] or width <= k:
        return z.topk(k)
    strided = z[:, : STRIDES * width].unflatten(-1, (STRIDES, width))  # (B, STRIDES, width)
    chosen = strided.amax(1).topk(k).indices  # (B, k)
    ids = (chosen[:, None] + width * torch.arange(STRIDES, device=z.device)[:, None]).flatten(1)
    rest = torch.arange(STRIDES * width, z.shape[-1], device=z.device).expand(len(z), -1)
    ids = torch.cat([ids, rest], -1)
    values, index = z.gather(-1, ids).topk(k)
    return values, ids.gather(-1, index)


def adjust(z: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Apply penalties and bias to one row of logits, in place; see SamplingParams.

    Args:
        z: (V,) float32.
        params: the penalties and the bias.
        prompt, output: ids of the prompt and of the tokens after it.
    """
    if params.repetition_penalty != 1.0 and (prompt or output):
        seen = torch.tensor([*prompt, *output], device=z.device)
        values = z[seen]
        z[seen] = torch.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(list(output), device=z.device).unique(return_counts=True)
        z[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=z.device)
        z[ids] += torch.tensor(list(params.logit_bias.values()), device=z.device)


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, and the most likely tokens at its position.

    Args:
        token: its id.
        logprob: in nats.
        top: (id, log-probability) of the most likely tokens, most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def log_probabilities(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """Return the log-probability of one token a row, and of the most likely tokens of each row.

    Args:
        logits: (B, V), the model's own.
        tokens: B token ids.
        top: number of most likely tokens to return, for each row.
    """
    if not len(tokens):
        return []
    # log_softmax computes a row on one thread, so its bits do not depend on the number of rows.
    log_p = logits.float().log_softmax(-1)
    chosen = log_p.gather(-1, torch.tensor(tokens, device=log_p.device)[:, None])[:, 0].tolist()
    best: list[tuple] = [()] * len(tokens)
    for n in {*top} - {0}:  # one topk for each count: the order of equal values depends on k
        rows = [row for row, count in enumerate(top) if count == n]
        values, ids = log_p[rows].topk(min(n, log_p.shape[-1]))
        for row, v, i in zip(rows, values.tolist(), ids.tolist(), strict=True):
            best[row] = tuple(zip(i, v, strict=True))
    return [TokenLogprob(t, p, b) for t, p, b in zip(tokens, chosen, best, strict=True)]
