"""Choice-constrained decoding: which tokens keep a text inside a given set of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


class Choices:
    """A tree of token sequences, and the place in it that a text has reached."""

    def __init__(self, choices: Sequence[Sequence[int]], stop: Sequence[int]):
        """
        Raises:
            ValueError: one begins another, and there is no stop id that could end the shorter.
        """
        self.root: dict = {}
        for choice in choices:
            node = self.root
            for token in choice:
                node = node.setdefault(token, {})
            node[None] = {}  # one ends here
        self.node, self.stop = self.root, tuple(stop)
        ordered = sorted({tuple(choice) for choice in choices})
        if not self.stop and any(b[: len(a)] == a for a, b in pairwise(ordered)):
            raise ValueError(f"choices: one of {len(choices)} begins another, expected a stop id to end it with")

    def allowed(self) -> list[int]:
        """Tokens that may come next."""
        tokens = [token for token in self.node if token is not None]
        return [*tokens, *self.stop] if None in self.node else tokens

    def feed(self, token: int) -> bool:
        """Take one token; returns whether the text is complete."""
        self.node = self.node.get(token, {None: {}})
        return set(self.node) == {None}
