"""Texts whose vectors are wanted: the hidden states of a text after the last norm, pooled to one vector.

    last    the hidden state of the last token, which has read the whole text
    mean    the mean of the hidden states of all tokens

An embedding runs in the same steps as the other requests of an engine. Tokens of a known prefix are not computed again;
for the mean, whose terms they are, only after a preemption.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.inference.sequence import Output, RunningSequence

LAST, MEAN = POOLINGS = ("last", "mean")
NO_TOKENS = SamplingParams(max_tokens=0)


@dataclass(eq=False)
class EmbeddingSequence(RunningSequence):
    """A text of `Engine.embed`: a prompt without a continuation."""

    pooling: str = LAST
    normalize: bool = True
    num_pooled: int = 0  # tokens whose hidden states are in `total`, or are not needed
    total: Tensor | None = None  # (C,) float32

    @property
    def is_complete(self) -> bool:
        return self.num_pooled == self.num_prompt

    @property
    def first_logit_position(self) -> int:
        """First position whose hidden state is still needed."""
        return self.num_pooled if self.pooling == MEAN else self.num_prompt - 1

    def add_hidden_states(self, rows: Tensor) -> None:
        """Add the hidden states of the next tokens that are needed, (n, C) float32, one by one: the order of the sum,
        and so its bits, do not depend on how a text was cut into chunks.
        """  # fmt: skip
        for row in rows:
            self.total = row.clone() if self.total is None else self.total.add_(row)
        if len(rows):
            self.num_pooled = self.num_pooled + len(rows) if self.pooling == MEAN else self.num_prompt

    def embedded(self) -> Output:
        """The text's vector as an Output.

        Raises:
            ArithmeticError: it has a NaN or an infinity.
        """
        vector = self.total / self.num_prompt if self.pooling == MEAN else self.total
        vector = (F.normalize(vector, dim=0) if self.normalize else vector).cpu()
        if not vector.isfinite().all():
            raise ArithmeticError(f"embed: the hidden states of {self.num_prompt} tokens are not finite")
        return Output(self.request.request_id, finish_reason="stop", embedding=vector)
