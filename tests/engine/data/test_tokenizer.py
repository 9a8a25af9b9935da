"""Tokenizer: exact round trips, streaming, the saved files, and transformers reading them."""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from peakgpt.engine.data import encoding
from peakgpt.engine.data import tokenizer as module
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer, train_tokenizer

TRICKY = [
    "",
    " ",
    "\n\n  \t\r\n",
    "naïve Straße 日本語 🎉👩‍👧",
    "\0\x1f\x7f\x80\xad\u2028\ufeff",
    f"a{END_OF_TEXT}b",
    "x\n" * 9,
]
EDGES = [*"aZ0.é日🎉_ \n\t\0\x1c\x85\u3000", "  ", "\r\n", "'s", END_OF_TEXT]


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in islice(load_corpus().train, 60)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 1024)


def random_text(rng, length):
    return "".join(rng.choice(EDGES) for _ in range(length))


def test_vocabulary_has_all_bytes_and_the_end_of_text(tokenizer, texts):
    assert tokenizer.vocab_size == 1024
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.end_id]
    text = "".join(texts)
    assert len(tokenizer.encode(text[:100_000])) < 0.5 * 100_000  # merges were learned and are used


def test_text_decodes_to_itself(tokenizer):
    rng = random.Random(0)
    for text in TRICKY + [random_text(rng, rng.randrange(60)) for _ in range(300)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_decode_equals_the_library(tokenizer):
    """For random ids, whose bytes often are not UTF-8."""
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        assert tokenizer.decode(ids) == tokenizer.library.decode(ids, skip_special_tokens=False)


def test_stream_decoder_gives_whole_characters_and_the_full_text(tokenizer):
    rng = random.Random(2)
    bytes_only = train_tokenizer([], 257)  # every character of two bytes and more is split across tokens
    for coder in (tokenizer, bytes_only):
        for text in TRICKY:
            stream = StreamDecoder(coder)
            parts = [stream.feed(token) for token in coder.encode(text)]
            assert "\ufffd" not in "".join(parts)
            assert "".join(parts) + stream.finish() == text
            shown = ""
            for part in parts:
                shown += part
                assert text.startswith(shown)
        for _ in range(200):
            ids = [rng.randrange(coder.vocab_size) for _ in range(rng.randrange(40))]
            stream = StreamDecoder(coder)
            assert "".join(map(stream.feed, ids)) + stream.finish() == coder.decode(ids)


def test_stream_decoder_returns_complete_characters_at_once():
    """A character is returned with its last byte, not later."""
    coder = train_tokenizer([], 257)
    stream = StreamDecoder(coder)
    assert [stream.feed(token) for token in coder.encode("é🎉a")] == ["", "é", "", "", "", "🎉", "a"]
    assert stream.finish() == ""
    stream.feed(coder.encode("é")[0])
    assert stream.finish() == "\ufffd"


def test_documents_encoded_in_pieces_equal_whole_documents(tokenizer, texts, monkeypatch):
    """Cutting long documents for the cores changes no token; pieces of 3 characters have every kind of boundary."""
    rng = random.Random(3)
    many = [random_text(rng, rng.randrange(300)) for _ in range(200)] + ["", "".join(texts)[:200_000], ""]
    expected = [token for text in many for token in [*tokenizer.encode(text), tokenizer.end_id]]
    for size in (3, encoding.PIECE_CHARS):
        monkeypatch.setattr(encoding, "PIECE_CHARS", size)
        assert np.concatenate(list(tokenizer.encode_documents(many))).tolist() == expected
    assert list(tokenizer.encode_documents([])) == []


def test_prefix_space_is_added_once_per_document(tokenizer, monkeypatch):
    """A tokenizer that adds a space before every text gets whole documents instead of pieces."""
    monkeypatch.setattr(encoding, "PIECE_CHARS", 3)
    library = type(tokenizer.library).from_str(tokenizer.library.to_str())
    library.pre_tokenizer = module.pre_tokenizers.ByteLevel(add_prefix_space=True)
    foreign = Tokenizer(library)
    [ids] = foreign.encode_documents(["ab\ncd\nef"])
    assert ids.tolist() == [*foreign.encode("ab\ncd\nef"), foreign.end_id]


def test_tokenizer_training_is_deterministic(tokenizer, texts, tmp_path):
    """Another process with another number of threads learns the same merges."""
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json, sys; from peakgpt.engine.data.tokenizer import train_tokenizer; "
        "train_tokenizer(json.load(open(sys.argv[1])), 1024).save(sys.argv[2])"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "texts.json", tmp_path], check=True, env=environment)
    assert Tokenizer.load(tmp_path).library.to_str() == tokenizer.library.to_str()


