"""Token shards whose ids are their positions."""

import numpy as np

from peakgpt.engine.data.shard_writer import write_shards
from peakgpt.engine.data.shards import TokenShards


def stream(folder, count, *, vocab_size=1 << 16, shard_tokens=37, name="train", end_id=None, first=0):
    """Write shards in which the token at position p is first + p, so that a batch shows its positions."""
    source = np.array_split(np.arange(first, first + count), 5)
    write_shards(folder, name, source, vocab_size, shard_tokens, text_bytes=4 * count, corpus_digest="d", end_id=end_id)
    return TokenShards.open(folder, name)
