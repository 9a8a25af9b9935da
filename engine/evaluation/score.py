"""Log-probabilities of given continuations, and the perplexity of whole texts by windows.

    log p(continuation | context) = sum_t log p(x_t | context, x_<t)      perplexity = exp(-mean_t log p(x_t | x_<t))

Common prefixes run once: the sequences form a tree (prefix_tree.py) whose nodes run as chunks of an executor's steps.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 3 (perplexity by windows); Brown et
al. 2020, arXiv:2005.14165, section 2.4 (choice by continuation).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.evaluation.prefix_tree import Node, ScoredSequence, build_trees
from peakgpt.engine.inference.block_pool import BLOCK_TOKENS, blocks_for
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.executor import make_executor
from peakgpt.engine.model.plain import Snapshot
from peakgpt.engine.model.rotary_tables import first_row
from peakgpt.engine.model.transformer import Transformer

STEP_TOKENS = 512  # maximum tokens of a step; bounds the memory of its logits, 100 MB for GPT-2's vocabulary
CACHED_SEQUENCES = 8  # sequences of block_size tokens that the KV cache holds by default


@dataclass(frozen=True)
class Score:
    """Log-probabilities of one continuation.

    Args:
        logprobs: of each of its tokens, in nats.
        greedy: whether each token is the most likely one at its position.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def mean(self) -> float:
        """Mean per token; 0 for an empty continuation."""
        return self.total / max(len(self.logprobs), 1)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one text. After the first window, a token is predicted from at least window - stride tokens."""

    nll_nats: float  # sum over tokens
    tokens: int
    window: int
    stride: int

    @property
    def value(self) -> float:
        return math.exp(self.nll_nats / self.tokens)


class Scorer:
    """A model with a KV cache that scores given texts.

    If the executor's logits do not depend on the batch, as with the C++ program, neither does any bit of a score.
    """

    def __init__(self, model: Transformer, *, blocks: int | None = None, cache: str | None = None):
        """
        Args:
            model: as for Engine.
            blocks: blocks of the KV cache; None means enough for CACHED_SEQUENCES sequences of block_size tokens.
            cache: None or "int8", as for Engine.
        Raises:
            ValueError: too few blocks for a sequence of block_size tokens, or an unknown cache.
        """
        self.config = model.config
        min_blocks = blocks_for(self.config.block_size) + 1  # one for a copied block, see _allocate
        blocks = CACHED_SEQUENCES * min_blocks if blocks is None else blocks
        if blocks < min_blocks:
            raise ValueError(f"scorer: blocks is {blocks}, expected at least {min_blocks}")
        self._memory = blocks, cache
        self._prepare(model)

    def _prepare(self, model: Transformer) -> None:
        (blocks, cache), self.snapshot = self._memory, Snapshot(model)
        self.executor = None  # frees the KV cache of the one before
        self.executor = make_executor(model, blocks, cache_dtype=cache)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Score continuations.

        Args:
            pairs: token ids of (context, continuation); a context has at least one token, both together block_size + 1
                at most.
        Returns:
            One score per pair, in order.
        Raises:
            ValueError: an empty context, too many tokens, or tokens outside the vocabulary.
        """
        if not self.snapshot.is_current:  # its modules or weights were hooked or replaced
            self._prepare(self.snapshot.model)
        sequences = [ScoredSequence(self._checked(*pair), len(pair[0])) for pair in pairs]
        to_score = (sequence for sequence in sequences if sequence.first_scored < len(sequence.token_ids))
        groups: dict[int, list[ScoredSequence]] = {}  # texts with different angles have no common keys
        for sequence in sorted(to_score, key=lambda sequence: sequence.token_ids):
            row = first_row(self.config.switch_length, len(sequence.token_ids) - 1)
            groups.setdefault(row, []).append(sequence)
        with torch.inference_mode():
            for ordered in groups.values():
                for roots in build_trees(ordered, self.executor.kv_cache.num_blocks):
                    self._run(roots)
        return [Score(tuple(sequence.logprobs), tuple(sequence.is_greedy)) for sequence in sequences]

    def perplexity(self, ids: Sequence[int], *, window: int | None = None, stride: int | None = None) -> Perplexity:
        """Score every token of a text once, except the first.

        Args:
            ids: at least two tokens.
            window: maximum number of tokens that the model reads at once; None means block_size.
            stride: number of tokens that the window moves and that are scored at its end; None means window / 2. With
                window None a larger stride than block_size - 1 is capped to it; the result says so.
        Raises:
            ValueError: too few tokens, or window and stride out of range.
        """
        if window is None:
            window = self.config.block_size
            stride = None if stride is None else min(stride, window - 1)
        stride = max(window // 2, 1) if stride is None else stride
        if not 1 < window <= self.config.block_size or not 0 < stride < window:
            raise ValueError(
                f"perplexity: window is {window} and stride {stride}, expected a window of 2 to block_size "
                f"{self.config.block_size} and a stride below it"
            )
        if len(ids) < 2:
            raise ValueError(f"perplexity: got {len(ids)} tokens, expected at least 2")
        ends = [*range(min(window, len(ids)), len(ids), stride), len(ids)]
        begins = [1, *ends[:-1]]
        scores = self.score([(ids[max(end - window, 0) : begin], ids[begin:end])
                             for begin, end in zip(begins, ends, strict=True)])  # fmt: skip
        return Perplexity(-math.fsum(score.total for score in scores), len(ids) - 1, window, stride)

    def _checked(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        ids = [*map(int, context), *map(int, continuation)]
        limit, vocab = self.config.block_size, self.config.vocab_size
        if not len(context) or len(ids) > limit + 1:
            raise ValueError(
                f"score: got a context of {len(context)} tokens and a continuation of {len(continuation)}, expected a "
                f"context of at least 1, and at most block_size {limit} + 1 together"
            )
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(f"score: ids from {min(ids)} to {max(ids)}, expected 0 to vocab_size {vocab} - 1")
        return ids

    def _run(self, roots: list[Node]) -> None:
        """Run the nodes of a tree, parents first, in steps of at most STEP_TOKENS tokens."""
        ready = deque((node, node.begin) for node in roots)
        free_blocks = iter(range(self.executor.kv_cache.num_blocks))
        while ready:
            step, tokens_left = [], STEP_TOKENS  # (node, first token, end)
            while ready and tokens_left:
                node, begin = ready.popleft()
                if not node.block_table:
                    self._allocate(node, free_blocks)
                end = min(node.end, begin + tokens_left)
                tokens_left -= end - begin
                step.append((node, begin, end))
                if end < node.end:
                    ready.appendleft((node, end))
                    break
            chunks = [
                Chunk(
                    node.token_ids[begin:end], begin, node.block_table, end - _first_row(node, begin, end),
                    len(node.token_ids) - 1,
                )
                for node, begin, end in step
            ]  # fmt: skip
            self._record(self.executor.step(chunks), step)
            ready.extend((child, child.begin) for node, _, end in step if end == node.end for child in node.children)

    def _allocate(self, node: Node, free_blocks: Iterator[int]) -> None:
        """Take the parent's full blocks, then own blocks; copy the parent's last block if it is not full."""
        parent, full = node.parent, node.begin // BLOCK_TOKENS
        own_blocks = (next(free_blocks) for _ in range(node.num_own_blocks))
        node.block_table = [*(parent.block_table[:full] if parent else ()), *own_blocks]
        if parent and node.begin % BLOCK_TOKENS:
            self.executor.kv_cache.copy_block(parent.block_table[full], node.block_table[full])

    def _record(self, logits: Tensor, step: list[tuple[Node, int, int]]) -> None:
        """Append the log-probabilities of a step's tokens to the sequences through its nodes."""
        first_row, rows, targets, owners = 0, [], [], []
        for node, begin, end in step:
            first = _first_row(node, begin, end)
            for sequence in node.sequences:
                positions = range(max(first, sequence.first_scored - 1), min(end, len(sequence.token_ids) - 1))
                rows += [first_row + position - first for position in positions]
                targets += [sequence.token_ids[position + 1] for position in positions]
                owners += [sequence] * len(positions)
            first_row += end - first
        for sequence, logprob, is_greedy in zip(owners, *_gather(logits, rows, targets), strict=True):
            sequence.logprobs.append(logprob)
            sequence.is_greedy.append(is_greedy)


def _first_row(node: Node, begin: int, end: int) -> int:
    """Return the first position of begin .. end whose logits are needed."""
    return max(min(node.first_logit, end), begin)


def _gather(logits: Tensor, rows: list[int], targets: list[int]) -> tuple[list[float], list[bool]]:
    """Return the log-probabilities of targets in rows of logits, and whether each is the largest of its row."""
    if not rows:
        return [], []
    row, target = (torch.tensor(values, device=logits.device) for values in (rows, targets))
    # log_softmax computes a row on one thread, so its bits do not depend on the number of rows.
    return logits.log_softmax(-1)[row, target].tolist(), (logits.argmax(-1)[row] == target).tolist()


def text_perplexity(
    scorer: Scorer, tokenizer: Tokenizer, text: str, *, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """Return the perplexity of a text, after `Tokenizer.context_ids`, which give its first token a context.

    Args:
        text: at least one character.
        window, stride: see `Scorer.perplexity`.
    Raises:
        ValueError: the text is empty, the tokenizer has no context for it, or see `Scorer.perplexity`.
    """
    if not text:
        raise ValueError("perplexity: got an empty text, expected at least one character")
    ids = [*tokenizer.context_ids, *tokenizer.encode(text, add_special_tokens=False)]
    return scorer.perplexity(ids, window=window, stride=stride)
