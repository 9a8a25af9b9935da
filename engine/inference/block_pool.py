"""Keys and values of many sequences in blocks of one memory: which blocks are whose.

Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peakgpt.engine.model.config import GPTConfig

BLOCK = 64  # tokens; kCacheBlock of csrc/attention/cache_attention.h
CACHES = ("int8",)  # what a cache may hold in place of the model's dtype


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

    def check(self, config: GPTConfig, blocks: int) -> None:
        """
        Raises:
            ValueError: more tokens than block_size, too few blocks, or one that is not among `blocks`.
        """
        end = self.past + len(self.ids)
        if not 0 < end <= config.block_size or not 0 <= self.logits <= len(self.ids):
            raise ValueError(
                f"runner: {len(self.ids)} tokens after {self.past} with logits of {self.logits}, expected at least "
                f"one, at most block_size {config.block_size} in all"
            )
        if len(self.blocks) and not 0 <= min(self.blocks) <= max(self.blocks) < blocks:
            wrong = next(block for block in self.blocks if not 0 <= block < blocks)
            raise ValueError(f"runner: block {wrong}, expected 0 to {blocks - 1}")
        if len(self.blocks) * BLOCK < end:
            raise ValueError(f"runner: {len(self.blocks)} blocks of {BLOCK} tokens, expected room for {end}")


def check_cache(cache: str | None) -> None:
    """Raises ValueError where there is no such cache."""
    if cache not in (None, *CACHES):
        raise ValueError(f"cache is {cache!r}, expected None or one of {', '.join(CACHES)}")


def head_bytes(config: GPTConfig, dtype: torch.dtype, cache: str | None) -> int:
    """Of the keys, or the values, of one head of one token.

    Raises:
        ValueError: an unknown cache.
    """
    check_cache(cache)
    return config.head_dim * dtype.itemsize if cache is None else config.head_dim + 4  # a float32 scale


class BlockMemory:
    """The memory of a cache for the CPU programs; csrc/attention/cache_attention.h has the layout of a block."""

    block = BLOCK

    def __init__(self, config: GPTConfig, blocks: int, *, dtype: torch.dtype, cache: str | None = None):
        """Allocate `blocks` blocks for every layer's keys and values.

        Args:
            dtype: of the model.
            cache: what is kept of them: "int8", bytes with a scale for each head of each token; None is the dtype.
        Raises:
            ValueError: an unknown cache.
        """
        c = config
        self.blocks, self.in_bytes = blocks, cache == "int8"
        self.layer_bytes = blocks * c.n_kv_head * self.block * head_bytes(c, dtype, cache)
        # 64 bytes more: the last block is read a little past its end.
        self.keys, self.values = torch.empty(2, c.n_layer * self.layer_bytes + 64, dtype=torch.uint8).unbind()

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy(self, source: int, target: int) -> None:
        """Copy one block, of all layers."""
        for memory in (self.keys, self.values):
            blocks = memory[:-64].view(-1, self.blocks, self.layer_bytes // self.blocks)
            blocks[:, target] = blocks[:, source]


class BlockPool:
    """Which blocks are in use, by how many sequences, and which full ones hold known tokens.

    A full block is known by the digest of all tokens up to its end. One that nobody uses any longer keeps what it holds
    until it is needed, the least recently used first.
    """

    def __init__(self, blocks: int, block: int):
        """
        Args:
            blocks: how many there are.
            block: tokens in one.
        """
        self.blocks, self.block = blocks, block
        self.uses = [0] * blocks
        self.unknown = list(reversed(range(blocks)))  # free, holding nothing that can be found
        self.idle: OrderedDict[int, None] = OrderedDict()  # free, in the order of their last use
        self.known: dict[bytes, int] = {}  # digest -> block
        self.digest: dict[int, bytes] = {}  # block -> digest

    @property
    def free_blocks(self) -> int:
        return len(self.unknown) + len(self.idle)

    def allocate(self) -> int | None:
        """A block for one user, or None where all are in use."""
        if self.unknown:
            block = self.unknown.pop()
        elif self.idle:
            block, _ = self.idle.popitem(last=False)
            del self.known[self.digest.pop(block)]
        else:
            return None
        self.uses[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a block that is in use or known."""
        if not self.uses[block]:
            del self.idle[block]
        self.uses[block] += 1

    def release(self, block: int) -> None:
        """One user less."""
        assert self.uses[block] > 0
        self.uses[block] -= 1
        if not self.uses[block]:
            if block in self.digest:
                self.idle[block] = None
            else:
                self.unknown.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full block known; where another one is known by the same tokens, that one stays."""
        if digest not in self.known and block not in self.digest:
            self.known[digest], self.digest[block] = block, digest

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The known blocks of the longest prefix, each with one user more.

        Args:
            digests: of a sequence's full blocks, as `digests` makes them.
        """
        found = []
        for digest in digests:
            if (block := self.known.get(digest)) is None:
                break
            self.share(block)
            found.append(block)
        return found


def digests(ids: Sequence[int], block: int, before: Sequence[bytes] = ()) -> list[bytes]:
    """A digest for each full block of a sequence, of all tokens up to the block's end.

    Args:
        ids: the whole sequence.
        block: tokens in one.
        before: the digests of its first blocks, where they are there already.
    """
    found = list(before)
    for at in range(len(found) * block, len(ids) - block + 1, block):
        # A cryptographic digest: who sends prompts must not be able to make two prefixes look the same.
        chain = hashlib.blake2b(found[-1] if found else b"", digest_size=16)
        chain.update(array("q", ids[at : at + block]))
        found.append(chain.digest())
    return found
