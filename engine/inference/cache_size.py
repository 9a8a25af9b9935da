"""Default size of the KV cache: enough for every stream, within a share of the free memory."""

from __future__ import annotations

import torch

from peakgpt.engine.inference.block_pool import BLOCK_TOKENS, blocks_for
from peakgpt.engine.inference.kv_cache import head_bytes
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.hardware.memory import available_bytes

TYPICAL_TOKENS = 512  # of a prompt and its output; if all sequences are longer, some are preempted
MEMORY_SHARE = 0.5  # of the free memory: the weights, if no file has them, and the steps need the rest


def default_blocks(
    config: GPTConfig, streams: int, dtype: torch.dtype, device: torch.device, cache_dtype: str | None = None
) -> int:
    """Return the default number of blocks: for `streams` sequences of TYPICAL_TOKENS tokens, as far as memory allows.

    There are always enough blocks for one sequence of block_size tokens.

    Args:
        config: of the model.
        streams: sequences that run at once.
        dtype: of keys and values, if `cache_dtype` is None.
        device: of the cache.
        cache_dtype: None or one of CACHE_DTYPES.
    """
    needed = streams * blocks_for(min(config.block_size, TYPICAL_TOKENS))
    fitting = int(MEMORY_SHARE * available_bytes(device)) // block_bytes(config, dtype, cache_dtype)
    return max(blocks_for(config.block_size), min(needed, fitting))


def block_bytes(config: GPTConfig, dtype: torch.dtype, cache_dtype: str | None = None) -> int:
    """Bytes of one block's keys and values in all layers."""
    return 2 * config.n_layer * BLOCK_TOKENS * config.n_kv_head * head_bytes(config, dtype, cache_dtype)
