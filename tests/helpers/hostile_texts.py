"""Texts that break tokenizers, the same ones in every run."""

import random
import sys
import unicodedata

BLANKS = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
INVISIBLE = (
    "\0\x01\x07\x08\x1b\x7f\x80\x9f\xad\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u2060\u2066\ufeff\ufffd\ufffe\uffff"
)
MARKS = "".join(chr(c) for c in range(0x300, 0x370)) + "\u0651\u093c\u0e31\u20dd\ufe0f\u3099"
PIECES = [
    "the canary sings", " a song", "Hello world!", "naïve Straße", "日本語", "é", "e\u0301", "\ufb01 ligature",
    "\u017f'\u017f I'\u017f", "İ\u0131", "don't can't I'm he's we've they're YOU'LL I'D", " , . ? ! ' n't 's", "x ' y",
    "\r\n", "\n\n\n", "  ", "    ", "\t\t", "123456789", "1,234.5", "\u0663\u0664", "²³", "½", "\u2167", "\U0001f9ff",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f44d\U0001f3fd",
    "\U0001f1e9\U0001f1ea", "\u05e9\u05dc\u05d5\u05dd \u05e2", "\u0645\u0631\u062d\u0628\u0627", "ไทย", "한국어",
    "\u1112\u1161\u11ab", "\u212b\u00c5", "ㄱ", "\U0001d4b3\U0001d4ce", "\U000e0041", "\U0010ffff", "▁", "▁▁", "Ġ", "Ċ",
    "</w>", "##ing", "<0x41>", "<0xE2>", "def f(x):\n    return x + 1\n", "-" * 40, "=" * 7, "...", "''''", '"',
    "\\n", "/*", "#version", "zqx", "https://a.b/c?d=e&f", "A" * 30, "a" * 300, "ab" * 200, "ACGT" * 40, "\u4e00" * 60,
    " " * 70, "\n" * 40, "हिन्दी",
]  # fmt: skip
SPECIAL = ["<s>", "</s>", "<unk>", "<|endoftext|>", "<tool>"]
PARTIAL = [
    "<s", "/s>", "< s>", "<S>", "<<s>>", "<|endof", "text|>", "<|end of text|>", "</ s>", "<un", "k>", "s></s", "<tool",
]  # fmt: skip


def _any_char(rng):
    """A character of any plane, assigned or not, but no surrogate."""
    plane = rng.choice([0, 0, 0, 1, 2, 3, 14, 15, 16])
    code = rng.randrange(0x10000) + 0x10000 * plane
    return "?" if 0xD800 <= code < 0xE000 else chr(code)


def _part(rng):
    kind = rng.randrange(9)
    if kind == 0:
        return "".join(_any_char(rng) for _ in range(rng.randrange(1, 6)))
    if kind == 1:
        return rng.choice("ae\u00c5日ㄱक ") + "".join(rng.choices(MARKS, k=rng.randrange(1, 8)))
    if kind == 2:
        return "".join(rng.choices(BLANKS, k=rng.randrange(1, 5)))
    if kind == 3:
        return "".join(rng.choices(INVISIBLE, k=rng.randrange(1, 4)))
    if kind == 4:
        return rng.choice(SPECIAL)
    if kind == 5:
        return rng.choice(PARTIAL)
    return rng.choice(PIECES)


def hostile_texts(count=1000, seed=0):
    """Return texts: every piece alone, single characters of all planes, then mixtures."""
    rng = random.Random(seed)
    assigned = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")]
    texts = ["", *PIECES, *SPECIAL, *PARTIAL, *BLANKS, *INVISIBLE, "\ufeffthe canary", "a\0b"]
    texts += rng.sample(assigned, 100)
    while len(texts) < count:
        texts.append("".join(_part(rng) for _ in range(rng.randrange(1, 7))))
    return texts[:count]
