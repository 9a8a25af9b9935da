"""Words of a text without case and punctuation, for comparing texts.

A word is lower case, between blanks, and has no punctuation or symbols: "Don't, e-mail!" is "dont", "email". Brown et
al. 2020, "Language Models are Few-Shot Learners", arXiv:2005.14165, appendix C.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

MAX_WORD_CHARS = 1 << 24  # a longer one is cut, so that memory does not grow with a text without blanks


@cache
def _marks() -> re.Pattern[str]:
    """Return the expression of all punctuation and symbols of Unicode."""
    codes = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in "PS"]
    firsts = [code for code, before in zip(codes, [-2, *codes], strict=False) if code != before + 1]
    lasts = [code for code, after in zip(codes, [*codes[1:], -2], strict=True) if code + 1 != after]
    return re.compile("[" + "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(firsts, lasts, strict=True)) + "]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text."""
    return _marks().sub("", text.lower()).split()


def whole_words(blocks: Iterable[str]) -> Iterator[str]:
    """Cut a text that arrives in blocks anew, between words."""
    rest = ""
    for block in blocks:
        text = rest + block
        rest = "" if text[-1:].isspace() else text.rsplit(maxsplit=1)[-1] if text else ""
        rest = rest if len(rest) <= MAX_WORD_CHARS else ""
        yield text[: len(text) - len(rest)]
    yield rest
