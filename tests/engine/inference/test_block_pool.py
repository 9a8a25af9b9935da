"""BlockPool: reference counts, prefix matches, eviction order."""

import random

import pytest

from peakgpt import _C
from peakgpt.engine.inference.block_pool import BLOCK_TOKENS, BlockPool, prefix_hashes

BLOCK_SIZE = 4  # tokens per block in these tests


def test_block_size_equals_the_cpp_programs():
    assert _C.cache_block == BLOCK_TOKENS


def test_prefix_hash_depends_on_all_earlier_tokens():
    a, b = prefix_hashes([1, 2, 3, 4, 5, 6, 7, 8, 9], BLOCK_SIZE), prefix_hashes([0, 2, 3, 4, 5, 6, 7, 8], BLOCK_SIZE)
    assert len(a) == len(b) == 2 and a[0] != b[0] and a[1] != b[1]
    known = prefix_hashes(range(20), BLOCK_SIZE)
    assert prefix_hashes(range(40), BLOCK_SIZE, known) == prefix_hashes(range(40), BLOCK_SIZE)
    assert prefix_hashes([-1, 1 << 40, 0, 0], BLOCK_SIZE) and prefix_hashes([1, 2, 3], BLOCK_SIZE) == []


def test_cached_blocks_match_prefixes_and_are_evicted_least_recently_used_first():
    pool = BlockPool(3, BLOCK_SIZE)
    keys = prefix_hashes(range(12), BLOCK_SIZE)
    blocks = [pool.allocate() for _ in keys]
    assert pool.allocate() is None and pool.free_blocks == 0
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    for block in blocks:
        pool.release(block)
    assert pool.free_blocks == 3
    assert pool.match_prefix(keys) == blocks and pool.free_blocks == 0
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    assert pool.allocate() == blocks[1]  # the least recently used
    assert pool.match_prefix(keys) == blocks[:1]  # the match ends at the first evicted block
    pool.release(blocks[0])
    assert pool.allocate() == blocks[2] and pool.allocate() == blocks[0] and pool.allocate() is None


def test_shared_block_stays_until_its_last_reference_is_released():
    pool = BlockPool(2, BLOCK_SIZE)
    (key,) = prefix_hashes(range(4), BLOCK_SIZE)
    block = pool.allocate()
    pool.publish(block, key)
    assert pool.match_prefix([key]) == [block]
    pool.release(block)
    other = pool.allocate()
    assert other != block and pool.allocate() is None
    pool.publish(other, key)  # the hash is known: the first block stays registered
    pool.release(other)
    assert pool.allocate() == other and pool.match_prefix([key]) == [block]


@pytest.mark.parametrize("seed", range(3))
def test_random_use_never_loses_or_double_allocates_a_block(seed):
    rng, pool, referenced, published = random.Random(seed), BlockPool(8, BLOCK_SIZE), [], {}
    for _ in range(2000):
        if rng.random() < 0.5 and (block := pool.allocate()) is not None:
            assert block not in referenced
            published[block] = None
            referenced.append(block)
            if rng.random() < 0.6:
                published[block] = bytes([rng.randrange(20)])
                pool.publish(block, published[block])
        elif rng.random() < 0.4:
            key = bytes([rng.randrange(20)])
            matched = pool.match_prefix([key])
            assert all(published[block] == key for block in matched)
            referenced += matched
        elif referenced:
            pool.release(referenced.pop(rng.randrange(len(referenced))))
        assert pool.ref_counts == [referenced.count(block) for block in range(8)]
        assert pool.free_blocks == 8 - len(set(referenced))
        assert len({*pool.empty, *pool.cached}) == pool.free_blocks
