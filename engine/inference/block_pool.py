"""The pool of KV cache blocks: reference counts, and prefix reuse by hashes.

Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 64  # tokens of a block; kCacheBlock of csrc/attention/cache_attention.h


def blocks_for(tokens: int) -> int:
    """Number of blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class BlockPool:
    """Allocates block numbers and finds full blocks by the hash of their prefix.

    A full block is known by the hash of all tokens up to its end. A free block keeps its content until it is allocated
    again; the least recently used block is allocated first.
    """

    def __init__(self, num_blocks: int, block_tokens: int = BLOCK_TOKENS):
        """
        Args:
            num_blocks: number of blocks.
            block_tokens: tokens of one block.
        """
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.ref_counts = [0] * num_blocks
        self.empty = list(reversed(range(num_blocks)))  # free blocks without known content
        self.cached: OrderedDict[int, None] = OrderedDict()  # free blocks with known content, by last use
        self.block_of: dict[bytes, int] = {}  # prefix hash -> block
        self.hash_of: dict[int, bytes] = {}  # block -> prefix hash

    @property
    def free_blocks(self) -> int:
        """Number of blocks that `allocate` can return."""
        return len(self.empty) + len(self.cached)

    def allocate(self) -> int | None:
        """Take a free block with a reference count of 1; None if all blocks are in use."""
        if self.empty:
            block = self.empty.pop()
        elif self.cached:
            block, _ = self.cached.popitem(last=False)
            del self.block_of[self.hash_of.pop(block)]
        else:
            return None
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block that is in use or has known content."""
        if not self.ref_counts[block]:
            del self.cached[block]
        self.ref_counts[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference; the last one frees the block."""
        assert self.ref_counts[block] > 0
        self.ref_counts[block] -= 1
        if not self.ref_counts[block]:
            if block in self.hash_of:
                self.cached[block] = None
            else:
                self.empty.append(block)

    def publish(self, block: int, prefix_hash: bytes) -> None:
        """Register a full block for reuse; an earlier block with the same hash stays registered instead."""
        if prefix_hash not in self.block_of and block not in self.hash_of:
            self.block_of[prefix_hash], self.hash_of[block] = block, prefix_hash

    def match_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the known blocks of the longest matching prefix, with one reference added to each.

        Args:
            hashes: `prefix_hashes` of a sequence's full blocks.
        """
        matched = []
        for prefix_hash in hashes:
            if (block := self.block_of.get(prefix_hash)) is None:
                break
            self.share(block)
            matched.append(block)
        return matched


def prefix_hashes(
    token_ids: Sequence[int], block_tokens: int, known: Sequence[bytes] = (), *, seed: bytes = b""
) -> list[bytes]:
    """Hash each full block of a sequence together with all tokens before it.

    Args:
        token_ids: the whole sequence.
        block_tokens: tokens of one block.
        known: hashes of the first blocks, if they were computed before.
        seed: whatever else the keys and values of the blocks depend on.
    """
    hashes = list(known)
    for begin in range(len(hashes) * block_tokens, len(token_ids) - block_tokens + 1, block_tokens):
        # A cryptographic hash: a client must not be able to construct two prefixes with one hash.
        chain = hashlib.blake2b(hashes[-1] if hashes else seed, digest_size=16)
        chain.update(array("q", token_ids[begin : begin + block_tokens]))
        hashes.append(chain.digest())
    return hashes
