"""Tokenizer: exact round trips, streaming, the saved files, and transformers reading them."""

import json
import os
import random
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import tokenizers
from tiny_tokenizers import BUILDERS
from tokenizers import AddedToken, models, pre_tokenizers, processors

from peakgpt.engine.data import encoding
from peakgpt.engine.data.clean_up import CleanUp
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer

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
    alone = tokenizer.encode_batch(many, split_special_tokens=True)
    expected = [token for ids in alone for token in [*ids, tokenizer.end_id]]
    for size in (3, encoding.PIECE_CHARS):
        monkeypatch.setattr(encoding, "PIECE_CHARS", size)
        assert np.concatenate(list(tokenizer.encode_documents(many))).tolist() == expected
    assert list(tokenizer.encode_documents([])) == []


def test_prefix_space_is_added_once_per_document(tokenizer, monkeypatch):
    """A tokenizer that adds a space before every text gets whole documents instead of pieces."""
    monkeypatch.setattr(encoding, "PIECE_CHARS", 3)
    library = type(tokenizer.library).from_str(tokenizer.library.to_str())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    foreign = Tokenizer(library)
    [ids] = foreign.encode_documents(["ab\ncd\nef"])
    assert ids.tolist() == [*foreign.encode("ab\ncd\nef"), foreign.end_id]


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


# ---- what is put around texts and documents


def with_template(single, kind="llama"):
    library = BUILDERS[kind]()
    ids = [(text, library.token_to_id(text)) for text in ("<s>", "</s>")]
    library.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return Tokenizer(library, "</s>", begin_of_text="<s>")


def test_document_is_what_a_prompt_begins_with_the_text_and_the_end_of_text():
    tokenizer = with_template("<s> $A")
    start, end = tokenizer.library.token_to_id("<s>"), tokenizer.end_id
    texts = ["the canary", "", "sings"]
    bare = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ids = np.concatenate(list(tokenizer.encode_documents(texts)))
    assert ids.tolist() == [token for text in bare for token in [start, *text, end]]
    assert tokenizer.encode("sings") == [start, *bare[2]]


@pytest.mark.parametrize("single", ["</s> $A", "</s> $A </s>", "$A </s>", "$A"])
def test_documents_are_separated_by_one_end_of_text(single):
    """OPT begins a text with the end-of-text token, other tokenizers end it with one. Two documents share one."""
    tokenizer = with_template(single)
    bare = [tokenizer.encode(text, add_special_tokens=False) for text in ("the canary", "sings")]
    ids = np.concatenate(list(tokenizer.encode_documents(["the canary", "sings"])))
    assert ids.tolist() == [*bare[0], tokenizer.end_id, *bare[1], tokenizer.end_id]


def test_long_document_gets_its_start_and_end_once(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_CHARS", 3)
    tokenizer = with_template("<s> $A", "byte_level")
    text = "one two three four\nfive six"
    ids = np.concatenate(list(tokenizer.encode_documents([text]))).tolist()
    assert ids == [*tokenizer.encode(text), tokenizer.end_id]


@pytest.mark.parametrize("added", [AddedToken("b cd"), AddedToken("<x>", rstrip=True), AddedToken("ef", lstrip=True)])
def test_documents_are_not_cut_inside_added_tokens(added, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_CHARS", 1)
    library = BUILDERS["byte_level"]()
    library.add_tokens([added])
    tokenizer = Tokenizer(library, "</s>")
    text = "a b cd ef <x> \n g b cd"
    ids = np.concatenate(list(tokenizer.encode_documents([text]))).tolist()
    assert ids == [*tokenizer.encode(text), tokenizer.end_id]


def test_context_of_a_text_is_its_start_else_bos_else_the_end_of_text():
    begin, end = with_template("<s> $A").library.token_to_id("<s>"), with_template("$A").end_id
    assert with_template("<s> $A").context_ids == [begin]
    assert with_template("$A").context_ids == [begin]
    assert Tokenizer(BUILDERS["llama"](), "</s>").context_ids == [end]


def test_tokenizer_without_an_end_of_text_is_usable_where_none_is_needed(tmp_path):
    BUILDERS["gpt1"]().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.end_id, tokenizer.stop_token_ids, tokenizer.end_of_text) == (None, (), None)
    assert tokenizer.decode(tokenizer.encode("The canary sings")) == "the canary sings"
    with pytest.raises(ValueError, match="tokenizer: got none with an end-of-text token, expected one: it ends each"):
        next(tokenizer.encode_documents(["the canary"]))
    with pytest.raises(ValueError, match="tokenizer: got none with a token that begins or ends a text, expected one"):
        _ = tokenizer.context_ids


def test_vocabulary_with_gaps_holds_every_id():
    words = {"a": 0, "b": 7, "<|endoftext|>": 3}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.BPE(words, [])))
    assert tokenizer.vocab_size == 8
    tokenizer.library.add_tokens(["c"])
    assert tokenizer.vocab_size == max(tokenizer.library.get_vocab().values()) + 1


def test_clean_up_in_parts_equals_clean_up_of_the_whole():
    rng = random.Random(4)
    letters = [*" .?!,'nmstvre", "  ", " ' ", " n't", " 's", "ab"]
    for _ in range(3000):
        parts = ["".join(rng.choices(letters, k=rng.randrange(4))) for _ in range(rng.randrange(8))]
        stream, whole = CleanUp(), CleanUp.apply("".join(parts))
        shown = ""
        for part in parts:
            shown += stream.feed(part)
            assert whole.startswith(shown)
        assert shown + stream.finish() == whole
    assert CleanUp().feed("hello") == "hello"  # at once


@pytest.mark.parametrize("kind", BUILDERS)
def test_special_tokens_written_in_a_document_are_text_and_in_a_prompt_their_ids(kind, monkeypatch):
    """Otherwise text could end its own document.

    Mutation that makes it fail: encode_parts without split_special_tokens.
    """
    monkeypatch.setattr(encoding, "PIECE_CHARS", 4)
    library = BUILDERS[kind]()
    library.add_special_tokens(["</s>", "<|im_start|>"])
    tokenizer = Tokenizer(library, "</s>")
    texts, mark = ["the</s>canary </s> <|im_start|>sings", "</s>", "song"], library.token_to_id("<|im_start|>")
    ids = np.concatenate(list(tokenizer.encode_documents(texts))).tolist()
    assert ids.count(tokenizer.end_id) == 3 and mark not in ids
    assert ids[-1] == tokenizer.end_id
    prompt = tokenizer.encode(texts[0])
    assert prompt.count(tokenizer.end_id) == 2 and mark in prompt
    library.add_special_tokens(["<tool>"])  # the copy of the library is made anew
    (ids,) = tokenizer.encode_documents(["<tool>"])
    assert library.token_to_id("<tool>") not in ids and library.token_to_id("<tool>") in tokenizer.encode("<tool>")


def test_a_special_token_that_merges_make_is_text_too():
    """Mutation that makes it fail: the merge stays, and the library refuses it without its token."""
    vocabulary = {token: index for index, token in enumerate(["</s>", "<", "/", "s", ">", "</", "s>", "a"])}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")]))
    library.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(library, "</s>")
    assert tokenizer.encode("a</s>a") == [7, 0, 7]
    assert tokenizer.encode("a</s>a", split_special_tokens=True) == [7, 5, 6, 7]
