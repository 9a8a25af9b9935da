"""Constrained decoding: restrict the output to one of several given token sequences."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise


class Choices:
    """The allowed outputs of a request, sorted, with 4 bytes a token. All continuations share them."""

    def __init__(self, choices: Sequence[Sequence[int]], stop_token_ids: Sequence[int]):
        """
        Args:
            choices: the allowed outputs, as token ids.
            stop_token_ids: ids that may end a choice that is a prefix of another.
        Raises:
            ValueError: a choice is a prefix of another, and there is no stop id.
        """
        self.sequences = [array("i", choice) for choice in sorted({tuple(choice) for choice in choices})]
        self.stop_token_ids = tuple(stop_token_ids)
        # In sorted order the choices that begin with a choice come directly after it.
        if not self.stop_token_ids and any(b[: len(a)] == a for a, b in pairwise(self.sequences)):
            raise ValueError(f"choices: one of {len(choices)} is a prefix of another, expected a stop id to end it")


class ChoiceConstraint:
    """The output of one continuation so far, as the range of the choices that begin with it."""

    def __init__(self, choices: Choices):
        self.choices, self.first, self.end, self.length = choices, 0, len(choices.sequences), 0

    def allowed(self) -> list[int]:
        """Return the tokens that may come next."""
        candidates = self.choices.sequences[self.first : self.end]
        tokens = {choice[self.length] for choice in candidates if len(choice) > self.length}
        is_choice = any(len(choice) == self.length for choice in candidates[:1])  # the shortest is the first
        return [*tokens, *self.choices.stop_token_ids] if is_choice else [*tokens]

    def feed(self, token: int) -> bool:
        """Append one token to the output; returns whether the output is complete."""
        n, candidates = self.length, self.choices.sequences[self.first : self.end]
        fits = [i for i, choice in enumerate(candidates, self.first) if len(choice) > n and choice[n] == token]
        self.first, self.end, self.length = fits[0] if fits else self.end, fits[-1] + 1 if fits else self.end, n + 1
        return all(len(choice) == self.length for choice in self.choices.sequences[self.first : self.end])
