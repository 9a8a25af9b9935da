"""What runs chunks of many sequences: the CPU program where a model can be lowered, else the model's ops.

By ops all chunks go through the model together (engine/inference/paged_runner.py), but for models whose positions are
relative: there each chunk is a pass of its own, against its keys and values gathered from the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peakgpt.engine.inference.block_pool import BLOCK, Chunk
from peakgpt.engine.inference.paged_cache import PagedMemory
from peakgpt.engine.inference.paged_runner import PagedRunner
from peakgpt.engine.model.relative_positions import RELATIVE
from peakgpt.kernels.core.dispatch import forced_backend
from peakgpt.kernels.ops.attention import attention

if TYPE_CHECKING:
    from peakgpt.engine.inference.runner import Runner
    from peakgpt.engine.model.transformer import Transformer


def cpu_runner(model: Transformer, blocks: int, cache: str | None = None) -> Runner | str:
    """The CPU program with a copy of the weights; or why there is none."""
    if forced_backend() not in (None, "cpu"):
        return f"backend {forced_backend()!r} is asked for"
    try:
        from peakgpt.engine.inference.runner import Runner

        return Runner(model, blocks=blocks, cache=cache)
    except (ImportError, NotImplementedError) as error:
        return str(error)


def runner_for(model: Transformer, blocks: int, cache: str | None = None) -> Runner | PagedRunner | OpsRunner:
    """The fastest that a model has here.

    Raises:
        ValueError: an unknown cache, or one of bytes for a model that has relative positions.
    """
    runner = cpu_runner(model, blocks, cache)
    if not isinstance(runner, str):
        return runner
    if model.config.position not in RELATIVE:
        return PagedRunner(model, blocks=blocks, reason=runner, cache=cache)
    if cache:
        raise ValueError(f"cache is {cache!r} for a model with position {model.config.position!r}, expected None")
    return OpsRunner(model, blocks=blocks, reason=runner)


class OpsRunner:
    """A model as it is, with the cache of all its sequences; see Runner."""

    def __init__(self, model: Transformer, *, blocks: int, reason: str = ""):
        self.model, self.config, weight = model, model.config, model.transformer.wte.weight
        self.memory = PagedMemory(model.config, blocks, dtype=weight.dtype, device=weight.device)
        self.reason = reason  # for not being the CPU program

    @torch.no_grad()
    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks, one by one; returns (sum of `logits`, V) float32, each chunk's last tokens in order."""
        for chunk in chunks:
            chunk.check(self.config, self.memory.blocks)
        rows = []
        for chunk in chunks:
            ids = torch.as_tensor(chunk.ids, dtype=torch.int64, device=self.memory.keys.device)
            h = self.model.hidden_states(ids[None], _View(self.memory, chunk))[0]  # (T, C)
            rows.append(self.model.compute_logits(h[len(h) - chunk.logits :]).float())
        return torch.cat(rows)


class _View:
    """A chunk's part of the memory, as a cache that the model's layers know (engine/inference/kv_cache.py)."""

    def __init__(self, memory: PagedMemory, chunk: Chunk):
        self.memory, self.length = memory, chunk.past
        self.blocks = torch.tensor(list(chunk.blocks), device=memory.keys.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        """See engine/inference/kv_cache.py; of one sequence."""
        end = self.length + k.shape[1]
        at = torch.arange(self.length, end, device=k.device)
        block, place, found = self.blocks[at // BLOCK], at % BLOCK, []
        for memory, new in ((self.memory.keys[layer], k), (self.memory.values[layer], v)):
            memory[block, place] = new[0]
            found.append(memory[self.blocks].flatten(0, 1)[None, :end])
        return attention(q, *found, causal=q.shape[1] > 1, **options)
