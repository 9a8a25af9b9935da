"""A batch of texts that grow by one token each at a time, on the way that is fastest for a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from peakgpt.engine.cache import KVCache
from peakgpt.engine.ops_runner import cpu_runner
from peakgpt.engine.paged import BLOCK, BlockPool, Chunk

if TYPE_CHECKING:
    from peakgpt.engine.model import GPT
    from peakgpt.engine.runner import Runner

PAYS = 8  # new tokens from which packing a model's weights, 0.1 s for GPT-2 124M, costs less than it saves


class Stepper(Protocol):
    """Runs tokens of a batch against what came before."""

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, T) new tokens -> (B, V), the logits of the last ones."""

    def reorder(self, parents: Tensor) -> None:
        """Continue text i from where text parents[i] is now; there may be more of them than before."""


def stepper(
    model: GPT, batch: int, tokens: int, new: int, start: Tensor | None, *, beams: int = 1
) -> Stepper:
    """Choose the way: one C++ program on the CPU where the model can be lowered and `new` tokens pay for it, else ops.

    The program's copy of the weights is made here and lives as long as the texts: it can not be stale.

    Args:
        batch: B texts.
        tokens: how long they become at most, the prompt counted.
        new: how many of those come one at a time.
        start: (B,) where left-padded prompts begin, or None.
        beams: how many texts a prompt is continued by at most.
    """
    if new >= PAYS:
        runner = cpu_runner(model, batch * beams * -(-tokens // BLOCK))
        if not isinstance(runner, str):
            return PagedStepper(runner, batch, start)
    return CachedStepper(model, batch, tokens, start)


class CachedStepper:
    """By the model's ops, on any device."""

    def __init__(self, model: GPT, batch: int, tokens: int, start: Tensor | None):
        weight = model.transformer.wte.weight
        self.model, self.start = model, start
        self.cache = KVCache(model.config, batch, tokens, dtype=weight.dtype, device=weight.device)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.model.head(self.model.features(ids, self.cache, self.start)[:, -1])

    def reorder(self, parents: Tensor) -> None:
        self.cache.keys, self.cache.values = self.cache.keys[:, parents], self.cache.values[:, parents]
        self.start = None if self.start is None else self.start[parents]


class PagedStepper:
    """By the CPU program; texts that share their past share its blocks."""

    def __init__(self, runner: Runner, batch: int, start: Tensor | None):
        self.runner, self.pool = runner, BlockPool(runner.memory.blocks, BLOCK)
        self.start = [0] * batch if start is None else start.tolist()
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.past = [0] * batch

    def __call__(self, ids: Tensor) -> Tensor:
        rows = ids.tolist()
        if not any(self.past):
            rows = [row[first:] for row, first in zip(rows, self.start, strict=True)]
        chunks = []
        for text, row in enumerate(rows):
            table, past = self.tables[text], self.past[text]
            while len(table) * self.pool.block < past + len(row):
                table.append(self.pool.allocate())
            chunks.append(Chunk(row, past, table))
            self.past[text] += len(row)
        return self.runner.step(chunks)

    def reorder(self, parents: Tensor) -> None:
        order, before, past, taken = parents.tolist(), self.tables, self.past, set()
        self.tables, self.past, copies = [], [past[parent] for parent in order], []
        for child, parent in enumerate(order):
            table = list(before[parent])
            # Who writes on in a block that is not full must be alone in it: the first child is, the others copy it.
            alone = past[parent] // self.pool.block if parent in taken else len(table)
            taken.add(parent)
            for block in table[:alone]:
                self.pool.share(block)
            copies += [(child, i) for i in range(alone, len(table))]
            self.tables.append(table)
        for table in before:
            for block in table:
                self.pool.release(block)
        for child, i in copies:
            block = self.pool.allocate()
            self.runner.memory.copy(self.tables[child][i], block)
            self.tables[child][i] = block
