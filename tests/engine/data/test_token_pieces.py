"""Decoding for every kind of tokenizer: as the library decodes, whole characters in streams, offsets of tokens."""

import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BUILDERS, EXACT

from peakgpt.engine.data.token_pieces import BYTE_ALPHABET
from peakgpt.engine.data.tokenizer import StreamDecoder, Tokenizer, token_offsets

TOKENIZERS = {name: Tokenizer(build(), "</s>") for name, build in BUILDERS.items()}
CHARS = st.one_of(st.sampled_from("the canary sings é日 \n▁"), st.characters(exclude_categories=["Cs"]))
TEXTS = st.lists(st.one_of(st.text(CHARS, max_size=12), st.sampled_from(["<s>", "  ", " ", "</s>", "hello"])),
                 max_size=6).map("".join)  # fmt: skip
each_kind = pytest.mark.parametrize("kind", BUILDERS)


def library_decode(tokenizer, ids):
    return tokenizer.library.decode(ids, skip_special_tokens=False)


@each_kind
@settings(max_examples=80, deadline=None)
@given(text=TEXTS)
def test_decode_of_a_text_equals_the_library(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == library_decode(tokenizer, ids)


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=80, deadline=None)
@given(text=TEXTS)
def test_text_decodes_to_itself(kind, text):
    tokenizer = TOKENIZERS[kind]
    text = text.replace("▁", "") if kind != "byte_level" else text  # U+2581 means a blank
    if kind == "llama":  # its normalizer adds a blank after every special token
        text = re.sub(r"</?s>", "", text)
    assert tokenizer.decode(tokenizer.library.encode(text, add_special_tokens=False).ids) == text


@each_kind
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_of_any_ids_equals_decode(kind, data):
    """Any ids, also beyond the vocabulary: parts add up to the text, and no part of a text has half a character."""
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    stream, parts, offsets = StreamDecoder(tokenizer), [], token_offsets(tokenizer, ids)
    for token, offset in zip(ids, offsets, strict=True):
        # The token begins after the text so far, except that a new character replaces an incomplete one by U+FFFD.
        before = "".join(parts)
        parts.append(stream.feed(token))
        assert len(before) <= offset <= len("".join(parts))
    assert "".join(parts) + stream.finish() == tokenizer.decode(ids)
    if kind != "llama" and kind != "gemma":  # the library gives one U+FFFD for each byte of a damaged run
        assert tokenizer.decode(ids) == library_decode(tokenizer, ids)


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=80, deadline=None)
@given(text=TEXTS)
def test_offsets_are_positions_in_the_text(kind, text):
    """A token begins at the character that its first byte belongs to, and no offset counts bytes of a character."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.library.encode(text, add_special_tokens=False).ids
    text = tokenizer.decode(ids)
    stream, before = StreamDecoder(tokenizer), 0
    for token, offset in zip(ids, token_offsets(tokenizer, ids), strict=True):
        assert offset == before
        own = tokenizer.token_bytes(token)
        if before and own.isascii():
            assert text[offset : offset + len(own)] == own.decode()
        before += len(stream.feed(token))


def test_offset_of_a_token_after_half_a_character():
    """The incomplete character becomes U+FFFD, and the next token begins after it."""
    tokenizer = TOKENIZERS["byte_level"]
    names = [name for byte in "€a".encode() for name, value in BYTE_ALPHABET.items() if value == byte]
    euro = [tokenizer.library.token_to_id(name) for name in names]
    assert token_offsets(tokenizer, euro) == [0, 0, 0, 1]
    assert token_offsets(tokenizer, [euro[0], euro[3], *euro]) == [0, 1, 2, 2, 2, 3]


@each_kind
@settings(max_examples=40, deadline=None)
@given(content=st.text(st.one_of(st.sampled_from([*BYTE_ALPHABET]), CHARS), min_size=1, max_size=8),
       special=st.booleans())  # fmt: skip
def test_added_token_is_text_as_it_stands(kind, content, special):
    """Also with letters of GPT-2's byte alphabet, alone and inside a text."""
    library = tokenizers.Tokenizer.from_str(TOKENIZERS[kind].library.to_str())
    if library.token_to_id(content) is not None:  # a word of the model
        return
    added = tokenizers.AddedToken(content, special=special, normalized=False)
    (library.add_special_tokens if special else library.add_tokens)([added])
    tokenizer, token = Tokenizer(library, "</s>"), library.token_to_id(content)
    if token is None:  # the library refuses to add it
        return
    assert tokenizer.decode([token]) == content
    stream = StreamDecoder(tokenizer)
    assert stream.feed(token) + stream.finish() == content
    separator = " " if kind in ("wordpiece", "word_level") else ""
    assert tokenizer.decode([token, token]) == content + separator + content


def test_tokens_added_after_loading_are_found():
    tokenizer = Tokenizer(BUILDERS["byte_level"](), "</s>")
    assert tokenizer.decode([tokenizer.vocab_size]) == ""
    tokenizer.library.add_tokens(["čau"])
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == "čau"
