"""Executors run a model over new tokens of many sequences, against a KV cache in blocks.

    ProgramExecutor   one call of a C++ program a step, on the CPU; bits independent of the batch
    TorchExecutor     the model's torch ops, on any device; CUDA graphs for decoding on a GPU

This file is the only place that chooses between them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.graph_capture import has_graphs
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.kv_cache import KVCache
from peakgpt.engine.inference.torch_executor import TorchExecutor
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.plain import change_of
from peakgpt.engine.model.relative_positions import RELATIVE
from peakgpt.engine.model.transformer import Transformer
from peakgpt.kernels.core.dispatch import forced_backend

MIN_GRAPH_TOKENS = 8  # new tokens from which on CUDA graphs are made: the third step of one size is captured
MAX_IDLE_SHARE = 1 / 8  # of a GPU's memory, for the KV cache of an executor that waits for the model's next call

# Executors with CUDA graphs, kept for the model's next `generate`: a capture takes as long as a few tokens without one.
_idle_executors: weakref.WeakKeyDictionary[Transformer, TorchExecutor] = weakref.WeakKeyDictionary()


class Executor(Protocol):
    """A model that is ready to run, with the KV cache of all its sequences."""

    config: GPTConfig
    kv_cache: KVCache
    note: str  # why the C++ program does not run the model; empty if it does

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run new tokens of several sequences.

        Returns:
            (sum of num_logits, V) float32: the rows of each chunk's last tokens, in order.
        Raises:
            ValueError: a token outside the vocabulary, more tokens than block_size, or too few blocks.
        """

    def hidden_states(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run new tokens as `step` does, without the head.

        Returns:
            (sum of num_logits, C) float32: what the head would read for these rows.
        """

    def decode(self, input_ids: Tensor, positions: np.ndarray, block_tables: np.ndarray) -> Tensor:
        """Run one new token of each of B sequences.

        Args:
            input_ids: (B,) integers on the model's device.
            positions: (B,) position of each token in its sequence.
            block_tables: (B, W) int32 with W = blocks_for(block_size).
        Returns:
            (B, V); the next call may overwrite it.
        """


def make_executor(model: Transformer, num_blocks: int, *, cache_dtype: str | None = None) -> Executor:
    """Make the fastest executor that supports a model.

    Args:
        model: its weights are read in place.
        num_blocks: blocks of the KV cache.
        cache_dtype: None for the model's dtype, or "int8".
    Raises:
        ValueError: unknown cache dtype.
    """
    executor = _program_executor(model, num_blocks, cache_dtype)
    if isinstance(executor, str):
        return TorchExecutor(model, num_blocks, cache_dtype=cache_dtype, note=executor)
    return executor


def make_decode_executor(model: Transformer, num_blocks: int, new_tokens: int) -> Executor | None:
    """Make the executor for one call of `generate`; None if the torch ops on a contiguous cache are faster.

    Both executors read the model's weights in place.

    Args:
        num_blocks: blocks of the KV cache.
        new_tokens: number of decoding steps.
    """
    if change_of(model) is not None:
        return None
    if has_graphs(model.device) and model.config.position not in RELATIVE:
        return None if new_tokens < MIN_GRAPH_TOKENS else _reuse_graphs(model, num_blocks)
    executor = _program_executor(model, num_blocks, None)
    return None if isinstance(executor, str) else executor


def keep_for_reuse(model: Transformer, executor: TorchExecutor) -> None:
    """Keep an executor's graphs for the model's next call."""
    _idle_executors[model] = executor


def may_be_kept(executor: Executor) -> bool:
    """Whether the KV cache of an executor with graphs is small enough to stay allocated between calls."""
    if not isinstance(executor, TorchExecutor):
        return False
    return executor.kv_cache.nbytes <= MAX_IDLE_SHARE * _memory_bytes(executor.device)


def _program_executor(model: Transformer, num_blocks: int, cache_dtype: str | None) -> Executor | str:
    """Return an executor over the C++ program, or the reason why there is none."""
    if forced_backend() not in (None, "cpu"):
        return f"the backend is set to {forced_backend()!r}"
    try:
        from peakgpt.engine.inference.program_executor import ProgramExecutor  # needs the C++ extension

        return ProgramExecutor(model, num_blocks, cache_dtype=cache_dtype)
    except (ImportError, NotImplementedError) as error:
        return str(error)


def _reuse_graphs(model: Transformer, num_blocks: int) -> TorchExecutor:
    """Return the idle executor if its cache is large enough and its graphs stand for the model; else a new one."""
    executor = _idle_executors.pop(model, None)
    if executor is None or executor.kv_cache.num_blocks < num_blocks or not executor.snapshot.is_current:
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
            executor = TorchExecutor(model, num_blocks, keeps_model=False)
    return executor


def _memory_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory
