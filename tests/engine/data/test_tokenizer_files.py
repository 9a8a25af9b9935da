"""Tokenizer.load equals transformers' AutoTokenizer: ids and special tokens, for generated folders and texts."""

import base64
import itertools
import json
import os
import random
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BUILDERS
from tokenizers import AddedToken, processors

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_files import read_folder

transformers = pytest.importorskip("transformers")

GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEXTS = [
    "hello",
    "",
    " the canary",
    "a <s> b</s>",
    "<s>hello <tool> x",
    "é日本\n  naïve",
    "the<sep>canary <sep> x",
    "[X] y",
]
CHARS = st.one_of(st.sampled_from("the canary sings é日 \n"), st.characters(exclude_categories=["Cs"]))


def typed(content, **flags):
    return {"__type": "AddedToken", "content": content, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False, **flags}  # fmt: skip


# Parts of tokenizer_config.json.
CONFIGS = {
    "plain": {},
    "flags without effect": {"add_bos_token": True, "add_eos_token": True, "clean_up_tokenization_spaces": True},
    "extra": {"extra_special_tokens": ["<tool>", "<sep>"]},
    "additional": {"additional_special_tokens": ["<tool>"]},
    "named extra": {"extra_special_tokens": {"image_token": "<tool>"}},
    "own": {"tool_token": "<tool>", "pad_token": "<pad>"},
    "objects": {"pad_token": typed("<sep>", lstrip=True, rstrip=True), "mask_token": typed("[X]", single_word=True)},
    "null": {"pad_token": None, "sep_token": None},
    "decoder": {"added_tokens_decoder": {
        "900": {"content": "<tool>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False,
                "special": False},
        "901": {"content": "canary", "lstrip": False, "rstrip": False, "normalized": True, "single_word": True,
                "special": True}}},
    "split": {"split_special_tokens": True},
}  # fmt: skip


def library(kind, seed):
    """A tokenizer with a random post processor, added tokens, truncation and padding."""
    rng, made = random.Random(seed), BUILDERS[kind]()
    made.add_special_tokens(["<s>", "</s>"])
    ids = [(text, made.token_to_id(text)) for text in ("<s>", "</s>")]
    single = rng.choice(["$A", "<s> $A", "$A </s>", "<s> $A </s>", "</s> $A"])
    made.post_processor = rng.choice([None, processors.TemplateProcessing(single=single, special_tokens=ids)])
    for content in rng.sample(["<tool>", "[X]", "canary", "naïve", "<sep>"], rng.randrange(4)):
        flags = {name: rng.random() < 0.5 for name in ("lstrip", "rstrip", "normalized", "single_word")}
        made.add_tokens([AddedToken(content, special=rng.random() < 0.5, **flags)])
    if rng.random() < 0.5:
        made.enable_truncation(2)
        made.enable_padding(length=50)
    return made


def write(folder, made, config, **others):
    made.save(str(folder / "tokenizer.json"))
    for name, data in {"tokenizer_config": config, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(data))


def both(folder):
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


def assert_equal(folder, texts):
    ours, theirs = both(folder)
    for text in texts:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        without = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == without, text
    assert read_folder(folder).special_tokens == theirs.special_tokens_map
    assert (ours.end_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    assert ours.pieces.library.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize(("kind", "name"), [*itertools.product(BUILDERS, CONFIGS)])
def test_ids_equal_transformers(kind, name, tmp_path):
    for seed in range(2):
        write(tmp_path, library(kind, f"{kind}{name}{seed}"), {**GENERIC, **CONFIGS[name]})
        assert_equal(tmp_path, TEXTS)


@pytest.mark.parametrize("prefix", [None, False, True])
@pytest.mark.parametrize(
    ("kind", "name", "model_type"),
    [
        ("byte_level", "GPT2TokenizerFast", "gpt2"), ("byte_level", None, "opt"),
        ("byte_level", "GPT2Tokenizer", "opt"),
        ("byte_level", "GPTNeoXTokenizerFast", "gpt_neox"), ("byte_level", None, "gpt_neox"),
        ("byte_level", "LlamaTokenizerFast", "llama"), ("llama", "LlamaTokenizerFast", "llama"),
        ("llama", "LlamaTokenizer", None),
        ("llama", "LlamaTokenizerFast", "mistral"),
        ("byte_level", "GPT2TokenizerFast", "peakgpt"),
        ("byte_level", None, "bloom"), ("byte_level", "PreTrainedTokenizerFast", "gpt2"),
    ],
)  # fmt: skip
def test_classes_that_transformers_builds_anew(kind, name, model_type, prefix, tmp_path):
    """add_prefix_space of the config holds, and NeoX's class puts nothing before a text."""
    made = BUILDERS[kind]()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    for legacy in (None, True, False):
        config = {**GENERIC, "tokenizer_class": name, "add_prefix_space": prefix, "legacy": legacy}
        write(tmp_path, made, {key: value for key, value in config.items() if value is not None})
        if model_type:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert_equal(tmp_path, TEXTS)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "unigram"])
