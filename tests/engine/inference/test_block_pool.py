"""BlockPool: reference counts, prefix matches, eviction order."""

import random

import pytest

from peakgpt import _C
from peakgpt.engine.inference.block_pool import BLOCK_TOKENS, BlockPool, prefix_hashes

BLOCKS = 4  # tokens in one, here


def test_block_size_equals_the_cpp_programs():
    assert _C.cache_block == BLOCK_TOKENS


def test_prefix_hash_depends_on_all_earlier_tokens():
    a, b = prefix_hashes([1, 2, 3, 4, 5, 6, 7, 8, 9], BLOCKS), prefix_hashes([0, 2, 3, 4, 5, 6, 7, 8], BLOCKS)
    assert len(a) == len(b) == 2 and a[0] != b[0] and a[1] != b[1]
    assert prefix_hashes(range(40), BLOCKS, prefix_hashes(range(20), BLOCKS)) == prefix_hashes(range(40), BLOCKS)
    assert prefix_hashes([-1, 1 << 40, 0, 0], BLOCKS) and prefix_hashes([1, 2, 3], BLOCKS) == []


def test_cached_blocks_match_prefixes_and_are_evicted_least_recently_used_first():
    pool = BlockPool(3, BLOCKS)
    keys = prefix_hashes(range(12), BLOCKS)
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
    assert pool.match_prefix(keys) == blocks[:1]  # what follows a block that is gone is not the same prefix
    pool.release(blocks[0])
    assert pool.allocate() == blocks[2] and pool.allocate() == blocks[0] and pool.allocate() is None


def test_shared_block_stays_until_its_last_reference_is_released():
    pool = BlockPool(2, BLOCKS)
    (key,) = prefix_hashes(range(4), BLOCKS)
    mine = pool.allocate()
    pool.publish(mine, key)
    assert pool.match_prefix([key]) == [mine]
    pool.release(mine)
    other = pool.allocate()
    assert other != mine and pool.allocate() is None
    pool.publish(other, key)  # known already: the first one stays
    pool.release(other)
    assert pool.allocate() == other and pool.match_prefix([key]) == [mine]


@pytest.mark.parametrize("seed", range(3))
def test_random_use_never_loses_or_double_allocates_a_block(seed):
    choice, pool, held, told = random.Random(seed), BlockPool(8, BLOCKS), [], {}
    for _ in range(2000):
        if choice.random() < 0.5 and (block := pool.allocate()) is not None:
            assert block not in held
            told[block] = None
            held.append(block)
            if choice.random() < 0.6:
                told[block] = bytes([choice.randrange(20)])
                pool.publish(block, told[block])
        elif choice.random() < 0.4:
            key = bytes([choice.randrange(20)])
            found = pool.match_prefix([key])
            assert all(told[block] == key for block in found)
            held += found
        elif held:
            pool.release(held.pop(choice.randrange(len(held))))
        assert pool.ref_counts == [held.count(block) for block in range(8)]
        assert pool.free_blocks == 8 - len(set(held))
        assert len({*pool.empty, *pool.cached}) == pool.free_blocks
