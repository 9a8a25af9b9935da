"""Streaming text output: return only whole characters, and hold back text that may be part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

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
        self.decoder, self.stops = StreamDecoder(tokenizer), tuple(stops)
        self.held_back = ""  # text that may be the beginning of a stop string
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
        hits = [(position, stop) for stop in self.stops if (position := text.find(stop)) >= 0]
        if hits:
            position, self.stopped_by = min(hits, key=lambda hit: hit[0])
            self.held_back = ""
            return text[:position]
        count = max(_overlap(text, stop) for stop in self.stops)
        self.held_back = text[len(text) - count :]
        return text[: len(text) - count]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of the text that is a prefix of the stop string, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
