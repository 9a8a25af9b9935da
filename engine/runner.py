"""Runs a model over new tokens of several sequences at once, against a cache in blocks.

What a sequence gets does not depend on what runs beside it, nor on how its tokens were cut into chunks: to the last
bit (tests/test_runner.py), with one backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peakgpt.engine.paged import BlockMemory
from peakgpt.engine.program import Lowered
from peakgpt.kernels.cpu.ext import address

if TYPE_CHECKING:
    from peakgpt.engine.model import GPT


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence.

    Args:
        ids: the tokens.
        past: how many came before them; their keys and values are in the blocks.
        blocks: numbers of the sequence's blocks, with room for past + len(ids) tokens.
        logits: of how many of the last tokens logits are wanted.
    """

    ids: Sequence[int] | Tensor
    past: int
    blocks: Sequence[int]
    logits: int = 1


class Runner:
    """A model made ready to generate on the CPU, with the cache of all its sequences."""

    block = BlockMemory.block  # tokens

    def __init__(self, model: GPT, *, blocks: int):
        """
        Args:
            model: float32 or bfloat16 on the CPU; its weights are packed, which copies them.
            blocks: of the cache, BlockMemory.block tokens each.
        Raises:
            NotImplementedError: the model can not be lowered; the message says why.
        """
        self.config, self.lowered = model.config, Lowered(model)
        self.memory = BlockMemory(model.config, blocks, dtype=self.lowered.dtype)

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks once.

        Returns:
            (sum of `logits`, V) float32: each chunk's last tokens, in order.
        Raises:
            ValueError: an id out of range, more tokens than block_size, or too few blocks.
        """
        for chunk in chunks:
            self._check(chunk)
        ids = torch.cat([torch.as_tensor(chunk.ids, dtype=torch.int64) for chunk in chunks])
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(f"runner: ids from {int(ids.min())} to {int(ids.max())}, expected 0 to vocab_size "
                             f"{self.config.vocab_size} - 1")  # fmt: skip
        counts = [len(chunk.ids) for chunk in chunks]
        begins = torch.tensor([0, *counts]).cumsum(0)
        past = torch.tensor([chunk.past for chunk in chunks])
        positions = torch.arange(len(ids)) + (past - begins[:-1]).repeat_interleave(torch.tensor(counts))
        most = max(len(chunk.blocks) for chunk in chunks)
        tables = torch.tensor([[*chunk.blocks, *[0] * (most - len(chunk.blocks))] for chunk in chunks],
                              dtype=torch.int32)  # fmt: skip
        take = torch.cat([torch.arange(int(end) - chunk.logits, int(end))
                          for chunk, end in zip(chunks, begins[1:], strict=True)])  # fmt: skip
        logits = torch.empty(len(take), self.config.vocab_size)
        m = self.memory
        self.lowered.run(
            len(ids), address(ids), address(positions), len(chunks), address(begins), address(past), address(tables),
            most, address(m.keys), address(m.values), m.layer_bytes, len(take), address(take), address(logits),
        )  # fmt: skip
        return logits if self.config.logit_scale == 1.0 else logits.mul_(self.config.logit_scale)

    def _check(self, chunk: Chunk) -> None:
        end = chunk.past + len(chunk.ids)
        if not 0 < end <= self.config.block_size or not 0 <= chunk.logits <= len(chunk.ids):
            raise ValueError(
                f"runner: {len(chunk.ids)} tokens after {chunk.past} with logits of {chunk.logits}, expected at least "
                f"one, at most block_size {self.config.block_size} in all"
            )
        for block in chunk.blocks:
            if not 0 <= block < self.memory.blocks:
                raise ValueError(f"runner: block {block}, expected 0 to {self.memory.blocks - 1}")
        if len(chunk.blocks) * self.memory.block < end:
            raise ValueError(
                f"runner: {len(chunk.blocks)} blocks of {self.memory.block} tokens, expected room for {end}"
            )
