"""Decoding by a function that runs new tokens of all streams after the past ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peakgpt.bench.contenders.contender import GreedyDecoder, Workload

# (rows (streams, T), past tokens of each stream) -> logits (streams, V) of the last rows; past 0 begins anew. The next
# call may overwrite the result.
Step = Callable[[Tensor, int], Tensor]


def stepping(step: Step, ids: Tensor, workload: Workload) -> GreedyDecoder:
    """Return the decoder of prompts, (streams, prompt)."""

    def run() -> Tensor:
        tokens = [step(ids, 0).argmax(-1)]
        for past in range(workload.prompt, workload.prompt + workload.tokens - 1):
            tokens.append(step(tokens[-1][:, None], past).argmax(-1))
        return torch.stack(tokens, 1)

    return GreedyDecoder(run, lambda text: logits_by_steps(step, ids, text))


def logits_by_steps(step: Step, ids: Tensor, text: Tensor) -> Tensor:
    """Return the logits of the tokens of a text (streams, n) after the prompts, (streams, n, V) float32."""
    logits = [step(ids, 0).to(torch.float32, copy=True)]
    for i in range(text.shape[1] - 1):
        logits.append(step(text[:, i : i + 1], ids.shape[1] + i).to(torch.float32, copy=True))
    return torch.stack(logits, 1)
