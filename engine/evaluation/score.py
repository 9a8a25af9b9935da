"""Log-probabilities of given texts: continuations, and whole texts by windows.

    log p(continuation | context) = sum_t log p(x_t | context, x_<t)      perplexity = exp(-mean_t log p(x_t | x_<t))

What several texts begin with is run once: they make a tree of tokens, whose nodes run as chunks beside each other, each
against the blocks of the nodes above it. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
section 3 (perplexity by windows); Brown et al. 2020, arXiv:2005.14165, section 2.4 (choice by continuation).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peakgpt.engine.inference.block_pool import BlockMemory, Chunk
from peakgpt.engine.inference.ops_runner import cpu_runner
from peakgpt.engine.model.transformer import Transformer

TOKENS = 512  # of a step at most: bounds the logits that are held, 100 MB for GPT-2's vocabulary
SEQUENCES = 8  # as long as the model takes, that the cache has blocks for


@dataclass(frozen=True)
class Score:
    """Log-probabilities of one continuation.

    Args:
        logprobs: of each of its tokens, in nats.
        greedy: whether each is the likeliest one in its place.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def mean(self) -> float:
        """Per token; of no tokens, 0."""
        return self.total / max(len(self.logprobs), 1)


@dataclass(frozen=True)
class Perplexity:
    """Of one text: `tokens` were predicted, each from at least window - stride tokens but for the first window's."""

    nll_nats: float  # sum over tokens
    tokens: int
    window: int
    stride: int

    @property
    def value(self) -> float:
        return math.exp(self.nll_nats / self.tokens)


class Scorer:
    """A model made ready to score; what a text gets does not depend on what is scored beside it, to the last bit."""

    def __init__(self, model: Transformer, *, blocks: int | None = None, cache: str | None = None):
        """
        Args:
            model: weights are packed on the CPU, which copies them; one that can not be lowered, or lies on a GPU, runs
                text by text as it is.
            blocks: of the cache; None means enough for SEQUENCES sequences as long as the model takes.
            cache: None or "int8", as for an Engine.
        Raises:
            ValueError: not enough blocks for the longest sequence, or a cache that this model can not have.
        """
        self.config = model.config
        longest = -(-self.config.block_size // BlockMemory.block) + 1  # one is a copy, below
        blocks = SEQUENCES * longest if blocks is None else blocks
        if blocks < longest:
            raise ValueError(f"scorer: blocks is {blocks}, expected at least {longest}")
        self.blocks, self.model = blocks, model
        runner = cpu_runner(model, blocks, cache)
        if cache and isinstance(runner, str):
            raise ValueError(f"cache is {cache!r} for a model that runs by its ops, expected None ({runner})")
        self.runner = None if isinstance(runner, str) else runner

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Score continuations.

        Args:
            pairs: ids of (context, continuation); a context has at least one token, both block_size + 1 at most.
        Returns:
            One a pair, in order.
        Raises:
            ValueError: no context, too many tokens, or ids outside the vocabulary.
        """
        texts = [_Text(self._checked(context, continuation), len(context)) for context, continuation in pairs]
        ordered = sorted((text for text in texts if text.first < len(text.ids)), key=lambda text: text.ids)
        with torch.inference_mode():
            for tree in _trees(ordered, self.blocks) if self.runner else ():
                self._run(tree)
            if not self.runner:
                for text in ordered:
                    self._whole(text)
        return [Score(tuple(text.logprobs), tuple(text.greedy)) for text in texts]

    def perplexity(self, ids: Sequence[int], *, window: int | None = None, stride: int | None = None) -> Perplexity:
        """Score a whole text but its first token, each token once.

        Args:
            ids: at least two.
            window: tokens seen at once at most; None means block_size.
            stride: how far the window moves; its last `stride` tokens are those scored. None means half of it.
        Raises:
            ValueError: too few ids, or window and stride out of range.
        """
        window = self.config.block_size if window is None else window
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
        ids, most, vocab = [*map(int, context), *map(int, continuation)], self.config.block_size, self.config.vocab_size
        if not len(context) or len(ids) > most + 1:
            raise ValueError(
                f"score: got a context of {len(context)} tokens and a continuation of {len(continuation)}, expected a "
                f"context of at least 1, and at most block_size {most} + 1 together"
            )
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(f"score: ids from {min(ids)} to {max(ids)}, expected 0 to vocab_size {vocab} - 1")
        return ids

    def _run(self, roots: list[_Node]) -> None:
        ready, free = deque((node, node.begin) for node in roots), iter(range(self.blocks))
        while ready:
            batch, left = [], TOKENS
            while ready and left:
                node, at = ready.popleft()
                if not node.blocks:
                    self._allocate(node, free)
                end = min(node.end, at + left)
                left -= end - at
                batch.append((node, at, end))
                if end < node.end:
                    ready.appendleft((node, end))
                    break
            chunks = [Chunk(node.ids[at:end], at, node.blocks, end - max(min(node.wanted, end), at))
                      for node, at, end in batch]  # fmt: skip
            self._read(self.runner.step(chunks), batch)
            ready.extend((child, child.begin) for node, _, end in batch if end == node.end for child in node.children)

    def _allocate(self, node: _Node, free: Iterator[int]) -> None:
        """Blocks of its own from where the parent's full ones end; what the parent has in its last one is copied."""
        block, parent = BlockMemory.block, node.parent
        full = node.begin // block
        node.blocks = [*(parent.blocks[:full] if parent else ()), *(next(free) for _ in range(_count(node)))]
        if parent and node.begin % block:
            self.runner.memory.copy(parent.blocks[full], node.blocks[full])

    def _read(self, logits: Tensor, batch: list[tuple[_Node, int, int]]) -> None:
        """Note what all texts through these nodes get, where their logits were wanted."""
        row, rows, targets, texts = 0, [], [], []
        for node, at, end in batch:
            first = max(min(node.wanted, end), at)
            for text in node.texts:
                places = range(max(first, text.first - 1), min(end, len(text.ids) - 1))
                rows += [row + place - first for place in places]
                targets += [text.ids[place + 1] for place in places]
                texts += [text] * len(places)
            row += end - first
        for text, logprob, greedy in zip(texts, *_pick(logits, rows, targets), strict=True):
            text.logprobs.append(logprob)
            text.greedy.append(greedy)

    def _whole(self, text: _Text) -> None:
        device = self.model.transformer.wte.weight.device
        h = self.model.hidden_states(torch.tensor([text.ids[:-1]], device=device))[0]
        targets = text.ids[text.first :]
        logits = self.model.compute_logits(h[text.first - 1 :]).float()
        text.logprobs, text.greedy = _pick(logits, list(range(len(targets))), targets)


def _pick(logits: Tensor, rows: list[int], targets: list[int]) -> tuple[list[float], list[bool]]:
    """Log-probabilities of targets in rows of logits, and whether they are the largest there."""
    if not rows:
        return [], []
    at, target = (torch.tensor(values, device=logits.device) for values in (rows, targets))
    # log_softmax does a row on one thread; a sum over rows would be cut by how many there are.
    return logits.log_softmax(-1)[at, target].tolist(), (logits.argmax(-1)[at] == target).tolist()


# ---- the tree


@dataclass(eq=False)
class _Text:
    ids: list[int]
    first: int  # position of the first token to be scored
    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)


