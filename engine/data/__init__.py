"""Text, tokenizers and token shards."""
