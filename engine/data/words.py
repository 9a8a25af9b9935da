"""Words of a text without case and punctuation, for comparing texts.

A word is lower case, in NFC, between blanks, and has no punctuation or symbols: "Don't, e-mail!" is "dont", "email".
Brown et al. 2020, "Language Models are Few-Shot Learners", arXiv:2005.14165, appendix C.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator

MAX_WORD_CHARS = 1 << 24  # a longer one is cut, so that memory does not grow with a text without blanks


class _WithoutMarks(dict[int, "int | None"]):
    """A table of str.translate that removes punctuation and symbols; filled by the characters that occur."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PS" else code
        return self[code]


_WITHOUT_MARKS = _WithoutMarks()


def words_of(text: str) -> list[str]:
    """Return the words of a text."""
    return unicodedata.normalize("NFC", text.lower()).translate(_WITHOUT_MARKS).split()


def whole_words(blocks: Iterable[str]) -> Iterator[str]:
    """Cut a text that arrives in blocks anew, between words."""
    rest = ""
    for block in blocks:
        text = rest + block
        rest = "" if text[-1:].isspace() else text.rsplit(maxsplit=1)[-1] if text else ""
        rest = rest if len(rest) <= MAX_WORD_CHARS else ""
        yield text[: len(text) - len(rest)]
    yield rest
