"""Runs a model over new tokens of several sequences at once, against a cache in blocks.

What a sequence gets does not depend on what runs beside it, nor on how its tokens were cut into chunks: to the last
bit (tests/engine/inference/test_runner.py), with one backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peakgpt.engine.inference.block_pool import BLOCK, BlockMemory, Chunk
from peakgpt.engine.inference.program import Lowered

if TYPE_CHECKING:
    from peakgpt.engine.model.transformer import Transformer


class Runner:
    """A model made ready to generate on the CPU, with the cache of all its sequences."""

    block = BLOCK

    def __init__(self, model: Transformer, *, blocks: int, cache: str | None = None):
        """
        Args:
            model: float32 or bfloat16 on the CPU; its weights are packed, which copies them.
            blocks: of the cache, BlockMemory.block tokens each.
            cache: None or "int8", see BlockMemory.
        Raises:
            ValueError: an unknown cache.
            NotImplementedError: the model can not be lowered; the message says why.
        """
        self.config, self.lowered = model.config, Lowered(model)
        self.memory = BlockMemory(model.config, blocks, dtype=self.lowered.dtype, cache=cache)

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks once.

        Returns:
            (sum of `logits`, V) float32: each chunk's last tokens, in order.
        Raises:
            ValueError: an id out of range, more tokens than block_size, or too few blocks.
        """
        for chunk in chunks:
            chunk.check(self.config, self.memory.blocks)
        ids, positions, begins, take, most = [], [], [0], [], max(len(chunk.blocks) for chunk in chunks)
        for chunk in chunks:
            new = chunk.ids.tolist() if isinstance(chunk.ids, Tensor) else chunk.ids
            ids += new
            end = begins[-1] + len(new)
            positions += range(chunk.past, chunk.past + len(new))
            take += range(end - chunk.logits, end)
            begins.append(end)
        if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise ValueError(f"runner: ids from {min(ids)} to {max(ids)}, expected 0 to vocab_size "
                             f"{self.config.vocab_size} - 1")  # fmt: skip
        tables = [[*chunk.blocks, *[0] * (most - len(chunk.blocks))] for chunk in chunks]
        # One tensor for all integers: five small ones cost more than everything else here.
        counts = (len(ids), len(ids), len(begins), len(chunks), len(take))
        numbers = torch.tensor([*ids, *positions, *begins, *(chunk.past for chunk in chunks), *take])
        ids_, positions_, begins_, past, selected = numbers.split(counts)
        table, logits = torch.tensor(tables, dtype=torch.int32), torch.empty(len(take), self.config.vocab_size)
        m = self.memory
        self.lowered.run(
            rows=len(ids), ids=ids_, positions=positions_, sequences=len(chunks), begins=begins_, past=past,
            tables=table, table_row=most, int8_cache=m.in_bytes, keys=m.keys, values=m.values,
            layer_bytes=m.layer_bytes, logit_rows=len(take), selected=selected, logits=logits,
        )  # fmt: skip
        return logits if self.config.logit_scale == 1.0 else logits.mul_(self.config.logit_scale)