def test_older_files_are_read(kind, tmp_path):
    """special_tokens_map.json wins over tokenizer_config.json, and added_tokens.json adds tokens."""
    made = BUILDERS[kind]()
    flags = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    write(
        tmp_path, made, {**GENERIC, "pad_token": "<p>"}, special_tokens_map={
            "pad_token": {"content": "<sep>", **flags}, "cls_token": "[X]", "eos_token": {"content": "</s>", **flags},
            "extra_special_tokens": ["<one>"],
        }, added_tokens={"<tool>": made.get_vocab_size(), "[X]": made.get_vocab_size() + 1},
    )  # fmt: skip
    assert_equal(tmp_path, TEXTS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    pairs = []
    for kind in BUILDERS:
        folder = tmp_path_factory.mktemp(kind)
        write(folder, library(kind, f"{kind}5"), {**GENERIC, **CONFIGS["decoder"]})
        pairs.append((kind, *both(folder)))
    return pairs


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.one_of(st.text(CHARS, max_size=8), st.sampled_from(TEXTS)), max_size=4).map("".join))
def test_any_text_has_the_ids_of_transformers(loaded, text):
    for kind, ours, theirs in loaded:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        if not any(theirs.added_tokens_decoder.get(i, None) for i in ids[1:-1]) and "\ufffd" not in theirs.decode(ids):
            assert ours.decode(ids) == theirs.decode(ids), kind


