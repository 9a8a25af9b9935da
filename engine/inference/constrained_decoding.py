"""Constrained decoding: restrict the output to one of several given token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_END = None  # key of a node at which a choice ends


class ChoiceConstraint:
    """A prefix tree (trie) of token sequences, and the node that the output has reached."""

    def __init__(self, choices: Sequence[Sequence[int]], stop_token_ids: Sequence[int]):
        """
        Args:
            choices: the allowed outputs, as token ids.
            stop_token_ids: ids that may end a choice that is a prefix of another.
        Raises:
            ValueError: a choice is a prefix of another, and there is no stop id.
        """
        root: dict = {}
        for choice in choices:
            node = root
            for token in choice:
                node = node.setdefault(token, {})
            node[_END] = {}
        self.node, self.stop_token_ids = root, tuple(stop_token_ids)
        ordered = sorted({tuple(choice) for choice in choices})
        if not self.stop_token_ids and any(b[: len(a)] == a for a, b in pairwise(ordered)):
            raise ValueError(f"choices: one of {len(choices)} is a prefix of another, expected a stop id to end it")

    def allowed(self) -> list[int]:
        """Return the tokens that may come next."""
        tokens = [token for token in self.node if token is not _END]
        return [*tokens, *self.stop_token_ids] if _END in self.node else tokens

    def feed(self, token: int) -> bool:
        """Append one token to the output; returns whether the output is complete."""
        self.node = self.node.get(token, {_END: {}})
        return set(self.node) == {_END}
