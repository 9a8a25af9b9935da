"""Changes of a batch's logits before a token is chosen: the repetition penalty and the bias of SamplingParams."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.engine.inference.sampling_params import SamplingParams


class LogitChanges:
    """The changes that all sequences of a batch have in common. `adjust` in sampling.py is for one sequence."""

    def __init__(self, params: SamplingParams, device: torch.device, start: Tensor | None = None):
        """
        Args:
            params: their repetition_penalty and logit_bias.
            device: of the logits.
            start: (B,) first token of each left-padded sequence: padding is not penalized. None without padding.
        """
        self.penalty, self.start = params.repetition_penalty, start
        self.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
        self.bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)

    def __call__(self, logits: Tensor, input_ids: Tensor) -> Tensor:
        """Return the changed logits.

        Args:
            logits: (B, V), or log-probabilities.
            input_ids: (B, T) int64, prompt and text so far.
        Returns:
            (B, V) float32, a new tensor.
        """
        z = logits.float()
        if self.penalty != 1.0:
            if self.start is not None:
                is_padding = torch.arange(input_ids.shape[1], device=z.device) < self.start[:, None]
                input_ids = torch.where(is_padding, input_ids[:, -1:], input_ids)  # the last token is no padding
            values = z.gather(1, input_ids)
            z = z.scatter(1, input_ids, torch.where(values < 0, values * self.penalty, values / self.penalty))
        return z.index_add(1, self.bias_ids, self.bias.expand(len(z), -1)) if len(self.bias) else z
