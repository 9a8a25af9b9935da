"""A tree of token sequences, in which a common prefix is one path.

Each node is a run of tokens. A scorer computes a node once for all sequences through it; the node attends to the KV
cache blocks of the nodes above it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from peakgpt.engine.inference.block_pool import BLOCK_TOKENS, blocks_for


@dataclass(eq=False)
class ScoredSequence:
    """A sequence and the log-probabilities of its tokens from position `first_scored` on."""

    token_ids: list[int]
    first_scored: int
    logprobs: list[float] = field(default_factory=list)
    is_greedy: list[bool] = field(default_factory=list)


@dataclass(eq=False)
class Node:
    """Tokens begin .. end - 1 of all sequences that are equal up to there.

    Args:
        token_ids: all tokens of one of these sequences.
        first_logit: first position at which a sequence needs logits; end or more if there is none.
        sequences: all sequences through this node.
        block_table: blocks of the tokens 0 .. end - 1.
    """

    token_ids: list[int]
    begin: int
    end: int
    parent: Node | None
    first_logit: int
    sequences: list[ScoredSequence]
    children: list[Node] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)

    @property
    def num_own_blocks(self) -> int:
        """Blocks that this node needs in addition to its parent's full blocks."""
        return blocks_for(self.end) - self.begin // BLOCK_TOKENS


def build_trees(sequences: Iterable[ScoredSequence], num_blocks: int) -> list[list[Node]]:
    """Build trees of sequences. Each tree has as many sequences as `num_blocks` blocks can hold.

    Args:
        sequences: sorted by their tokens.
        num_blocks: blocks of the KV cache.
    Returns:
        The roots of each tree.
    """
    trees: list[list[Node]] = []
    path: list[Node] = []  # the nodes of the previous sequence
    used, previous = num_blocks, []
    for sequence in sequences:
        computed = sequence.token_ids[:-1]  # the logits after the last token are not needed
        common = _common_length(previous, computed)
        # Splitting a node takes one more block if its halves share a block.
        needed = blocks_for(len(computed)) - common // BLOCK_TOKENS + 1
        if used + needed > num_blocks:
            trees.append([])
            path, used, common = [], 0, 0
            needed = blocks_for(len(computed)) + 1
        used += needed
        _insert(trees[-1], path, sequence, common)
        previous = computed
    return trees


def _insert(roots: list[Node], path: list[Node], sequence: ScoredSequence, common: int) -> None:
    """Insert a sequence that has its first `common` tokens in common with the path; update the path to it."""
    while path and path[-1].begin >= common:
        path.pop()
    if path and path[-1].end > common:
        path.append(_split(path.pop(), common, roots))
    for node in path:
        node.sequences.append(sequence)
        node.first_logit = min(node.first_logit, sequence.first_scored - 1)
    end = len(sequence.token_ids) - 1
    if end > common:
        parent = path[-1] if path else None
        node = Node(sequence.token_ids, common, end, parent, sequence.first_scored - 1, [sequence])
        (parent.children if parent else roots).append(node)
        path.append(node)


def _split(node: Node, position: int, roots: list[Node]) -> Node:
    """Split a node in two at a position; return the upper half."""
    upper = Node(node.token_ids, node.begin, position, node.parent, node.first_logit, list(node.sequences), [node])
    siblings = node.parent.children if node.parent else roots
    siblings[siblings.index(node)] = upper
    node.begin, node.parent = position, upper
    return upper


def _common_length(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
