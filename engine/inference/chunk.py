"""One sequence's part of an executor's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from peakgpt.engine.inference.block_pool import BLOCK_TOKENS
from peakgpt.engine.model.config import GPTConfig


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence.

    Args:
        token_ids: the new tokens.
        past: number of tokens before them; their keys and values are in the cache.
        block_table: the sequence's blocks, enough for past + len(token_ids) tokens.
        num_logits: number of trailing tokens to compute logits for.
        text_tokens: tokens of the whole text, if it goes on after these.
    """

    token_ids: Sequence[int] | Tensor
    past: int
    block_table: Sequence[int]
    num_logits: int = 1
    text_tokens: int = 0

    @property
    def end(self) -> int:
        """Length of the sequence after this chunk, in tokens."""
        return self.past + len(self.token_ids)

    @property
    def length(self) -> int:
        """Length of the whole text, in tokens."""
        return max(self.end, self.text_tokens)

    def tokens(self) -> Sequence[int]:
        """The new tokens as Python integers."""
        return self.token_ids.tolist() if isinstance(self.token_ids, Tensor) else self.token_ids

    def check(self, config: GPTConfig, num_blocks: int) -> None:
        """Check the chunk against the model and the cache.

        Raises:
            ValueError: more tokens than the model's block_size, or a block table that is too short or has a block
                outside 0 .. num_blocks - 1.
        """
        new, end, table = len(self.token_ids), self.end, self.block_table
        if not 0 < end <= config.block_size or not 0 <= self.num_logits <= new:
            raise ValueError(
                f"executor: {new} tokens after {self.past} with logits of {self.num_logits}, expected at least "
                f"one, at most block_size {config.block_size} in all"
            )
        if len(table) and not 0 <= min(table) <= max(table) < num_blocks:
            wrong = next(block for block in table if not 0 <= block < num_blocks)
            raise ValueError(f"executor: block {wrong}, expected 0 to {num_blocks - 1}")
        if len(table) * BLOCK_TOKENS < end:
            raise ValueError(f"executor: {len(table)} blocks of {BLOCK_TOKENS} tokens, expected enough for {end}")


def check_token_ids(lowest: int, highest: int, vocab_size: int) -> None:
    """Check the range of token ids.

    Raises:
        ValueError: a token outside the vocabulary.
    """
    if not 0 <= lowest <= highest < vocab_size:
        raise ValueError(f"executor: ids from {lowest} to {highest}, expected 0 to vocab_size {vocab_size} - 1")
