"""Beam search: keeps the most likely sequences at every token.

    score of an ended sequence = sum of log-probabilities / (new tokens)^length_penalty

The choice of sequences and the stopping rule follow transformers' GenerationMixin._beam_search (5.x). There are twice
as many candidates as beams, more with several eos tokens. A candidate that ends competes with the ended sequences if it
is among the best `num_beams`; the best of the others continue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peakgpt.engine.inference.decoder import make_decoder
from peakgpt.engine.inference.generation_config import GenerationConfig
from peakgpt.engine.inference.logit_changes import LogitChanges
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.model.transformer import Transformer

EXCLUDED = -1e9  # added to the score of a candidate that must not be chosen


@dataclass
class _Ended:
    """The best ended sequences of each prompt, best first."""

    sequences: Tensor  # (B, num_beams, T + max_new_tokens)
    scores: Tensor  # (B, num_beams)
    lengths: Tensor  # (B, num_beams) new tokens
    is_valid: Tensor  # (B, num_beams) bool: whether the entry is a sequence

    def merge(self, sequences: Tensor, scores: Tensor, length: int, may_end: Tensor) -> None:
        """Keep the best of the entries and the candidates; a candidate that may not end has the score EXCLUDED."""
        best = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1])
        self.scores = best.values
        self.sequences = _select(torch.cat([self.sequences, sequences], 1), best.indices)
        lengths = torch.full_like(best.indices[:, :1], length).expand(may_end.shape)
        self.lengths = torch.cat([self.lengths, lengths], 1).gather(1, best.indices)
        self.is_valid = torch.cat([self.is_valid, may_end], 1).gather(1, best.indices)


@torch.no_grad()
def beam_search(
    model: Transformer, input_ids: Tensor, params: SamplingParams, config: GenerationConfig, start: Tensor | None
) -> Tensor:
    """Continue a batch of prompts; see GPT.generate.

    Args:
        params: greedy; max_tokens is a number.
        config: num_beams, length_penalty, early_stopping and pad_token_id.
    Raises:
        ValueError: num_beams or early_stopping out of range.
    """
    num_beams, early_stopping, pad_token_id = config.num_beams, config.early_stopping or False, config.pad_token_id
    length_penalty = 1.0 if config.length_penalty is None else config.length_penalty
    if num_beams < 1 or early_stopping not in (True, False, "never"):
        raise ValueError(f"generate: num_beams is {num_beams} and early_stopping {early_stopping!r}, "
                         'expected at least 1, and True, False or "never"')  # fmt: skip
    max_new_tokens, eos_token_ids = params.max_tokens, params.stop_token_ids
    if not max_new_tokens:
        return input_ids
    (batch, prompt), device = input_ids.shape, input_ids.device
    vocab, eos = model.config.vocab_size, torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
    if pad_token_id is None:
        pad_token_id = eos_token_ids[0] if eos_token_ids else 0
    running = torch.full((batch, num_beams, prompt + max_new_tokens), pad_token_id, device=device)
    running[:, :, :prompt] = input_ids[:, None]
    scores = torch.full((batch, num_beams), EXCLUDED, device=device)
    zeros = torch.zeros_like(scores, dtype=torch.int64)
    ended = _Ended(running.clone(), scores.clone(), zeros, zeros.bool())
    scores[:, 0] = 0.0  # all beams of a prompt are equal at first: only one may continue
    can_improve = torch.ones(batch, 1, dtype=torch.bool, device=device)  # whether a better sequence may still end
    num_candidates = max(2, 1 + len(eos_token_ids)) * num_beams
    prompts = torch.arange(batch, device=device)[:, None]  # prompt of each beam

    decoder = make_decoder(model, batch, prompt + max_new_tokens, max_new_tokens, start, num_beams=num_beams)
    logits = decoder.step(input_ids).repeat_interleave(num_beams, 0)
    decoder.reorder(prompts.expand(-1, num_beams).flatten())
    starts = None if start is None else start.repeat_interleave(num_beams)
    change = LogitChanges(params, device, starts) if params.changes_logits else None
    for length in range(1, max_new_tokens + 1):
        log_p = logits.float().log_softmax(-1)
        if change:
            log_p = change(log_p, running[:, :, : prompt + length - 1].flatten(0, 1))
        log_p = log_p.view(batch, num_beams, vocab) + scores[:, :, None]
        best = log_p.flatten(1).topk(num_candidates)
        parents, tokens = best.indices // vocab, best.indices % vocab
        candidates = _select(running, parents)
        candidates[:, :, prompt + length - 1] = tokens
        ends = torch.isin(tokens, eos) | (length == max_new_tokens)

        continued = (best.values + ends * EXCLUDED).topk(num_beams)
        running, scores = _select(candidates, continued.indices), continued.values
        may_end = ends & (torch.arange(num_candidates, device=device) < num_beams)
        is_closed = ~can_improve | (ended.is_valid.all(1, keepdim=True) & (early_stopping is True))
        ended_scores = best.values / length**length_penalty + is_closed * EXCLUDED + ~may_end * EXCLUDED
        ended.merge(candidates, ended_scores, length, may_end)

        longest = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
        worst = torch.where(ended.is_valid, ended.scores.amin(1, keepdim=True), EXCLUDED)
        can_improve &= (scores[:, :1] / longest**length_penalty > worst).any(1, keepdim=True)
        if not can_improve.any() or (early_stopping is True and ended.is_valid.all()) or ends.all():
            break
        decoder.reorder((prompts * num_beams + parents.gather(1, continued.indices)).flatten())
        logits = decoder.step(tokens.gather(1, continued.indices).flatten()[:, None])
    return ended.sequences[:, 0, : prompt + int(ended.lengths[:, 0].max())].to(input_ids.dtype)


def _select(sequences: Tensor, indices: Tensor) -> Tensor:
    """Select sequences (B, n, T) from (B, N, T) by indices (B, n)."""
    return sequences.gather(1, indices[:, :, None].expand(-1, -1, sequences.shape[2]))
