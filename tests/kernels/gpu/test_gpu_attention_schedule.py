"""Attention's schedule as plain integers: all live pairs are visited, programs are unique, processors are balanced.

Mutations that these tests caught: a bound that is one too narrow or one too wide, the turns in reverse order, the last
program of a section assigned to the next section.
"""

import heapq
import itertools

import pytest
import torch

from peakgpt.kernels.ops.attention_math import live_mask

pytest.importorskip("triton")
from peakgpt.kernels.gpu.attention import schedule

RANGES = [(0, 1000), (5, 1000), (0, 9), (4, 21), (8, 8)]
SHAPES = [(16, 16), (17, 33), (33, 17), (1, 40)]
BLOCK_Q, BLOCK_K = 8, 4


def documents(starts, tokens):
    """Return the first token of each token's document, and the first token after the document."""
    if starts is None:
        return [0] * tokens, [tokens] * tokens
    inside = [max(d for d in range(len(starts) - 1) if starts[d] <= i) for i in range(tokens)]
    return [starts[d] for d in inside], [starts[d + 1] for d in inside]


def visited(over_keys, program, tokens, keys, causal, window, lo, hi, starts):
    """Return (first, full_first, full_end, end) as the kernels compute it in tile_ops.py."""
    begin, end = documents(starts, tokens)
    if over_keys:
        i0 = program * BLOCK_Q
        last = min(i0 + BLOCK_Q, tokens) - 1
        some, all_of = (lo, hi), (lo, hi)
        if starts is not None:
            some, all_of = (max(lo, begin[i0]), min(hi, end[last])), (max(lo, begin[last]), min(hi, end[i0]))
        bounds = schedule.key_bounds(i0, last, keys - tokens, window, *some, *all_of, causal)
        return schedule.tiles(*bounds, BLOCK_K)
    first, last = max(program * BLOCK_K, lo), min((program + 1) * BLOCK_K, hi) - 1
    some, all_of = (0, tokens), (0, tokens)
    if starts is not None:
        some = (begin[first], end[last]) if first <= last else (0, 0)
        all_of = (begin[last], end[first]) if first <= last else (0, 0)
    bounds = schedule.query_bounds(first, last, keys - tokens, window, *some, *all_of, causal)
    return schedule.tiles(*bounds, BLOCK_Q)


@pytest.mark.parametrize("starts", (None, [0, 3, 3, 14, 16]), ids=("one", "documents"))
@pytest.mark.parametrize("over_keys", (True, False), ids=("key_tiles", "query_tiles"))
@pytest.mark.parametrize(("causal", "window"), list(itertools.product((True, False), (None, 1, 11))))
def test_visited_tiles_cover_the_live_pairs_and_no_more(over_keys, causal, window, starts):
    for (tokens, keys), (lo, hi) in itertools.product(SHAPES if starts is None else SHAPES[:1], RANGES):
        hi = min(hi, keys)
        live = live_mask(
            torch.empty(1, tokens, 1, 1), torch.empty(1, keys, 1, 1), causal, window, torch.tensor([lo]),
            torch.tensor([hi - lo]), None if starts is None else torch.tensor(starts),
        ).expand(1, 1, tokens, keys)[0, 0]  # fmt: skip
        size, other = (BLOCK_Q, BLOCK_K) if over_keys else (BLOCK_K, BLOCK_Q)
        for program in range(-(-(tokens if over_keys else keys) // size)):
            first, full_first, full_end, end = visited(over_keys, program, tokens, keys, causal, window, lo, hi, starts)
            assert 0 <= first <= full_first <= full_end <= end
            own = slice(program * size, (program + 1) * size)
            strip = live[own] if over_keys else live[:, own].T
            touched = strip.any(0).nonzero().flatten().tolist()
            if touched and starts is None:
                assert (first, end) == (touched[0] // other, touched[-1] // other + 1)
            elif touched:  # a document inside one tile may add a tile without live pairs
                assert first <= touched[0] // other and touched[-1] // other < end
            elif starts is None:
                assert first == end
            # A key outside lo..hi-1 may see a full tile of queries: the kernel discards the sums of that key.
            inside = strip if over_keys else live[:, max(own.start, lo) : max(min(own.stop, hi), 0)].T
            assert inside[:, full_first * other : full_end * other].all()


@pytest.mark.parametrize(("blocks", "heads", "section"), [(5, 6, 2), (5, 7, 3), (1, 4, 8), (3, 1, 1), (4, 10, 4)])
def test_every_program_gets_its_own_head_and_block(blocks, heads, section):
    pairs = [schedule.assignment(program, blocks, heads, section) for program in range(blocks * heads)]
    assert sorted(pairs) == list(itertools.product(range(heads), range(blocks)))
    for (head, turn), (next_head, next_turn) in itertools.pairwise(pairs):
        same = head // section == next_head // section
        assert next_head // section - head // section == (0 if same else 1) and (not same or next_turn >= turn)


def makespan(work, workers):
    """Return the time at which the last worker ends; a free worker takes the next piece."""
    free = [0] * workers
    for piece in work:
        heapq.heappush(free, heapq.heappop(free) + piece)
    return max(free)


@pytest.mark.parametrize(("blocks", "heads"), [(16, 64), (64, 16), (128, 16), (128, 8)])
def test_causal_work_is_balanced_over_the_processors(blocks, heads):
    """132 processors end within 4 % of an even share. The order head by head takes longer."""
    pairs = [schedule.assignment(program, blocks, heads, heads) for program in range(blocks * heads)]
    work = [blocks - turn for _, turn in pairs]
    even = sum(work) / 132
    assert makespan(work, 132) < 1.04 * even
    by_head = [blocks - turn for _, turn in sorted(pairs)]
    assert makespan(by_head, 132) > makespan(work, 132)


def test_section_fills_at_most_half_of_the_cache():
    megabyte = 1 << 20
    assert schedule.section_heads(4 * megabyte, 50 * megabyte, 1) == 6
    assert schedule.section_heads(4 * megabyte, 50 * megabyte, 8) == 48
    assert schedule.section_heads(64 * megabyte, 50 * megabyte, 4) == 4
    assert schedule.section_heads(0, 50 * megabyte, 1) >= 1


@pytest.mark.parametrize("group", (1, 3, 8, 71))
def test_every_row_of_decoding_has_a_slot(group):
    for counts in ([1], [0, 5, 0, 1, 33], [16] * 4, [0, 0]):
        cu = [0, *itertools.accumulate(counts)]
        starts = [schedule.slot_start(b, cu[b], group, schedule.DECODE_ROWS) for b in range(len(counts))]
        ends = [*starts[1:], schedule.decode_slots(cu[-1], len(counts), group)]
        assert starts[0] == 0 and all(a < b for a, b in itertools.pairwise(starts))
        for count, start, end in zip(counts, starts, ends, strict=True):
            assert (end - start) * schedule.DECODE_ROWS >= count * group


@pytest.mark.parametrize(
    ("slots", "kv_heads", "splits", "parts"),
    [(1, 32, 32, 32), (8, 32, 32, 5), (256, 32, 32, 1), (1, 1, 4, 4), (1, 1, 1, 1)],
)
def test_parts_fill_the_processors(slots, kv_heads, splits, parts):
    assert schedule.decode_parts(slots, kv_heads, splits, 132) == parts


def test_batches_cover_the_slots_within_the_limit():
    assert schedule.decode_batches(10, 100, 350) == [(0, 3), (3, 3), (6, 3), (9, 1)]
    assert schedule.decode_batches(2, 1000, 350) == [(0, 1), (1, 1)]