@dataclass(eq=False)
class _Node:
    """Tokens begin .. end - 1 of all texts that have the same ones up to there."""

    ids: list[int]
    begin: int
    end: int
    parent: _Node | None
    wanted: int  # the first position whose logits some text wants; not less than end where none does
    texts: list[_Text]
    children: list[_Node] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


def _count(node: _Node) -> int:
    return -(-node.end // BlockMemory.block) - node.begin // BlockMemory.block


def _trees(ordered: list[_Text], blocks: int) -> list[list[_Node]]:
    """Trees of neighbours in order, as many texts each as the blocks allow; returns their roots."""
    trees: list[list[_Node]] = []
    path: list[_Node] = []  # of the text before
    used, before = blocks, []
    for text in ordered:
        run = text.ids[:-1]  # nothing is asked about what follows the last
        same = _same(before, run)
        # A node that is cut in two needs one block more, where both halves share one.
        need = -(-len(run) // BlockMemory.block) - same // BlockMemory.block + 1
        if used + need > blocks:
            trees.append([])
            path, used, same = [], 0, 0
            need = -(-len(run) // BlockMemory.block) + 1
        used += need
        _grow(trees[-1], path, text, same)
        before = run
    return trees


def _grow(roots: list[_Node], path: list[_Node], text: _Text, same: int) -> None:
    """Add a text that has its first `same` tokens in common with the path, and make the path its own."""
    while path and path[-1].begin >= same:
        path.pop()
    if path and path[-1].end > same:
        path.append(_cut(path.pop(), same, roots))
    for node in path:
        node.texts.append(text)
        node.wanted = min(node.wanted, text.first - 1)
    end = len(text.ids) - 1
    if end > same:
        parent = path[-1] if path else None
        node = _Node(text.ids, same, end, parent, text.first - 1, [text])
        (parent.children if parent else roots).append(node)
        path.append(node)


def _cut(node: _Node, at: int, roots: list[_Node]) -> _Node:
    """Cut a node in two; returns the upper one."""
    upper = _Node(node.ids, node.begin, at, node.parent, node.wanted, list(node.texts), [node])
    siblings = node.parent.children if node.parent else roots
    siblings[siblings.index(node)] = upper
    node.begin, node.parent = at, upper
    return upper


def _same(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
