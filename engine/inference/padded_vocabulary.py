"""Ids of a model without a token: Pythia's head has 50304 rows, its tokenizer 50277 tokens.

Such rows were not trained, and their text is empty. They are not sampled, unless a request asks for one by its bias or
its choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.inference.sequence import RunningSequence


class PaddedVocabulary:
    """The ids below vocab_size that a tokenizer does not have."""

    def __init__(self, vocab_size: int, tokenizer: Tokenizer | None, device: torch.device):
        known = set(range(vocab_size) if tokenizer is None else tokenizer.library.get_vocab().values())
        padding = [token for token in range(vocab_size) if token not in known]
        self.padding, self._ids = frozenset(padding), torch.tensor(padding, dtype=torch.int64, device=device)

    def mask(self, logits: Tensor, rows: Sequence[tuple[RunningSequence, Tensor]]) -> None:
        """Set the logits of padded ids to -inf, in place.

        Args:
            logits: (B, V).
            rows: each sequence with its rows, which are views of `logits`.
        """
        asked = [(z, ids, z[:, ids]) for sequence, z in rows if (ids := self._asked(sequence))]
        logits.index_fill_(1, self._ids, float("-inf"))
        for z, ids, values in asked:
            z[:, ids] = values

    def _asked(self, sequence: RunningSequence) -> list[int]:
        """Return the padded ids that a sequence may have: those that its bias raises, and all if it has choices."""
        raised = (token for token, bias in sequence.params.logit_bias.items() if bias > 0)
        return list(self.padding if sequence.choices else self.padding.intersection(raised))
