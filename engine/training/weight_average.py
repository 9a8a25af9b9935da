"""An exponential moving average of the weights, in float32: the model that a run validates and saves.

    average = average + (1 - d_t) (weights - average) after update t, from 0        d_t = min(decay, (1 + t) / (10 + t))

The average starts as the initial weights. The smaller d_t of the first updates makes it leave them quickly, as in
TensorFlow's ExponentialMovingAverage with num_updates. Polyak, Juditsky 1992, "Acceleration of Stochastic Approximation
by Averaging"; for language models: Li et al. 2025, "Model Merging in Pre-training", arXiv:2505.12082.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peakgpt.engine.training.optimizer import AdamW
from peakgpt.engine.training.optimizer_state import master_of


class WeightAverage:
    """The average of the parameters of an optimizer.

    Attributes:
        tensors: the average of each parameter, in the dtype of its master. They keep their memory.
    """

    def __init__(self, optimizer: AdamW, decay: float):
        self.optimizer, self.decay = optimizer, decay
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.tensors = {parameter: self._master(parameter).clone() for parameter in parameters}
        # A tensor on the device: a CUDA graph reads the new value at every replay.
        self.weight = torch.zeros((), device=parameters[0].device)

    def set_step(self, step: int) -> None:
        """Set the weight of the next update, counted from 0."""
        self.weight.fill_(1.0 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights, after an update of the optimizer."""
        for parameter, average in self.tensors.items():
            average.lerp_(self._master(parameter), self.weight.to(average.dtype))

    def _master(self, parameter: nn.Parameter) -> Tensor:
        return master_of(parameter, self.optimizer.state.get(parameter, {}))

    def named(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's state dict with the averages instead of the parameters."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, tensor in model.state_dict().items():
            yield name, self.tensors.get(parameters.get(name), tensor)

    @torch.no_grad()
    def load(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Load what `named` yields."""
        for name, parameter in model.named_parameters():
            if parameter in self.tensors:
                self.tensors[parameter].copy_(weights[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the parameters the values of the average until the end of the block; takes the memory of a copy."""
        kept = {parameter: parameter.detach().clone() for parameter in self.tensors}
        with torch.no_grad():
            for parameter, average in self.tensors.items():
                parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in kept.items():
                    parameter.copy_(value)
