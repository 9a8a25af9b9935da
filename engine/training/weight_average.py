"""An exponential moving average of the weights, in float32: the model that a run validates and saves.

    average = average + (1 - d_t) (weights - average) after update t        d_t = min(decay, (1 + t) / (10 + t))

The average starts as the initial weights. The smaller decay of the first updates lets it leave them quickly: 10 to 90
updates replace 90 % of them, as in TensorFlow's ExponentialMovingAverage with num_updates. Polyak, Juditsky 1992,
"Acceleration of Stochastic Approximation by Averaging"; for language models: Li et al. 2025, arXiv:2505.12082.

The average of a parameter is the entry "average" of its state in the optimizer: it is saved, loaded and captured with
the moments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peakgpt.engine.training.optimizer_state import AVERAGE, master_of


class WeightAverage:
    """The average of the parameters of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float):
        self.optimizer, self.decay = optimizer, decay
        for parameter in self._parameters():
            state = optimizer.state[parameter]
            state[AVERAGE] = master_of(parameter, state).detach().clone()
        # A tensor on the device: a CUDA graph reads the new value at every replay.
        self.weight = torch.zeros((), device=next(self._parameters()).device)

    def set_step(self, step: int) -> None:
        """Set the weight of the next update, counted from 0."""
        self.weight.fill_(1.0 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights, after an update of the optimizer."""
        for parameter in self._parameters():
            state = self.optimizer.state[parameter]
            state[AVERAGE].lerp_(master_of(parameter, state), self.weight.to(state[AVERAGE].dtype))

    def check(self) -> None:
        """Raise ValueError if a loaded state has no average."""
        if any(AVERAGE not in self.optimizer.state[parameter] for parameter in self._parameters()):
            raise ValueError("WeightAverage: got an optimizer state without averages, expected one with ema_decay")

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's state dict with the averages instead of the parameters."""
        weights, averaged = dict(model.state_dict()), set(self._parameters())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in averaged and name in weights:
                weights[name] = self.optimizer.state[parameter][AVERAGE]
        return weights

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the parameters the values of the average until the end of the block; takes the memory of a copy."""
        kept = [(parameter, parameter.detach().clone()) for parameter in self._parameters()]
        with torch.no_grad():
            for parameter, _ in kept:
                parameter.copy_(self.optimizer.state[parameter][AVERAGE])
            try:
                yield
            finally:
                for parameter, value in kept:
                    parameter.copy_(value)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad)
