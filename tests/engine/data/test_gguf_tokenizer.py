"""Tokenizers in .gguf files give the ids and texts of the tokenizer that was exported."""

import json
import unicodedata

import pytest
import tokenizers
from gguf_files import SPECIAL, TEMPLATES, build, export
from hostile_texts import SPECIAL as MARKS
from hostile_texts import hostile_texts
from tiny_tokenizers import BUILDERS
from tokenizers import Regex, normalizers, pre_tokenizers, processors

from peakgpt.engine.checkpoint.gguf.export import write_gguf
from peakgpt.engine.data.gguf_pre_tokenizers import PRE_TOKENIZERS, build_pre_tokenizer
from peakgpt.engine.data.gguf_tokenizer import build_library, read_gguf_tokenizer
from peakgpt.engine.data.gguf_vocabulary import tokenizer_metadata
from peakgpt.engine.data.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="needs the package gguf")
TEXTS = hostile_texts()
KINDS = ("byte_level", "llama", "gemma")


def differences(ours, theirs):
    return [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]][:3]


def library(kind, around="none"):
    made = BUILDERS[kind]()
    if around != "none":
        single = {"bos": "<s> $A", "both": "<s> $A </s>"}[around]
        ids = [(text, made.token_to_id(text)) for text in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return made


@pytest.mark.parametrize("around", ["none", "bos", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_an_exported_tokenizer(kind, around):
    made = library(kind, around)
    metadata = tokenizer_metadata(made, SPECIAL, {}, 400)
    copy = build_library(metadata)
    assert differences([e.ids for e in copy.encode_batch(TEXTS)], [e.ids for e in made.encode_batch(TEXTS)]) == []
    assert copy.get_vocab() == made.get_vocab()
    assert metadata["tokenizer.ggml.tokens"][399] == "[PAD399]" and metadata["tokenizer.ggml.token_type"][399] == 5


def test_a_file_has_the_tokenizer_and_its_chat_templates(tmp_path):
    export(build("gpt2"), tmp_path / "m.gguf")
    made, ours = library("byte_level"), Tokenizer.load(tmp_path / "m.gguf")
    assert differences(ours.encode_batch(TEXTS), [e.ids for e in made.encode_batch(TEXTS)]) == []
    assert (ours.begin_id, ours.end_id, ours.start_ids) == (1, 2, [])
    assert read_gguf_tokenizer(tmp_path / "m.gguf").chat_templates == TEMPLATES
    texts = [ours.decode(ids) for ids in ours.encode_batch(TEXTS[::8])]
    assert differences(texts, TEXTS[::8]) == []


def test_a_saved_copy_is_what_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    export(build("gpt2"), tmp_path / "m.gguf", templates={"default": TEMPLATES["default"]})
    ours, folder = Tokenizer.load(tmp_path / "m.gguf"), tmp_path / "folder"
    folder.mkdir()
    ours.save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert differences(theirs(TEXTS)["input_ids"], ours.encode_batch(TEXTS)) == []
    assert (theirs.eos_token, theirs.chat_template) == ("</s>", TEMPLATES["default"])


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_ids_equal_transformers_reading_of_the_same_file(kind, tmp_path):
    """A peer's reading; for "llama" it puts no blank before a text that begins with one."""
    transformers = pytest.importorskip("transformers")
    export(build("llama"), tmp_path / "m.gguf", kind=kind)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    plain = [text for text in TEXTS if not any(token in text for token in MARKS)]
    if kind == "llama":
        plain = [text for text in plain if not text.startswith((" ", "▁"))]
    expected = theirs(plain, add_special_tokens=False)["input_ids"]
    ours = Tokenizer.load(tmp_path / "m.gguf")
    assert differences(ours.encode_batch(plain, add_special_tokens=False), expected) == []


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_gives_the_same_ids(name, tmp_path):
    """For every way to cut a text. It normalizes nothing, so only texts in NFC are compared."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    made = BUILDERS["byte_level"]()
    metadata = tokenizer_metadata(made, SPECIAL, {}, 384)
    metadata |= {"tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": False}
    model = build("gpt2")
    write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), metadata, "f16")
    ours = Tokenizer.load(tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    texts = ["Hello World, it's 12345.6!!\n\n  I'VE three   blanks", "naïve Straße — 東京 1 22 333 4444",
             "def f(x):\n\treturn x+1", " a  b\r\n\r\nc ", "a.b.c, (d) [e] {f} $5 <g> ^h~ |i",
             "CamelCase HTTPServer x2y"]  # fmt: skip
    texts += [t for t in TEXTS[:60] if "\0" not in t and "<" not in t and unicodedata.normalize("NFC", t) == t and t]
    got = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    assert differences(ours.encode_batch(texts), got) == []


def test_a_known_pre_tokenizer_is_found_by_its_expressions():
    for name, pre in PRE_TOKENIZERS.items():
        made = BUILDERS["byte_level"]()
        made.pre_tokenizer = build_pre_tokenizer(pre)
        made.normalizer = normalizers.NFC() if pre.nfc else normalizers.Sequence([])
        made.model.ignore_merges = pre.ignore_merges
        found = tokenizer_metadata(made, SPECIAL, {}, 384)["tokenizer.ggml.pre"]
        assert PRE_TOKENIZERS[found][:3] == pre[:3], name


@pytest.mark.parametrize("change, message", [
    (lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.Split(Regex("x+"), "isolated")), "pre-tokenizer"),
    (lambda made: setattr(made, "normalizer", normalizers.Lowercase()), "llama.cpp has no tokenizer of this kind"),
])  # fmt: skip
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(change, message):
    made = BUILDERS["byte_level"]()
    change(made)
    with pytest.raises(ValueError, match=message):
        tokenizer_metadata(made, SPECIAL, {}, 400)


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "gpt1", "word_level"])
def test_another_kind_of_model_is_refused(kind):
    with pytest.raises(ValueError, match="expected BPE of bytes or of SentencePiece"):
        tokenizer_metadata(BUILDERS[kind](), SPECIAL, {}, 400)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(ValueError, match="expected ids below 100, the model's rows"):
        tokenizer_metadata(BUILDERS["byte_level"](), SPECIAL, {}, 100)


WORDS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
         "tokenizer.ggml.merges": ["a b"]}  # fmt: skip
DAMAGED = {
    "t5": ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5', expected gpt2 or llama"),
    "none": ({"tokenizer.ggml.model": "none"}, "got no tokenizer"),
    "pre": ({"tokenizer.ggml.pre": "kimi-k2"}, "tokenizer.ggml.pre is 'kimi-k2', expected one of gpt-2"),
    "tokens": ({"tokenizer.ggml.tokens": [1, 2]}, "expected an array of str"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "got no tokenizer.ggml.tokens"),
    "types": ({"tokenizer.ggml.token_type": [1]}, "got 1 items in tokenizer.ggml.token_type, expected 3"),
    "twice": ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "got the token 'a' twice, as 0 and 2"),
    "merge": ({"tokenizer.ggml.merges": ["a"]}, "got merge 0 'a', expected two parts"),
    "merge of no token": ({"tokenizer.ggml.merges": ["b a"]}, "got"),
    "eos": ({"tokenizer.ggml.eos_token_id": 3}, "eos_token_id is 3, expected an id below 3"),
    "eos text": ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id is 'x', expected int"),
    "scores": ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}, "got 1 items in tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_metadata_is_one_sentence(name):
    change, message = DAMAGED[name]
    assert isinstance(build_library(WORDS), tokenizers.Tokenizer)
    with pytest.raises(ValueError, match=message) as caught:
        build_library({**WORDS, **change})
    assert "\n" not in str(caught.value)


def test_gemma_merges_by_ids_and_respells_blanks():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "a", "b", "  ", "▁a", "ab"]
    metadata = {
        "general.architecture": "gemma", "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 2, 1, 1, 1, 4, 1, 1], "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
    }  # fmt: skip
    made = build_library(metadata)
    assert made.encode("  ab").tokens == ["<bos>", "▁▁", "ab"]
    assert json.loads(made.to_str())["model"]["merges"][0] == ["▁", "▁"]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_llama_cpp_gives_the_same_ids_of_sentencepiece(kind, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    export(build("llama"), tmp_path / "m.gguf", kind=kind)
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    texts = [text for text in TEXTS if text and "\0" not in text and not any(mark in text for mark in MARKS)]
    texts = [text for text in texts if kind == "llama" or "  " not in text]  # it takes runs of blanks as added tokens
    got = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    assert differences(Tokenizer.load(tmp_path / "m.gguf").encode_batch(texts, add_special_tokens=False), got) == []
