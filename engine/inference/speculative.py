"""Speculative decoding: proposals of the next tokens, which the engine checks in one step. The output stays the same.

A decoding step costs as much as reading the weights: one step for eight tokens costs little more than for one. The
engine samples each token by its own rule from the model's own logits, and continues while the draft agrees.

Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192; here the
tokens are the same as without a draft, not only their distribution. Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from peakgpt.engine.inference.block_pool import BlockPool, blocks_for
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.executor import make_executor
from peakgpt.engine.model.rotary_tables import first_row
from peakgpt.engine.model.transformer import Transformer

NGRAM = 3  # longest run of tokens to look up: a longer match is rare, and then the last three tokens match too


@dataclass(frozen=True)
class DraftRequest:
    """A sequence that needs a draft of at most `count` tokens; `key` identifies it from step to step."""

    key: int
    token_ids: Sequence[int]
    count: int


class Speculation(Protocol):
    """Proposes tokens."""

    vocab_size: int | None  # of the draft model; None if proposals come from the sequence itself

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Return up to `count` tokens for each request."""

    def drop(self, key: int) -> None:
        """Free the state of a sequence; the key may be reused for another one."""


class PromptLookup:
    """Proposes the tokens that followed an earlier occurrence of the last few tokens."""

    vocab_size = None

    def __init__(self):
        self.indexes: dict[int, _NgramIndex] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        return [self.indexes.setdefault(r.key, _NgramIndex()).propose(r.token_ids, r.count) for r in requests]

    def drop(self, key: int) -> None:
        self.indexes.pop(key, None)


@dataclass
class _NgramIndex:
    """End of the last occurrence of each run of up to NGRAM tokens, except the run at the sequence's end."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_indexed: int = 0  # tokens

    def propose(self, token_ids: Sequence[int], count: int) -> list[int]:
        for end in range(self.num_indexed + 1, len(token_ids)):
            for n in range(1, min(NGRAM, end) + 1):
                self.ends[tuple(token_ids[end - n : end])] = end
        self.num_indexed = max(len(token_ids) - 1, 0)
        for n in range(min(NGRAM, len(token_ids)), 0, -1):
            if end := self.ends.get(tuple(token_ids[len(token_ids) - n :])):
                return list(token_ids[end : end + count])
        return []


class DraftModel:
    """Proposes the greedy output of a smaller model with the same vocabulary."""

    def __init__(self, model: Transformer, *, blocks: int | None = None):
        """
        Args:
            model: the smaller model, as for Engine.
            blocks: blocks of its KV cache; None means enough for 8 sequences of its block_size.
        """
        self.config, self.vocab_size = model.config, model.config.vocab_size
        self.executor = make_executor(model, blocks or 8 * blocks_for(model.config.block_size))
        self.pool = BlockPool(self.executor.kv_cache.num_blocks)
        self.cached_ids: dict[int, list[int]] = {}  # tokens whose keys and values are in the cache
        self.block_tables: dict[int, list[int]] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in requests]
        live = [i for i, request in enumerate(requests) if self._prepare(request)]
        for length in range(max((request.count for request in requests), default=0)):
            live = [i for i in live if length < requests[i].count]
            if not live:
                break
            chunks = []
            for i in live:
                key, ids = requests[i].key, [*requests[i].token_ids, *drafts[i]]
                cached = self._current_ids(key, len(ids))
                chunks.append(Chunk(ids[len(cached) :], len(cached), self.block_tables[key]))
                cached += ids[len(cached) :]
            for i, token in zip(live, self.executor.step(chunks).argmax(-1).tolist(), strict=True):
                drafts[i].append(token)
        return drafts

    def drop(self, key: int) -> None:
        self.cached_ids.pop(key, None)
        for block in self.block_tables.pop(key, ()):
            self.pool.release(block)

    def _current_ids(self, key: int, length: int) -> list[int]:
        """The cached tokens of a sequence of `length` tokens; none if it has other angles than they have."""
        cached, switch = self.cached_ids.setdefault(key, []), self.config.switch_length
        if first_row(switch, len(cached)) != first_row(switch, length):
            cached.clear()
        return cached

    def _prepare(self, request: DraftRequest) -> bool:
        """Drop rejected tokens and allocate blocks; False if the sequence is too long or the cache is full."""
        table = self.block_tables.setdefault(request.key, [])
        cached = self._current_ids(request.key, len(request.token_ids))
        pairs = enumerate(zip(cached, request.token_ids, strict=False))
        num_equal = next((i for i, (old, new) in pairs if old != new), len(cached))
        del cached[min(num_equal, len(request.token_ids) - 1) :]
        tokens = len(request.token_ids) + request.count
        while tokens <= self.config.block_size and len(table) < blocks_for(tokens):
            if (block := self.pool.allocate()) is None:
                return False
            table.append(block)
        return tokens <= self.config.block_size
