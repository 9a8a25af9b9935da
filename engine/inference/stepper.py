"""A batch of texts that grow by one token each at a time, on the way that is fastest for a model."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.graph_capture import has_graphs
from peakgpt.engine.inference.block_pool import BLOCK, BlockPool, Chunk
from peakgpt.engine.inference.decode_graphs import BUCKETS
from peakgpt.engine.inference.kv_cache import KVCache
from peakgpt.engine.inference.ops_runner import cpu_runner
from peakgpt.engine.inference.paged_runner import PagedRunner
from peakgpt.engine.model.relative_positions import RELATIVE

if TYPE_CHECKING:
    from peakgpt.engine.inference.runner import Runner
    from peakgpt.engine.model.transformer import Transformer

PAYS = 8  # new tokens from which packing a model's weights, 0.1 s for GPT-2 124M, costs less than it saves
KEPT_SHARE = 1 / 8  # of a GPU's memory, that a cache may take which is kept for a model's next texts

# The graphs of models, which cost as much to record as a few tokens without; taken out while they are used.
_kept: weakref.WeakKeyDictionary[Transformer, PagedRunner] = weakref.WeakKeyDictionary()


class Stepper(Protocol):
    """Runs tokens of a batch against what came before."""

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, T) new tokens -> (B, V), the logits of the last ones."""

    def reorder(self, parents: Tensor) -> None:
        """Continue text i from where text parents[i] is now; there may be more of them than before."""

    def rewind(self, tokens: int) -> None:
        """Continue all texts, if never reordered, from their first `tokens` tokens again."""


def stepper(
    model: Transformer, batch: int, tokens: int, new: int, start: Tensor | None, *, beams: int = 1
) -> Stepper:
    """Choose the way: graphs on a GPU, the C++ program on a CPU where the model can be lowered; ops where neither pays.

    The program's copy of the weights is made here and lives as long as the texts: it can not be stale. Graphs read the
    weights where they lie.

    Args:
        batch: B texts.
        tokens: how long they become at most, the prompt counted.
        new: how many of those come one at a time.
        start: (B,) where left-padded prompts begin, or None.
        beams: how many texts a prompt is continued by at most.
    """
    if new >= PAYS:
        blocks, device = batch * beams * -(-tokens // BLOCK), model.transformer.wte.weight.device
        if has_graphs(device) and model.config.position not in RELATIVE:
            return _by_graphs(model, blocks, batch, start)
        runner = cpu_runner(model, blocks)
        if not isinstance(runner, str):
            return PagedStepper(runner, batch, start)
    return CachedStepper(model, batch, tokens, start)


def _by_graphs(model: Transformer, blocks: int, batch: int, start: Tensor | None) -> PagedStepper:
    """With the graphs of the model's last texts, where its weights lie there still and the cache is large enough."""
    runner = _kept.pop(model, None)
    if runner is None or runner.memory.blocks < blocks or not runner.holds(model):
        with torch.inference_mode(False):  # or nobody outside of the caller's could write to its memory
            runner = PagedRunner(weakref.proxy(model), blocks=blocks)
    step = PagedStepper(runner, batch, start)
    if runner.memory.nbytes <= KEPT_SHARE * _memory_bytes(runner.device):
        weakref.finalize(step, _kept.__setitem__, model, runner).atexit = False
    return step


def _memory_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


class CachedStepper:
    """By the model's ops, on any device."""

    def __init__(self, model: Transformer, batch: int, tokens: int, start: Tensor | None):
        weight = model.transformer.wte.weight
        self.model, self.start = model, start
        self.cache = KVCache(model.config, batch, tokens, dtype=weight.dtype, device=weight.device)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.model.compute_logits(self.model.hidden_states(ids, self.cache, self.start)[:, -1])

    def reorder(self, parents: Tensor) -> None:
        self.cache.keys, self.cache.values = self.cache.keys[:, parents], self.cache.values[:, parents]
        self.start = None if self.start is None else self.start[parents]

    def rewind(self, tokens: int) -> None:
        self.cache.length = tokens


class PagedStepper:
    """By the CPU program or graphs; texts that share their past share its blocks."""

    def __init__(self, runner: Runner | PagedRunner, batch: int, start: Tensor | None):
        self.runner, self.pool = runner, BlockPool(runner.memory.blocks, BLOCK)
        self.start = [0] * batch if start is None else start.tolist()
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.past = [0] * batch
        self.grid: np.ndarray | None = None  # the tables, for graphs, while they stay as they are

    def __call__(self, ids: Tensor) -> Tensor:
        if isinstance(self.runner, PagedRunner) and ids.shape[1] == 1 and len(ids) <= BUCKETS[-1] and all(self.past):
            return self._decode(ids[:, 0])
        rows = ids.tolist()
        if not any(self.past):
            rows = [row[first:] for row, first in zip(rows, self.start, strict=True)]
        chunks = []
        for text, row in enumerate(rows):
            past = self._grow(text, len(row))
            chunks.append(Chunk(row, past, self.tables[text]))
        return self.runner.step(chunks)

    def rewind(self, tokens: int) -> None:
        self.past = [tokens - first for first in self.start]

    def _grow(self, text: int, new: int) -> int:
        """Count new tokens and take the blocks for them; returns how many came before."""
        table, past = self.tables[text], self.past[text]
        self.past[text] += new
        while len(table) * self.pool.block < self.past[text]:
            table.append(self.pool.allocate())
            self.grid = None
        return past

    def _decode(self, ids: Tensor) -> Tensor:
        """One token each, which the host has not seen and does not wait for."""
        places = np.array([self._grow(text, 1) for text in range(len(ids))])
        if self.grid is None:
            self.grid = np.zeros((len(ids), self.runner.graphs.width), dtype=np.int32)
            for row, table in zip(self.grid, self.tables, strict=True):
                row[: len(table)] = table
        return self.runner.decode(ids, places, self.grid)

    def reorder(self, parents: Tensor) -> None:
        order, before, past, taken = parents.tolist(), self.tables, self.past, set()
        self.tables, self.past, self.grid, copies = [], [past[parent] for parent in order], None, []
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