def test_saved_tokenizer_loads(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.end_id, loaded.vocab_size) == (tokenizer.end_id, tokenizer.vocab_size)
    assert all(loaded.encode(text) == tokenizer.encode(text) for text in TRICKY)


def test_transformers_gives_the_same_ids(tokenizer, tmp_path):
    pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))  # as in a checkpoint folder
    code = """
import json, sys
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast
folder, texts = sys.argv[1], json.loads(sys.argv[2])
results = []
for kind in AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast:
    other = kind.from_pretrained(folder)
    ids = [other(text).input_ids for text in texts]
    results.append([ids, [other.decode(i) for i in ids], other.eos_token_id, len(other)])
print(json.dumps(results))
"""
    texts = TRICKY[1:]
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(texts)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr
    ours = [[tokenizer.encode(text) for text in texts], texts, tokenizer.end_id, tokenizer.vocab_size]
    assert json.loads(result.stdout.splitlines()[-1]) == [ours] * 3


def test_end_of_text_of_other_tokenizers_is_read(tokenizer, tmp_path):
    """OPT's token is </s>. Older files write it as an object."""
    library = type(tokenizer.library).from_str(tokenizer.library.to_str())
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    for written in ("</s>", {"content": "</s>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": written}))
        assert Tokenizer.load(tmp_path).end_id == 1024


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, r"tokenizer .*tokenizer.json: got .*No such file"),
        ("tokenizer.json", "{", r"tokenizer .*tokenizer.json: got .*expected a file saved by tokenizers"),
        ("tokenizer.json", '{"model": 1}', r"tokenizer .*tokenizer.json: got .*expected"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json: got .*expected JSON"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', r"got a vocabulary without '<none>'"),
    ],
)
def test_damaged_tokenizer_files_are_named_in_the_error(tokenizer, tmp_path, file, content, message):
    tokenizer.save(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_tokenizer_with_an_unknown_decoder_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    decoder = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | {"decoder": decoder}))
    (tmp_path / "tokenizer_config.json").unlink()  # GPT-2's class would bring its own decoder
    with pytest.raises(ValueError, match=r"tokenizer\.json: got decoder CTC, expected ByteLevel"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("token", [-1, 1 << 32, 1 << 40])
def test_id_that_no_vocabulary_has_is_refused(tokenizer, token):
    with pytest.raises(ValueError, match=f"token id: got {token}, expected 0 to 1023"):
        tokenizer.decode([token])


def test_ids_beyond_the_vocabulary_are_empty_text(tokenizer):
    """The rows of many models are padded to a multiple of 64 or more."""
    ids = [1024, *tokenizer.encode("a é"), 5000, 1024]
    stream = StreamDecoder(tokenizer)
    assert tokenizer.decode(ids) == "".join(map(stream.feed, ids)) + stream.finish() == "a é"
    assert tokenizer.token_bytes(1024) == b""


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

    monkeypatch.setattr(module, "_learn_merges", measure)
    train_tokenizer(["short words", text], 300)
    return longest[0]


@pytest.mark.parametrize("name", ALPHABETS)
def test_words_are_cut_for_learning(name, monkeypatch):
    """No word is longer than the limit, wherever it stands in the text; it is cut only if it is longer."""
    rng = random.Random(name)
    for length in (100, module.MAX_WORD_BYTES, 5 * module.MAX_WORD_BYTES):
        word = "".join(rng.choice(ALPHABETS[name]) for _ in range(length))
        for text in (word, f"some words {word} and more", "x " * rng.randrange(99) + word + "\n\nx"):
            assert learned_from(text, monkeypatch) <= module.MAX_WORD_BYTES
    limit = module.MAX_WORD_BYTES
    assert learned_from("a" * limit, monkeypatch) == limit


def test_cutting_long_words_changes_no_vocabulary(texts, monkeypatch):
    """Merges of a text with short words are the same with the cutter, which a long word elsewhere turns on."""
    plain = train_tokenizer(texts[:20], 512).library.to_str()
    monkeypatch.setattr(module, "_may_have_long_word", lambda text: True)
    assert train_tokenizer(texts[:20], 512).library.to_str() == plain


def test_long_text_without_blanks_round_trips():
    text = "".join(random.Random(0).choices("ACGT", k=100_000))
    tokenizer = train_tokenizer([text], 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


INTERRUPTED = """
import sys
from peakgpt.engine.data import library_call
from peakgpt.engine.data.tokenizer import train_tokenizer
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
