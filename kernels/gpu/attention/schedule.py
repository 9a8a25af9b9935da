"""Which tiles attention's programs take, in what order, and how decoding cuts its keys.

Plain functions of integers. The kernels compile those that they call from this source (`triton.jit(key_tiles)`), so
what the tests run is what the GPU runs; divisions are of values that are not negative, where C and Python agree.
"""

from __future__ import annotations

SPLIT = 256  # keys a part of a decoded row; what a row adds up, and in what order, follows from this and nothing else
DECODE_ROWS = 16  # of a tile of decoding: the fewest that a matrix instruction takes


# ---- which tiles a program visits ----


def key_bounds(i0, last, offset, window, lo, hi, full_lo, full_hi, causal):
    """(need_lo, need_hi, full_lo, full_hi): queries i0..last see keys of need_lo..need_hi-1, all of them the full ones.

    Args:
        offset: S - T: query i stands at i + offset.
        lo, hi: keys lo..hi-1 are seen by some of the queries, as far as sequence and documents say.
        full_lo, full_hi: those that are seen by all of them, likewise.
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
    """(need_lo, need_hi, full_lo, full_hi): keys j0..last are seen by queries of need_lo..need_hi-1.

    Args:
        offset: S - T.
        lo, hi: queries lo..hi-1 see some of the keys, as far as documents say.
        full_lo, full_hi: those that see all of them, likewise.
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
    """(first, full_first, full_end, end): tiles first..end-1 hold need_lo..need_hi-1; the middle ones lie in full."""
    first = need_lo // block
    end = max(first, (need_hi + block - 1) // block)
    if need_hi <= need_lo:
        end = first
    full_first = min(max((full_lo + block - 1) // block, first), end)
    full_end = min(max(max(full_hi, 0) // block, full_first), end)
    return first, full_first, full_end, end


# ---- in what order ----


def place(program, blocks, heads, section):
    """(head, turn) of a program: heads in sections, within a section the first turn of every head before the second.

    The first turn is the one with the most tiles, so the last programs to start are short and all processors end at
    about the same time; a section's keys and values fit in the second-level cache.
    """
    first = program // (blocks * section) * section
    size = min(section, heads - first)
    rest = program % (blocks * section)
    return first + rest % size, rest // size


def section(head_bytes: int, cache_bytes: int, group: int) -> int:
    """Query heads of a section: as many as share half the cache with what streams through it.

    Args:
        head_bytes: keys and values of one key head.
        group: query heads a key head.
    """
    return group * max(1, cache_bytes // 2 // max(1, head_bytes))


# ---- decoding ----


def decode_slots(queries: int, batch: int, group: int) -> int:
    """Tiles of rows at most, where only the device knows how many queries each sequence has."""
    return queries * group // DECODE_ROWS + batch


def slot_start(b, first, group, rows):
    """First slot of sequence b, whose first query is `first`: behind all rows before it, rounded up a sequence."""
    return first * group // rows + b


def decode_parts(slots: int, kv_heads: int, splits: int, processors: int) -> int:
    """Programs that share the splits of one tile: enough for eight on every processor, if there are as many splits."""
    return max(1, min(splits, -(-8 * processors // max(1, slots * kv_heads))))


def decode_batches(slots: int, slot_bytes: int, limit_bytes: int) -> list[tuple[int, int]]:
    """(first slot, count) of each launch, so that what the parts leave for the merge stays within the limit."""
    count = max(1, limit_bytes // max(1, slot_bytes))
    return [(first, min(count, slots - first)) for first in range(0, slots, count)]
