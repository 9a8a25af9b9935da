"""The loss over validation text."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from peakgpt.engine.data.batches import validation_batches
from peakgpt.engine.data.shards import TokenShards


@torch.no_grad()
def validation_loss(model: nn.Module, shards: TokenShards, batch: int, tokens: int, *, batches: int) -> float:
    """Return the mean loss in nats per token over the start of a token stream.

    Args:
        model: called as model(ids, targets) -> mean loss, in evaluation mode.
        shards: tokens that are not trained on.
        batch, tokens: B and T.
        batches: the number of batches; fewer if the stream is shorter.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = [
        model(*(tensor.to(device) for tensor in pair))
        for pair in islice(validation_batches(shards, batch, tokens), batches)
    ]
    model.train(was_training)
    return float(torch.stack(losses).mean())
