"""Check that left padding changes no result of a model."""

import torch
from torch import Tensor


def check_left_padding(model, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare a batch, whose second sequence has four padding tokens, with each sequence alone.

    Compares the loss, the gradients and the greedy continuation.

    Returns:
        (prompts, starts, output_ids): a padded batch, the first position of each sequence, the greedy continuation.
    """
    starts = torch.tensor([0, 4])
    mask = (torch.arange(ids.shape[1]) >= starts[:, None]).long()
    padded, padded_targets = ids.clone(), targets.clone()
    padded[1, 4:], padded_targets[1, 4:] = ids[1, :-4], targets[1, :-4]
    padded_targets[1, :4] = -100
    grads = []
    for call in (
        lambda: model(padded, padded_targets, attention_mask=mask),
        lambda: (model(ids[:1], targets[:1]) * 14 + model(ids[1:, :-4], targets[1:, :-4].contiguous()) * 13) / 27,
    ):
        model.zero_grad()
        loss = call()
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    output_ids = model.generate(padded[:, :9], (torch.arange(9) >= starts[:, None]).long(), max_new_tokens=8)
    alone = model.generate(ids[1:, :5], max_new_tokens=8)
    assert torch.equal(output_ids[1, 4:], alone[0])
    return padded[:, :9], starts, output_ids
