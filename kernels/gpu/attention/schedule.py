"""Attention's schedule: which tiles a program visits, the order of the programs, and how decoding splits its keys.

These are plain functions of integers. The kernels compile some of them from this source (`triton.jit(schedule.tiles)`),
so the tests run the code that the GPU runs. Dividends are never negative, where C and Python would round differently.
"""

from __future__ import annotations

SPLIT = 256  # keys of one split in decoding; it alone decides what a row adds up and in which order
DECODE_ROWS = 16  # rows of a decoding tile: the minimum of a matrix instruction


# ---- tiles that a program visits ----


def key_bounds(i0, last, offset, window, lo, hi, full_lo, full_hi, causal):
    """Return (need_lo, need_hi, full_lo, full_hi) for queries i0..last, with causal mask and window applied.

    At least one of the queries attends to each key of need_lo..need_hi-1; all queries attend to full_lo..full_hi-1.

    Args:
        offset: S - T; the position of query i is i + offset.
        lo, hi: keys lo..hi-1 that some of the queries may attend to, given sequence lengths and documents alone.
        full_lo, full_hi: the keys that all of the queries may attend to, likewise.
    """
    need_lo, need_hi = lo, hi
    if causal:
        need_hi = min(need_hi, last + offset + 1)
        full_hi = min(full_hi, i0 + offset + 1)
    if window is not None:
        need_lo = max(need_lo, i0 + offset - window + 1)
        full_lo = max(full_lo, last + offset - window + 1)
    return need_lo, need_hi, full_lo, full_hi


def query_bounds(j0, last, offset, window, lo, hi, full_lo, full_hi, causal):
    """Return (need_lo, need_hi, full_lo, full_hi) for keys j0..last, with causal mask and window applied.

    Queries need_lo..need_hi-1 attend to at least one of the keys; queries full_lo..full_hi-1 attend to all of them.

    Args:
        offset: S - T; the position of query i is i + offset.
        lo, hi: queries lo..hi-1 that may attend to some of the keys, given the documents alone.
        full_lo, full_hi: the queries that may attend to all of the keys, likewise.
    """
    need_lo, need_hi = lo, hi
    if causal:
        need_lo = max(need_lo, j0 - offset)
        full_lo = max(full_lo, last - offset)
    if window is not None:
        need_hi = min(need_hi, last - offset + window)
        full_hi = min(full_hi, j0 - offset + window)
    if j0 > last:
        need_hi = need_lo
    return need_lo, need_hi, full_lo, full_hi


def tiles(need_lo, need_hi, full_lo, full_hi, block):
    """Return (first, full_first, full_end, end): tiles first..end-1 cover need_lo..need_hi-1.

    Tiles full_first..full_end-1 lie inside full_lo..full_hi-1 and need no mask.
    """
    first = need_lo // block
    end = max(first, (need_hi + block - 1) // block)
    if need_hi <= need_lo:
        end = first
    full_first = min(max((full_lo + block - 1) // block, first), end)
    full_end = min(max(max(full_hi, 0) // block, full_first), end)
    return first, full_first, full_end, end


# ---- order of the programs ----


def assignment(program, blocks, heads, section):
    """Return (head, turn) of a program, turn in 0..blocks-1.

    The heads are cut into sections of `section` heads, whose keys and values fit in the L2 cache together. Within a
    section, turn 0 of all heads runs before turn 1. A head's turn 0 is the block with the most tiles. So the programs
    that start last are short, and all processors finish at about the same time.
    """
    first = program // (blocks * section) * section
    size = min(section, heads - first)
    index = program % (blocks * section)
    return first + index % size, index // size


def section_heads(head_bytes: int, cache_bytes: int, group: int) -> int:
    """Return the number of query heads in a section: their keys and values fill at most half of the cache.

    Args:
        head_bytes: size of the keys and values of one key-value head.
        cache_bytes: size of the L2 cache.
        group: query heads for each key-value head.
    """
    return group * max(1, cache_bytes // 2 // max(1, head_bytes))


# ---- decoding ----


def decode_slots(queries: int, batch: int, group: int) -> int:
    """Return an upper bound of the slots (tiles of rows) if only the device knows the queries of each sequence."""
    return queries * group // DECODE_ROWS + batch


def slot_start(b, first, group, rows):
    """Return the first slot of sequence b, whose first query is `first`; each earlier sequence may waste one slot."""
    return first * group // rows + b


def decode_parts(slots: int, kv_heads: int, splits: int, processors: int) -> int:
    """Return the number of programs that share the splits of one slot: about eight programs on each processor."""
    return max(1, min(splits, -(-8 * processors // max(1, slots * kv_heads))))


def decode_batches(slots: int, slot_bytes: int, limit_bytes: int) -> list[tuple[int, int]]:
    """Return (first slot, count) of each launch, such that the partial results of a launch fit in limit_bytes."""
    count = max(1, limit_bytes // max(1, slot_bytes))
    return [(first, min(count, slots - first)) for first in range(0, slots, count)]
