"""Default size of the KV cache: enough for every stream, within a share of the free memory."""

import dataclasses
import os

import pytest
import torch

from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference import cache_size
from peakgpt.engine.inference.cache_size import block_bytes, default_blocks
from peakgpt.engine.inference.engine import STREAMS, Engine
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.presets import preset

CPU, GIB = torch.device("cpu"), 1 << 30
GPT2 = preset("gpt2")


@pytest.mark.parametrize(("streams", "block_size", "free", "expected"), [
    (64, 1024, 64 * GIB, 64 * 8), (64, 130, 64 * GIB, 64 * 3), (1, 1024, 64 * GIB, 16),
    (64, 1024, GIB, GIB // 2 // (2 * 12 * 64 * 768 * 2)), (64, 1024, 0, 16),
], ids=["all streams", "short sequences", "one stream", "half of free memory", "one whole sequence"])  # fmt: skip
def test_default_blocks_hold_all_streams_within_half_of_free_memory(monkeypatch, streams, block_size, free, expected):
    monkeypatch.setattr(cache_size, "available_bytes", lambda device: free)
    config = dataclasses.replace(GPT2, block_size=block_size)
    assert default_blocks(config, streams, torch.bfloat16, CPU) == expected


def test_default_cache_holds_64_streams_of_160_tokens():
    """With 4 GiB of free memory; a cache of 8 sequences of block_size tokens is too small for them."""
    assert default_blocks(GPT2, STREAMS, torch.bfloat16, CPU) >= 64 * 3 or cache_size.available_bytes(CPU) < 4 * GIB


@pytest.mark.parametrize(
    ("changes", "cache"),
    [({}, None), ({}, "int8"), ({"position": "transformer_xl"}, None)],
    ids=["program", "program, int8", "torch ops"],
)
def test_engine_uses_and_reports_the_default_cache_size(changes, cache):
    config = GPTConfig(n_layer=2, n_head=3, n_embd=24, block_size=300, vocab_size=97, **changes)
    engine = Engine(GPT(config).eval(), streams=30, cache=cache)
    assert engine.pool.num_blocks == engine.executor.kv_cache.num_blocks == 30 * 5
    size = 150 * block_bytes(config, torch.float32, cache) / (1 << 20)
    assert engine.cache_note == (
        f"cache: 150 blocks of 64 tokens, 9600 tokens in all, {size:.0f} MiB; 30 sequences of 320 tokens at once"
    )


def test_free_memory_is_positive_and_at_most_physical_memory():
    assert 0 < cache_size.available_bytes(CPU) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
