"""cos and sin of the angles of rotary positions, in tables with one row for each position.

    a forward pass   one row for each of its tokens; the angles of longrope depend on the length of the text
    an executor      all positions of a model at once, whose rows it looks up

With longrope a model has two sets of angles (rope_scaling.py): texts of up to GPTConfig.switch_length tokens have the
first one. Each text of a batch, and each packed document, has the set of its own length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.rope_scaling import frequencies
from peakgpt.kernels.core.check import readable

Tables = tuple[tuple[Tensor, Tensor], ...]


def rotary_tables(
    config: GPTConfig, positions: range | Tensor, device: torch.device | str, length: int | Tensor
) -> Tables:
    """Return cos and sin of the angles at some positions, for a model with rotary positions.

    Args:
        config: of the model.
        positions: T consecutive ones, or any, (T,) integers.
        device: of the result.
        length: tokens of the text, or (T,) those of the text of each position.
    Returns:
        One pair for each table of GPTConfig.rotary_table, each (T, R / 2) float32.
    """
    if isinstance(positions, range):
        positions = torch.arange(positions.start, positions.stop, dtype=torch.float32, device=device)
    bases: list[tuple[float, dict[str, Any] | None]] = [(config.rotary_base, config.rope_scaling)]
    if config.local_rotary_base is not None:
        bases.append((config.local_rotary_base, None))
    tables = []
    for base, scaling in bases:
        turn, factor = _turns(config, base, scaling, length, device)
        angle = positions.float()[:, None] * turn
        table = angle.cos(), angle.sin()
        tables.append(table if factor == 1.0 else tuple(column * factor for column in table))
    return tuple(tables)


def _turns(
    config: GPTConfig, base: float, scaling: dict[str, Any] | None, length: int | Tensor, device: torch.device | str
) -> tuple[Tensor, float]:
    """Return the angles a token, (R / 2,) or for several lengths (T, R / 2), and the factor on cos and sin."""
    if isinstance(length, int):
        return frequencies(scaling, config.rotary_dim, base, length, device)
    switch = config.switch_length
    (short, factor), (long, _) = (
        frequencies(scaling, config.rotary_dim, base, tokens, device) for tokens in (switch, switch + 1)
    )
    return torch.where(length[:, None] > switch, long, short), factor


# ---- of a forward pass


def batch_tables(
    config: GPTConfig, past: int, tokens: int, start: Tensor | None, device: torch.device | str, text_tokens: int = 0
) -> Tables:
    """Return the tables of the tokens past .. past + tokens - 1 of each text of a batch.

    Args:
        config, past, tokens, start, device, text_tokens: see `make_positions`.
    Returns:
        As `rotary_tables`. Left-padded texts that may have different sets of angles have one row for each token of the
        batch, (B T, R / 2).
    Raises:
        ValueError: a text with cached keys becomes longer than switch_length.
    """
    end, switch = past + tokens, config.switch_length
    length = max(end, text_tokens)
    if switch is None or length <= switch:
        return rotary_tables(config, range(past, end), device, length)
    if past and not text_tokens:
        _refuse_old_keys(past, end, switch, start)
    if start is None:
        return rotary_tables(config, range(past, end), device, length)
    positions = torch.arange(past, end, device=device).repeat(len(start))
    return rotary_tables(config, positions, device, (length - start).repeat_interleave(tokens))


def _refuse_old_keys(past: int, end: int, switch: int, start: Tensor | None) -> None:
    firsts = [0] if start is None else start.tolist() if readable(start) else []
    if any(0 < past - first <= switch < end - first for first in firsts):
        raise ValueError(
            f"GPT: got {end - past} tokens after {past} in the cache, expected all tokens of the text and an empty "
            f"cache: texts of more than {switch} tokens have other angles (longrope)"
        )


def document_tables(config: GPTConfig, position_ids: Tensor, is_start: Tensor) -> Tables:
    """Return the tables of packed documents.

    Args:
        config: of the model.
        position_ids: (N,) integers, position of each token in its document.
        is_start: (N,) bool, whether a document begins with the token.
    """
    if config.switch_length is None:
        return rotary_tables(config, position_ids, position_ids.device, 0)
    document = is_start.cumsum(0) - 1
    last = torch.zeros_like(position_ids).scatter_reduce(0, document, position_ids, "amax")
    return rotary_tables(config, position_ids, position_ids.device, last[document] + 1)


# ---- of an executor


def lookup_tables(config: GPTConfig, device: torch.device | str) -> Tables:
    """Return the tables of all positions of a model: position p of a text is row `first_row` + p."""
    size, switch = config.block_size, config.switch_length
    tables = rotary_tables(config, range(size), device, size)
    if switch is None:
        return tables
    short = rotary_tables(config, range(switch), device, switch)
    pairs = zip(short, tables, strict=True)
    return tuple(tuple(torch.cat(columns) for columns in zip(*pair, strict=True)) for pair in pairs)


def first_row(switch_length: int | None, length: int) -> int:
    """Return the row of a text's first position in `lookup_tables`.

    Args:
        switch_length: of GPTConfig.
        length: tokens of the text.
    """
    return switch_length if switch_length is not None and length > switch_length else 0
