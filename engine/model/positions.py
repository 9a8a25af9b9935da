"""Where the tokens of one forward pass stand, made once and read by every layer's attention.

    learned: row position_offset + p of the table      rotary: angle of pair i is p * base^(-2 i / R), R = rotary_dim
    alibi:   slope of head h of n, n a power of two, is 2^(-8 (h + 1) / n); other counts take the slopes of the power
             of two below, then every other one of that above
    transformer_xl, relative_bias: engine/model/relative_positions.py

p counts from the first token of the text: in a left-padded row that is p = t - start. All but the table follow
differences only, so they count from the row's first column. Su et al. 2021, "RoFormer", arXiv:2104.09864, eq. 15;
Press, Smith, Lewis 2022, arXiv:2108.12409, section 3 and their code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.relative_positions import RELATIVE, distances


class Positions(NamedTuple):
    """What attention must know beside queries, keys and values; None where it does not matter."""

    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin: (T, R / 2) float32
    interleaved: bool = False
    alibi: Tensor | None = None  # (H,) float32
    relative: Tensor | None = None  # of every distance, as engine/model/relative_positions.py says
    start: Tensor | None = None  # (B,) first live key of each left-padded sequence


def positions(config: GPTConfig, past: int, tokens: int, start: Tensor | None, device: torch.device | str) -> Positions:
    """Describe tokens past .. past + tokens - 1 of a model.

    Args:
        config: of the model.
        past: tokens before these.
        tokens: T.
        start: (B,) integers, where each left-padded sequence begins; None for no padding.
        device: of the model.
    """
    rotary = rotary_table(config.rotary_dim, config.rotary_base, past, tokens, device) if config.rotary_dim else None
    slopes = alibi_slopes(config.n_head, device) if config.position == "alibi" else None
    relative = distances(config, past + tokens, device) if config.position in RELATIVE else None
    return Positions(rotary, config.rotary_interleaved, slopes, relative, start)


def rotary_table(width: int, base: float, past: int, tokens: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin, each (tokens, width / 2) float32, of the angles from position `past` on."""
    pair = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    position = torch.arange(past, past + tokens, dtype=torch.float32, device=device)
    angle = position[:, None] * (1.0 / base**pair)
    return angle.cos(), angle.sin()


def alibi_slopes(heads: int, device: torch.device | str) -> Tensor:
    """(heads,) float32."""
    below = 2 ** math.floor(math.log2(heads))
    head = torch.arange(heads, dtype=torch.float32, device=device)
    exponent = torch.where(head < below, (head + 1) * (-8.0 / below), (2 * (head - below) + 1) * (-4.0 / below))
    return exponent.exp2()
