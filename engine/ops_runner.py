"""What runs chunks of many sequences: the CPU program where a model can be lowered, else the model's ops.

By ops each chunk is a pass of its own, against its keys and values gathered from the blocks: for any model on any
device, but it reads the weights once a sequence, and promises no bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peakgpt.engine.paged import BLOCK, Chunk
from peakgpt.kernels.dispatch import forced_backend

if TYPE_CHECKING:
    from peakgpt.engine.model import GPT
    from peakgpt.engine.runner import Runner


def cpu_runner(model: GPT, blocks: int) -> Runner | str:
    """The CPU program with a copy of the weights; or why there is none."""
    if forced_backend() not in (None, "cpu"):
        return f"backend {forced_backend()!r} is asked for"
    try:
        from peakgpt.engine.runner import Runner

        return Runner(model, blocks=blocks)
    except (ImportError, NotImplementedError) as error:
        return str(error)


def runner_for(model: GPT, blocks: int) -> Runner | OpsRunner:
    """The fastest that a model has here."""
    runner = cpu_runner(model, blocks)
    return OpsRunner(model, blocks=blocks, reason=runner) if isinstance(runner, str) else runner


class OpsMemory:
    """Keys and values of all layers in blocks, (L, blocks, BLOCK, K, D) each."""

    def __init__(self, model: GPT, blocks: int):
        c, weight = model.config, model.transformer.wte.weight
        shape = c.n_layer, blocks, BLOCK, c.n_kv_head, c.head_dim
        self.blocks = blocks
        self.keys, self.values = (torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in "kv")

    def copy(self, source: int, target: int) -> None:
        """Copy one block, of all layers."""
        for memory in (self.keys, self.values):
            memory[:, target] = memory[:, source]


class OpsRunner:
    """A model as it is, with the cache of all its sequences; see Runner."""

    def __init__(self, model: GPT, *, blocks: int, reason: str = ""):
        self.model, self.config, self.memory = model, model.config, OpsMemory(model, blocks)
        self.reason = reason  # for not being the CPU program

    @torch.no_grad()
    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks, one by one; returns (sum of `logits`, V) float32, each chunk's last tokens in order."""
        for chunk in chunks:
            chunk.check(self.config, self.memory.blocks)
        rows = []
        for chunk in chunks:
            ids = torch.as_tensor(chunk.ids, dtype=torch.int64, device=self.memory.keys.device)
            h = self.model.features(ids[None], _View(self.memory, chunk))[0]  # (T, C)
            rows.append(self.model.head(h[len(h) - chunk.logits :]).float())
        return torch.cat(rows)


class _View:
    """A chunk's part of the memory, as a cache that the model's layers know (engine/cache.py)."""

    def __init__(self, memory: OpsMemory, chunk: Chunk):
        self.memory, self.length = memory, chunk.past
        self.blocks = torch.tensor(list(chunk.blocks), device=memory.keys.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, (1, T, K, D); returns all keys and values, (1, S, K, D)."""
        end = self.length + k.shape[1]
        at = torch.arange(self.length, end, device=k.device)
        block, place, found = self.blocks[at // BLOCK], at % BLOCK, []
        for memory, new in ((self.memory.keys[layer], k), (self.memory.values[layer], v)):
            memory[block, place] = new[0]
            found.append(memory[self.blocks].flatten(0, 1)[None, :end])
        return found[0], found[1]
