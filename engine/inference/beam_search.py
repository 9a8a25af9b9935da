"""Beam search: of all ways to go on, the likeliest few are kept at every token.

    score of a text that ended = sum of log-probabilities / (tokens)^length_penalty

Which texts are kept, and when it ends, follows transformers' GenerationMixin._beam_search (5.x): of twice as many
candidates as beams (more where there are several stop ids), those that end compete with the ended ones where they are
among the best `beams`, and the best of the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peakgpt.engine.inference.stepper import stepper

if TYPE_CHECKING:
    from peakgpt.engine.model.transformer import Transformer

NEVER = -1e9  # the score of what can not be chosen


@dataclass
class _Ended:
    """The best texts that ended, best first."""

    texts: Tensor  # (B, beams, T + count)
    scores: Tensor  # (B, beams)
    lengths: Tensor  # (B, beams): tokens added
    ended: Tensor  # (B, beams) bool: whether there is one

    def merge(self, texts: Tensor, scores: Tensor, length: int, ends: Tensor) -> None:
        """Keep the best of these and those; scores of what may not be kept are NEVER."""
        best = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1])
        self.scores = best.values
        self.texts = _pick(torch.cat([self.texts, texts], 1), best.indices)
        self.lengths = torch.cat([self.lengths, torch.full_like(best.indices[:, :1], length).expand(ends.shape)], 1)
        self.lengths = self.lengths.gather(1, best.indices)
        self.ended = torch.cat([self.ended, ends], 1).gather(1, best.indices)


@torch.no_grad()
def beam_search(
    model: Transformer, ids: Tensor, beams: int, *, count: int, stop: Sequence[int], length_penalty: float,
    early_stopping: bool | str, start: Tensor | None,
) -> Tensor:  # fmt: skip
    """Continue a batch of prompts by `count` tokens at most; see GPT.generate.

    Raises:
        ValueError: beams or early_stopping out of range.
    """
    if beams < 1 or early_stopping not in (True, False, "never"):
        raise ValueError(f"beam search: beams is {beams} and early_stopping {early_stopping!r}, "
                         'expected at least 1, and True, False or "never"')  # fmt: skip
    if not count:
        return ids
    (batch, prompt), device = ids.shape, ids.device
    vocab, ends_at = model.config.vocab_size, torch.tensor(list(stop), dtype=torch.int64, device=device)
    running = torch.full((batch, beams, prompt + count), stop[0] if stop else 0, device=device)
    running[:, :, :prompt] = ids[:, None]
    scores = torch.full((batch, beams), NEVER, device=device)
    none = torch.zeros_like(scores, dtype=torch.int64)
    ended = _Ended(running.clone(), scores.clone(), none, none.bool())
    scores[:, 0] = 0.0  # all beams begin alike: only one may be continued
    hopeful = torch.ones(batch, 1, dtype=torch.bool, device=device)  # whether a better text may still come
    candidates = max(2, 1 + len(stop)) * beams
    first = torch.arange(batch, device=device)[:, None]  # prompt of each beam

    step = stepper(model, batch, prompt + count, count, start, beams=beams)
    logits = step(ids).repeat_interleave(beams, 0)
    step.reorder(first.expand(-1, beams).flatten())
    for length in range(1, count + 1):
        log_p = logits.float().log_softmax(-1).view(batch, beams, vocab) + scores[:, :, None]
        best = log_p.flatten(1).topk(candidates)
        parents, tokens = best.indices // vocab, best.indices % vocab
        texts = _pick(running, parents)
        texts[:, :, prompt + length - 1] = tokens
        ends = torch.isin(tokens, ends_at) | (length == count)

        kept = (best.values + ends * NEVER).topk(beams)
        running, scores = _pick(texts, kept.indices), kept.values
        may_end = ends & (torch.arange(candidates, device=device) < beams)
        closed = ~hopeful | (ended.ended.all(1, keepdim=True) & (early_stopping is True))
        ended.merge(texts, best.values / length**length_penalty + closed * NEVER + ~may_end * NEVER, length, may_end)

        longest = count if early_stopping == "never" and length_penalty > 0 else length
        worst = torch.where(ended.ended, ended.scores.amin(1, keepdim=True), NEVER)
        hopeful &= (scores[:, :1] / longest**length_penalty > worst).any(1, keepdim=True)
        if not hopeful.any() or (early_stopping is True and ended.ended.all()) or ends.all():
            break
        step.reorder((first * beams + parents.gather(1, kept.indices)).flatten())
        logits = step(tokens.gather(1, kept.indices).flatten()[:, None])
    return ended.texts[:, 0, : prompt + int(ended.lengths[:, 0].max())].to(ids.dtype)


def _pick(texts: Tensor, which: Tensor) -> Tensor:
    """(B, n, T) of (B, N, T) and which, (B, n)."""
    return texts.gather(1, which[:, :, None].expand(-1, -1, texts.shape[2]))
