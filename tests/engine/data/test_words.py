"""Words without case and punctuation, whatever blocks a text arrives in."""

import random
import unicodedata

from hostile_texts import hostile_texts

from peakgpt.engine.data import words
from peakgpt.engine.data.words import whole_words, words_of


def test_words_have_no_case_no_punctuation_and_no_blanks():
    text = "Don't, e-mail!\n\tÉCOLE «là»  3.14 $5 ... हिन्दी"
    assert words_of(text) == ["dont", "email", "école", "là", "314", "5", "हिन्दी"]
    for text in hostile_texts():
        lower = unicodedata.normalize("NFC", text.lower())
        bare = "".join(char for char in lower if unicodedata.category(char)[0] not in "PS")
        assert words_of(text) == bare.split()


def test_words_do_not_depend_on_blocks():
    rng = random.Random(0)
    for text in hostile_texts()[::5]:
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(6)))
        blocks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert "".join(whole_words(blocks)) == text
        assert [word for part in whole_words(blocks) for word in part.lower().split()] == text.lower().split()


def test_text_without_blanks_is_cut_at_the_limit(monkeypatch):
    monkeypatch.setattr(words, "MAX_WORD_CHARS", 10)
    parts = list(whole_words(["abcd"] * 1000))
    assert max(map(len, parts)) == 12 and "".join(parts) == "abcd" * 1000


def test_composed_and_decomposed_letters_are_the_same_word():
    assert words_of("Cafe\u0301 \u1112\u1161\u11ab") == words_of("caf\u00e9 \ud55c") == ["caf\u00e9", "\ud55c"]
