"""The depth of each parameter, and ULMFiT's two ways to adapt lower layers less than higher ones.

    depth 0     what follows the last block: norm, untied head, a head for labels
    depth d     block L - d, for d = 1 .. L
    depth L+1   embeddings

Discriminative fine-tuning: the learning rate of depth d is lr layerwise_lr_decay^d. Gradual unfreezing: depth d trains
from the update d gradual_unfreezing steps / (L + 2) on. So with gradual_unfreezing 1 and L + 2 epochs each epoch begins
to train one more layer, as in Howard, Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
arXiv:1801.06146, sections 3.2 and 3.3, which divides the learning rate by 2.6 from layer to layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

BLOCK = re.compile(r"(?:^|\.)h\.(\d+)\.")
EMBEDDING = re.compile(r"(?:^|\.)(?:wte|wpe|ln_emb|project_in)\.")


def depths(model: nn.Module) -> dict[Tensor, int]:
    """Return the depth of each parameter of a model, whose `config` has its number of blocks."""
    layers = model.config.n_layer
    return {parameter: _depth(name, layers) for name, parameter in model.named_parameters()}


def _depth(name: str, layers: int) -> int:
    if match := BLOCK.search(name):
        return layers - int(match[1])
    return layers + 1 if EMBEDDING.search(name) else 0


def split_by_depth(
    groups: Sequence[Mapping[str, Any]], depth_of: Mapping[Tensor, int], lr: float, decay: float
) -> list[dict[str, Any]]:
    """Split parameter groups of an optimizer so that each depth has its learning rate.

    Args:
        groups: a group's `lr`, if it has one, replaces the argument.
        depth_of: of `depths`.
        lr: of depth 0.
        decay: factor on the learning rate from each depth to the next one.
    """
    split = []
    for group in groups:
        by_depth: dict[int, list[Tensor]] = {}
        for parameter in group["params"]:
            by_depth.setdefault(depth_of[parameter], []).append(parameter)
        split += [
            {**group, "params": by_depth[depth], "lr": group.get("lr", lr) * decay**depth} for depth in sorted(by_depth)
        ]
    return split


class GradualUnfreezing:
    """Freezes the lower layers of a model at first. What is frozen depends on the number of updates made alone."""

    def __init__(self, model: nn.Module, share: float):
        """
        Args:
            model: parameters that do not require gradients stay frozen.
            share: of the training, in which layers are unfrozen.
        """
        trained = {parameter: depth for parameter, depth in depths(model).items() if parameter.requires_grad}
        self._by_depth = [[p for p in trained if trained[p] == depth] for depth in range(model.config.n_layer + 2)]
        self._share = share

    def apply(self, step: int, steps: int) -> None:
        """Freeze and unfreeze parameters for update `step`, counted from 0, of `steps` planned updates."""
        for depth, parameters in enumerate(self._by_depth):
            trains = step >= math.floor(depth * self._share * steps / len(self._by_depth))
            for parameter in parameters:
                parameter.requires_grad_(trains)
