"""Learning merges: deterministic, bounded by the text, quick for texts without blanks, and it can be interrupted."""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import islice

import pytest

from peakgpt.engine.data import tokenizer_training
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.tokenizer import END_OF_TEXT, Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in islice(load_corpus().train, 60)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 1024)


def test_tokenizer_training_is_deterministic(tokenizer, texts, tmp_path):
    """Another process with another number of threads learns the same merges."""
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json, sys; from peakgpt.engine.data.tokenizer_training import train_tokenizer; "
        "train_tokenizer(json.load(open(sys.argv[1])), 1024).save(sys.argv[2])"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "texts.json", tmp_path], check=True, env=environment)
    assert Tokenizer.load(tmp_path).library.to_str() == tokenizer.library.to_str()


@pytest.mark.parametrize("size", [-1, 256, (1 << 20) + 1, 10**9, 1 << 70])
def test_vocabulary_of_absurd_size_is_refused(size):
    """The library allocates for all of it, and aborts the process when that fails."""
    with pytest.raises(ValueError, match=f"vocab_size: got {size}, expected at least 257 .* at most 1048576"):
        train_tokenizer(["text"], size)


def test_vocabulary_is_limited_by_the_text():
    assert train_tokenizer(["aaaa"], 1 << 20).vocab_size == 259


# ---- texts without blanks: the time of learning merges is quadratic in the longest word

ALPHABETS = {
    "dna": "ACGT", "base64": "ABCabc0123456789+/", "cjk": "日本語中文字", "one letter": "a", "digits": "0123456789",
    "blanks": " \t", "lines": "\n", "no-break": "\u00a0\u2003", "punctuation": "-=#", "control": "\x1c!",
    "emoji": "🎉👩",
}  # fmt: skip


def learned_from(text, monkeypatch):
    """Train on a text; return the longest word that the library gets, in bytes."""
    longest = []

    def measure(library, trainer, texts, report):
        words = [word for part in texts for word, _ in library.pre_tokenizer.pre_tokenize_str(part)]
        longest.append(max(map(len, words)))
        library.add_special_tokens([END_OF_TEXT])

    monkeypatch.setattr(tokenizer_training, "_learn_merges", measure)
    train_tokenizer(["short words", text], 300)
    return longest[0]


@pytest.mark.parametrize("name", ALPHABETS)
def test_words_are_cut_for_learning(name, monkeypatch):
    """No word is longer than the limit, wherever it stands in the text; it is cut only if it is longer."""
    rng = random.Random(name)
    for length in (100, tokenizer_training.MAX_WORD_BYTES, 5 * tokenizer_training.MAX_WORD_BYTES):
        word = "".join(rng.choice(ALPHABETS[name]) for _ in range(length))
        for text in (word, f"some words {word} and more", "x " * rng.randrange(99) + word + "\n\nx"):
            assert learned_from(text, monkeypatch) <= tokenizer_training.MAX_WORD_BYTES
    limit = tokenizer_training.MAX_WORD_BYTES
    assert learned_from("a" * limit, monkeypatch) == limit


def test_cutting_long_words_changes_no_vocabulary(texts, monkeypatch):
    """Merges of a text with short words are the same with the cutter, which a long word elsewhere turns on."""
    plain = train_tokenizer(texts[:20], 512).library.to_str()
    monkeypatch.setattr(tokenizer_training, "_may_have_long_word", lambda text: True)
    assert train_tokenizer(texts[:20], 512).library.to_str() == plain


def test_long_text_without_blanks_round_trips():
    text = "".join(random.Random(0).choices("ACGT", k=100_000))
    tokenizer = train_tokenizer([text], 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
from peakgpt.engine.data import library_call
from peakgpt.engine.data.tokenizer_training import train_tokenizer
library_call.REPORT_S = 0.05
texts = ["the cat %d sat " % i * 20 for i in range(200_000)]
try:
    train_tokenizer(texts, 50_000, report=lambda line: print(line, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_interrupt_ends_the_training_which_reports_its_progress():
    """Ctrl-C reaches Python while the library works, and lines tell how far it is."""
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert line.startswith("tokenizer: reads text, ") and process.returncode == 130
