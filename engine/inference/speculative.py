"""Proposals of the next tokens, to be checked all at once; they change how fast a text comes, and nothing else.

Reading the weights is what a token costs: eight of them in one pass cost little more than one. The engine chooses each
token by its own rule from the model's own logits, and keeps on while the proposal was the same.

Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192; here what
is kept is what would have been chosen, not only what has the same distribution. Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from peakgpt.engine.inference.block_pool import BLOCK, BlockPool, Chunk
from peakgpt.engine.inference.ops_runner import runner_for

if TYPE_CHECKING:
    from peakgpt.engine.model.transformer import Transformer

NGRAM = 3  # tokens that are looked up at most: longer ones are rare, and where they match, three do too


@dataclass(frozen=True)
class Ask:
    """Whose next tokens are wanted, what there is so far, and how many at most."""

    key: int
    tokens: Sequence[int]
    count: int


class Speculation(Protocol):
    """Proposes tokens."""

    vocab_size: int | None  # of what it proposes from; None: of the text itself

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Up to `count` tokens for each."""

    def forget(self, key: int) -> None:
        """A text has ended; its key may come again for another one."""


class PromptLookup:
    """Proposes what followed the last few tokens where they stood before."""

    vocab_size = None

    def __init__(self):
        self.texts: dict[int, _Index] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [self.texts.setdefault(ask.key, _Index()).propose(ask.tokens, ask.count) for ask in asks]

    def forget(self, key: int) -> None:
        self.texts.pop(key, None)


@dataclass
class _Index:
    """Where each run of up to NGRAM tokens of a text last ended, its very end left out."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    seen: int = 0  # tokens that runs have been made of

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        for end in range(self.seen + 1, len(tokens)):
            for n in range(1, min(NGRAM, end) + 1):
                self.ends[tuple(tokens[end - n : end])] = end
        self.seen = max(len(tokens) - 1, 0)
        for n in range(min(NGRAM, len(tokens)), 0, -1):
            if end := self.ends.get(tuple(tokens[len(tokens) - n :])):
                return list(tokens[end : end + count])
        return []


class DraftModel:
    """Proposes the greedy text of a smaller model with the same vocabulary."""

    def __init__(self, model: Transformer, *, blocks: int | None = None):
        """
        Args:
            model: the smaller one; copied as by Engine.
            blocks: of its cache; None means enough for 8 texts as long as it takes.
        """
        self.config, self.vocab_size = model.config, model.config.vocab_size
        self.runner = runner_for(model, blocks or 8 * -(-model.config.block_size // BLOCK))
        self.pool = BlockPool(self.runner.memory.blocks, BLOCK)
        self.held: dict[int, list[int]] = {}  # tokens whose keys and values are there
        self.tables: dict[int, list[int]] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in asks]
        live = [i for i, ask in enumerate(asks) if self._ready(ask)]
        for drawn in range(max((ask.count for ask in asks), default=0)):
            live = [i for i in live if drawn < asks[i].count]
            if not live:
                break
            chunks = []
            for i in live:
                text, held = [*asks[i].tokens, *found[i]], self.held[asks[i].key]
                chunks.append(Chunk(text[len(held) :], len(held), self.tables[asks[i].key]))
                held += text[len(held) :]
            for i, token in zip(live, self.runner.step(chunks).argmax(-1).tolist(), strict=True):
                found[i].append(token)
        return found

    def _ready(self, ask: Ask) -> bool:
        """Forget what the text did not become, and take blocks; False where there is no room."""
        held, table = self.held.setdefault(ask.key, []), self.tables.setdefault(ask.key, [])
        same = next((i for i, (a, b) in enumerate(zip(held, ask.tokens, strict=False)) if a != b), len(held))
        del held[min(same, len(ask.tokens) - 1) :]
        tokens = len(ask.tokens) + ask.count
        while tokens <= self.config.block_size and len(table) * BLOCK < tokens:
            if (block := self.pool.allocate()) is None:
                return False
            table.append(block)
        return tokens <= self.config.block_size

    def forget(self, key: int) -> None:
        self.held.pop(key, None)
        for block in self.tables.pop(key, ()):
            self.pool.release(block)