def test_saved_folder_equals_the_loaded_one(tmp_path):
    """`save` keeps every file, so that the copy has the same ids and the same chat template."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "additional_chat_templates").mkdir(parents=True)
    copy.mkdir()
    write(source, library("llama", 3), {**GENERIC, **CONFIGS["decoder"], "chat_template": "{{ bos_token }}"})
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.load(source).save(copy)
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file())
    for name in names:
        if name.name != "tokenizer.json":
            assert (source / name).read_bytes() == (copy / name).read_bytes()
    ours, theirs = both(copy)
    for text in TEXTS:
        assert ours.encode(text) == Tokenizer.load(source).encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("name", ["vocab.txt", "tekken.json"])
def test_folder_of_a_format_that_is_not_read_names_the_way_out(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"tokenizer\.json: got No such file but {name}.*save_pretrained"):
        Tokenizer.load(tmp_path)


WORDS = json.dumps({"a": 0, "b": 1, "ab": 2})
LETTERS = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
DAMAGED = {  # name: files, part of the message
    "no merges": ({"vocab.json": WORDS}, r"merges\.txt: got No such file, expected it beside vocab\.json"),
    "no JSON": ({"vocab.json": "{", "merges.txt": ""}, r"vocab\.json: got .*, expected JSON with one object"),
    "a list": ({"vocab.json": "[1]", "merges.txt": ""}, r"vocab\.json: got list '\[1\]', expected JSON"),
    "an id of text": ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, r"vocab\.json: got dict .*, expected JSON"),
    "an id twice": ({"vocab.json": '{"a": 1, "b": 1}', "merges.txt": ""}, r"got words that share an id"),
    "a part": ({"vocab.json": WORDS, "merges.txt": "#version: 1\na b c"}, r"got line 'a b c', expected two parts"),
    "no word": ({"vocab.json": WORDS, "merges.txt": "a c"}, r"merges\.txt: got .*, expected merges of the words"),
    "empty model": ({"tokenizer.model": ""}, r"tokenizer\.model: got no pieces, expected a model of SentencePiece"),
    "no model": ({"tokenizer.model": "\xff\xfe"}, r"tokenizer\.model: got .*, expected a model of SentencePiece"),
    "no base64": ({"tokenizer.model": LETTERS + b"?? 256\n"}, r"got line 257 b'\?\? 256', expected a word in base64"),
    "no rank": ({"tiktoken.model": LETTERS + b"YWI=\n"}, r"got line 257 b'YWI=', expected a word in base64 and a rank"),
    "a rank twice": ({"tiktoken.model": LETTERS + b"YWI= 7\n"}, r"got a rank twice or below 0"),
    "an id of two": (
        {"tiktoken.model": LETTERS + b"YWI= 257\n",
         "tokenizer_config.json": '{"added_tokens_decoder": {"257": {"content": "</s>"}}}'},
        r"got a word and a special token of id 257",
    ),
    "a huge id": (
        {"tiktoken.model": LETTERS, "tokenizer_config.json": '{"added_tokens_decoder": {"9999999": {"content": "a"}}}'},
        r"got id 9999999 in added_tokens_decoder, expected up to 1048576",
    ),
    "no token": (
        {"tiktoken.model": LETTERS, "tokenizer_config.json": '{"added_tokens_decoder": {"300": 3}}'},
        r"in added_tokens_decoder, expected ids and tokens",
    ),
    "no byte": ({"tiktoken.model": LETTERS[:-9]}, r"got no word for byte 0xff, expected every byte"),
    "no expression": ({"mine.tiktoken": LETTERS}, r"mine\.tiktoken: got words without the expression .* pat_str"),
    "bad expression": ({"mine.tiktoken": LETTERS, "tokenizer_config.json": '{"pat_str": "("}'}, r"tiktoken: got .*"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_vocabulary_is_one_sentence(name, tmp_path):
    files, message = DAMAGED[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^tokenizer .*{message}") as error:
        Tokenizer.load(tmp_path)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_missing_package_for_sentencepiece_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"^tokenizer .*\.model: got .*pip install 'peakgpt\[sentencepiece\]'"):
        Tokenizer.load(tmp_path)


DAMAGE = [
    ("added_tokens_decoder", [1]), ("added_tokens_decoder", {"x": {"content": "a"}}),
    ("added_tokens_decoder", {"1": 3}), ("added_tokens_decoder", {"1": {"content": 3}}),
    ("added_tokens_decoder", {"-1": {"content": "a", "lstrip": "x"}}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), DAMAGE)
def test_damaged_config_is_one_sentence(key, value, tmp_path):
    write(tmp_path, BUILDERS["byte_level"](), {**GENERIC, key: value})
    with pytest.raises(ValueError, match=r"tokenizer .*tokenizer_config\.json: got .*expected"):
        Tokenizer.load(tmp_path)


def test_panic_of_the_library_is_a_value_error():
    """A Rust panic is a BaseException, which would end the server's thread."""
    made = BUILDERS["byte_level"]()
    pattern = tokenizers.Regex(r"(x+x+)+y")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    tokenizer = Tokenizer(made, "</s>")
    with pytest.raises(ValueError, match=r"tokenizer: got .*retry-limit"):
        tokenizer.encode("x" * 40)
    with pytest.raises(ValueError, match="tokenizer: got a lone surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_files_that_never_end_or_are_long_are_one_sentence(name, tmp_path):
    write(tmp_path, BUILDERS["byte_level"](), {key: value for key, value in GENERIC.items() if value})
    (tmp_path / name).unlink(missing_ok=True)
    for content in (None, b"\xff", b"[" * 100_000, json.dumps(["a" * 5000] * 3).encode()):
        if content is None:
            os.mkfifo(tmp_path / name)  # without a writer
        else:
            (tmp_path / name).unlink()
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^tokenizer .*{name}: .*expected") as error:
            Tokenizer.load(tmp_path)
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_digest_differs_if_special_tokens_in_a_text_are_text(tmp_path):
    digests = set()
    for split in (False, True):
        BUILDERS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": split}))
        digests.add(Tokenizer.load(tmp_path).digest)
    assert len(digests) == 2
