"""How many blocks a cache gets where nobody says: room for every stream, within a share of the memory that is free."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from peakgpt.engine.inference.block_pool import BLOCK, head_bytes
from peakgpt.engine.model.config import GPTConfig

TYPICAL = 512  # tokens of a prompt and its text; longer ones are there, and preemption is for when all are
SHARE = 0.5  # of what is free: weights are packed beside it, and steps need some


def default_blocks(
    config: GPTConfig, streams: int, dtype: torch.dtype, device: torch.device, cache: str | None = None
) -> int:
    """Blocks for `streams` sequences of TYPICAL tokens, as many as fit, and for one as long as the model takes.

    Args:
        config: of the model.
        streams: sequences that run at once.
        dtype: of keys and values, where `cache` is None.
        device: whose memory they take.
        cache: None or one of CACHES.
    """
    wanted = streams * _blocks(min(config.block_size, TYPICAL))
    fitting = int(SHARE * free_bytes(device)) // block_bytes(config, dtype, cache)
    return max(_blocks(config.block_size), min(wanted, fitting))


def block_bytes(config: GPTConfig, dtype: torch.dtype, cache: str | None = None) -> int:
    """Of one block's keys and values in all layers."""
    return 2 * config.n_layer * BLOCK * config.n_kv_head * head_bytes(config, dtype, cache)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def free_bytes(device: torch.device) -> int:
    """What a device's memory has left; on a CPU what the system gives, or the control group (cgroups(7)) if less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
            most, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
            free = min(free, max(most - used, 0))
        return free
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # not Linux: half of what there is
