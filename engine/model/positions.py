"""Positions of the tokens of one forward pass: computed once, used by the attention of every layer.

    learned: row position_offset + p of the table      rotary: pair i turns by p f_i, see rotary_tables.py
    alibi:   the slope of head h of n, n a power of two, is 2^(-8 (h + 1) / n); another n uses the slopes of the power
             of two below it, then every second slope of the power of two above it; each times alibi_scale
    transformer_xl, relative_bias: engine/model/relative_positions.py

p counts from the first token of the sequence: p = t - start in a left-padded row. Only the learned table needs p; the
others depend on differences of positions, so they count from the first column. In a row of packed documents p counts
from the first token of each document (`packed_positions`). Su et al. 2021, "RoFormer", arXiv:2104.09864, eq. 15; Press,
Smith, Lewis 2022, arXiv:2108.12409, section 3 and their code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.relative_positions import RELATIVE, distances
from peakgpt.engine.model.rotary_tables import Tables, batch_tables, document_tables
from peakgpt.kernels.core.check import readable


class Positions(NamedTuple):
    """Inputs of attention that depend on positions; each is None if the model does not use it."""

    rotary: Tables = ()  # the tables of GPTConfig.rotary_table: cos, sin, (T, R / 2) or (B T, R / 2) float32
    interleaved: bool = False  # which features are a rotary pair: GPTConfig.rotary_interleaved
    alibi: Tensor | None = None  # slopes, (H,) float32
    relative: Tensor | None = None  # one entry a distance, see relative_positions.distances
    start: Tensor | None = None  # (B,) first token of each left-padded sequence
    cu_seqlens: Tensor | None = None  # (N + 1,) int32 starts of packed documents, see kernels/ops/attention.py

    @property
    def need_unpacked_qkv(self) -> bool:
        """Whether attention needs q, k and v as separate tensors."""
        return self.alibi is not None or self.start is not None or self.relative is not None


NO_POSITIONS = Positions()


def make_positions(
    config: GPTConfig, past: int, tokens: int, start: Tensor | None, device: torch.device | str, text_tokens: int = 0
) -> Positions:
    """Compute what attention needs for the tokens past .. past + tokens - 1.

    Args:
        config: of the model.
        past: number of tokens before these.
        tokens: T.
        start: (B,) integers, first token of each left-padded sequence; None without padding.
        device: of the model.
        text_tokens: of the whole text, if more follow after these; 0: none do.
    Raises:
        ValueError: a text with cached keys becomes longer than GPTConfig.switch_length.
    """
    rotary = batch_tables(config, past, tokens, start, device, text_tokens) if config.rotary_dim else ()
    slopes = model_slopes(config, device)
    relative = distances(config, past + tokens, device) if config.position in RELATIVE else None
    return Positions(rotary, config.rotary_interleaved, slopes, relative, start)


def packed_positions(config: GPTConfig, position_ids: Tensor) -> Positions:
    """Compute what attention needs for rows of packed documents that do not attend to each other.

    Shapes do not depend on the number of documents, and no value is read, so that a CUDA graph can repeat it.

    Args:
        config: of the model.
        position_ids: (B, T) integers, position of each token in its document. A document starts at each 0, and with
            each row.
    Returns:
        The positions of the B * T tokens as one sequence, as `attention` takes packed documents. cu_seqlens has B * T
        entries more than needed for one document; unused ones are B * T.
    Raises:
        ValueError: a model with relative positions.
    """
    refuse_relative_positions(config)
    count, device = position_ids.numel(), position_ids.device
    slopes = model_slopes(config, device)
    is_start = position_ids == 0
    is_start[:, 0] = True
    index = torch.arange(count, dtype=torch.int32, device=device)
    starts = index.masked_fill(~is_start.flatten(), count).sort().values
    rotary = document_tables(config, position_ids.flatten(), is_start.flatten()) if config.rotary_dim else ()
    return Positions(rotary, config.rotary_interleaved, slopes, cu_seqlens=F.pad(starts, (0, 1), value=count))


def refuse_relative_positions(config: GPTConfig) -> None:
    """Raise ValueError for a model that cannot take packed documents: its bias covers every pair of tokens."""
    if config.position in RELATIVE:
        raise ValueError(f"GPT: got packed documents with position {config.position}, expected learned, rotary, alibi")


def model_slopes(config: GPTConfig, device: torch.device | str) -> Tensor | None:
    """Return the ALiBi slope of each head of a model, (H,) float32; None for a model with other positions."""
    return alibi_slopes(config.n_head, device) * config.alibi_scale if config.position == "alibi" else None


def alibi_slopes(heads: int, device: torch.device | str) -> Tensor:
    """Return the ALiBi slope of each head, (heads,) float32."""
    below = 2 ** math.floor(math.log2(heads))
    head = torch.arange(heads, dtype=torch.float32, device=device)
    exponent = torch.where(head < below, (head + 1) * (-8.0 / below), (2 * (head - below) + 1) * (-4.0 / below))
    return exponent.exp2()


def left_padding_start(attention_mask: Tensor, input_ids: Tensor) -> Tensor | None:
    """Convert the attention mask of left-padded sequences to the index of each first token.

    Args:
        attention_mask: (B, T) integers or bools; in each row zeros for the padding, then ones.
        input_ids: (B, T).
    Returns:
        (B,) int64; None if a mask on the CPU has no padding.
    Raises:
        ValueError: another shape; or, on the CPU, a row that is not zeros followed by at least one 1. Values on another
            device are not checked, since reading them would wait for it.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        is_tensor = isinstance(attention_mask, Tensor)
        got = f"shape {tuple(attention_mask.shape)}" if is_tensor else f"{attention_mask!r:.60}"
        raise ValueError(f"attention_mask: got {got}, expected the shape of input_ids, {tuple(input_ids.shape)}")
    mask = attention_mask.long()
    if readable(mask):
        is_left_padding = ((mask == 0) | (mask == 1)).all(1) & (mask.diff(dim=1) >= 0).all(1) & (mask[:, -1] == 1)
        if not is_left_padding.all():
            row = int(is_left_padding.logical_not().nonzero()[0])
            raise ValueError(
                f"attention_mask: row {row} is {attention_mask[row].tolist()}, expected zeros (padding on the left) "
                "and then ones"
            )
        if mask.all():
            return None
    return mask.shape[1] - mask.sum(1)
