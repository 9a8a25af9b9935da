"""A text as its tokens come: whole characters only, and nothing that may turn out to be part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from peakgpt.engine.data.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """What may be shown of a text whose tokens come one by one.

    What `feed` and `finish` return adds up to the text, which ends before the first stop string in it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.decoder, self.stops = StreamDecoder(tokenizer), tuple(stops)
        self.held = ""  # may be the beginning of a stop string
        self.stopped_by: str | None = None

    def feed(self, token: int) -> str:
        """Take one id and return what may be shown; `stopped_by` says whether the text ended."""
        try:
            new = self.decoder.feed(token)
        except ValueError:  # models have rows of padding behind their tokenizer's vocabulary
            new = "\ufffd"
        return self._show(new)

    def finish(self) -> str:
        """Return what is left of a text that ended otherwise."""
        shown = self._show(self.decoder.finish())
        if self.stopped_by is None:
            shown, self.held = shown + self.held, ""
        return shown

    def _show(self, new: str) -> str:
        if not self.stops:
            return new
        text = self.held + new
        found = [(at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found, key=lambda hit: hit[0])
            self.held = ""
            return text[:at]
        kept = max(_overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters begin the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
