"""Streaming text output: return only whole characters, and hold back text that may be part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from peakgpt.engine.data.tokenizer import StreamDecoder, Tokenizer

MAX_TAIL_BYTES = 3  # of an incomplete UTF-8 character; each is at most one token


class TextStream:
    """Decodes tokens one by one and stops at stop strings.

    The results of `feed` and `finish` add up to the output text, which ends before its first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), prompt_token_ids: Sequence[int] = ()):
        """
        Args:
            tokenizer: decodes the tokens.
            stops: the stop strings.
            prompt_token_ids: the tokens before the output. If they end inside a character, the output text begins with
                this whole character.
        """
        self.decoder, self.stops = StreamDecoder(tokenizer), tuple(dict.fromkeys(stops))
        self.held_back = ""  # text that may be the beginning of a stop string
        self.matched = dict.fromkeys(self.stops, 0)  # stop string -> characters that the text ends with
        self.stopped_by: str | None = None  # the stop string that ended the text
        for token in prompt_token_ids[-MAX_TAIL_BYTES:]:
            self.decoder.feed(token)

    def feed(self, token: int) -> str:
        """Add one token id and return the new text; `stopped_by` is set if a stop string ended the text."""
        return self._release(self.decoder.feed(token))

    def finish(self) -> str:
        """Return the rest of the text after the last token, unless a stop string ended it."""
        text = self._release(self.decoder.finish())
        if self.stopped_by is None:
            text, self.held_back = text + self.held_back, ""
        return text

    def _release(self, new: str) -> str:
        """Return the text that can be shown after `new` text is added, and hold back the rest."""
        if not self.stops:
            return new
        text = self.held_back + new
        positions = [(self._find(stop, new, len(self.held_back)), stop) for stop in self.stops]
        hits = [hit for hit in positions if hit[0] >= 0]
        if hits:
            position, self.stopped_by = min(hits, key=lambda hit: hit[0])
            self.held_back = ""
            return text[:position]
        count = max(self.matched.values())
        self.held_back = text[len(text) - count :]
        return text[: len(text) - count]

    def _find(self, stop: str, new: str, start: int) -> int:
        """Match a stop string against new text; return where it begins, or -1. The work does not depend on its length.

        Args:
            start: number of characters held back before the new text.
        """
        matched, shorter = self.matched[stop], _shorter_matches(stop)
        for position, char in enumerate(new, start + 1):
            while matched and stop[matched] != char:
                matched = shorter[matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                return position - matched
        self.matched[stop] = matched
        return -1


@lru_cache(maxsize=1024)
def _shorter_matches(stop: str) -> tuple[int, ...]:
    """Return for each prefix of a string the longest shorter prefix that it ends with (Knuth, Morris, Pratt 1977)."""
    lengths, matched = [0], 0
    for char in stop[1:]:
        while matched and stop[matched] != char:
            matched = lengths[matched - 1]
        matched += stop[matched] == char
        lengths.append(matched)
    return tuple(lengths)
