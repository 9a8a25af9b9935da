"""`clean_up_tokenization_spaces` of transformers: no space before punctuation and English contractions.

It suits tokenizers of words, such as WordPiece, whose decoders put a space between two tokens. transformers ignores the
option for byte-pair encoding, where it would corrupt texts.
"""

from __future__ import annotations

# In this order, each over the whole text that the one before leaves.
RULES = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class CleanUp:
    """Cleans a text that arrives in parts. All parts together are `CleanUp.apply` of the whole text."""

    def __init__(self):
        self._waiting = [""] * len(RULES)  # for each rule, an end of its input that may begin a match

    @staticmethod
    def apply(text: str) -> str:
        """Clean a whole text."""
        for old, new in RULES:
            text = text.replace(old, new)
        return text

    def feed(self, text: str) -> str:
        """Add a part of the text; return what later parts cannot change, which may be empty."""
        for index, (old, new) in enumerate(RULES):
            *before, last = (self._waiting[index] + text).split(old)
            kept = next(size for size in range(len(old) - 1, -1, -1) if last.endswith(old[:size]))
            self._waiting[index] = last[len(last) - kept :]
            text = new.join([*before, last[: len(last) - kept]])
        return text

    def finish(self) -> str:
        """Return the rest of the text."""
        text = ""
        for index, (old, new) in enumerate(RULES):
            text, self._waiting[index] = (self._waiting[index] + text).replace(old, new), ""
        return text
