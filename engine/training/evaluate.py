"""Loss over held-out text."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from peakgpt.engine.data.shards import TokenShards, validation_windows


@torch.no_grad()
def validation_loss(model: nn.Module, shards: TokenShards, batch: int, tokens: int, *, batches: int) -> float:
    """Mean loss in nats per token over the first `batches` batches of the stream.

    Args:
        model: called as model(ids, targets) -> mean loss.
        shards: held-out tokens.
        batch, tokens: B and T.
        batches: at most this many.
    """
    device = next(model.parameters()).device
    was, _ = model.training, model.eval()
    losses = [
        model(*(t.to(device) for t in pair)) for pair in islice(validation_windows(shards, batch, tokens), batches)
    ]
    model.train(was)
    return float(torch.stack(losses).mean())
