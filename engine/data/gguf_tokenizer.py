"""The tokenizer of a .gguf file, converted for the `tokenizers` library, and its chat templates.

    tokenizer.ggml.model   "gpt2": byte-level BPE with merges; "llama": BPE of SentencePiece, with scores
    tokenizer.ggml.pre     how "gpt2" cuts a text into pieces, see gguf_pre_tokenizers.py
    tokenizer.ggml.tokens, .token_type, .scores, .merges, .bos_token_id, ..., .add_bos_token
    tokenizer.chat_template, tokenizer.chat_template.NAME
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from peakgpt.engine.data.gguf_header import TOKENIZER, GGUFHeader, read_header
from peakgpt.engine.data.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, build_normalizer, build_pre_tokenizer
from peakgpt.engine.data.library_call import call
from peakgpt.engine.data.sentencepiece_model import SPACE, merges_by_score

CHAT_TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # TokenType of ggml
SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
           "sep_token": "seperator_token_id", "pad_token": "padding_token_id"}  # fmt: skip
NO_TOKENIZER = (None, "none", "no_vocab")
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # where a file names none, as llama.cpp


@dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer of a file.

    Args:
        library: the tokenizer.
        special_tokens: names and texts, such as {"eos_token": "</s>"}.
        chat_templates: by name; the usual one is "default".
    """

    library: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]

    @property
    def config_file(self) -> bytes:
        """A tokenizer_config.json, so that the saved tokenizer of another model folder means the same."""
        templates = [{"name": name, "template": text} for name, text in self.chat_templates.items()]
        plain = self.chat_templates.get("default") if len(templates) == 1 else None
        template = {"chat_template": plain or templates} if templates else {}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens,
                  "clean_up_tokenization_spaces": False, **template}  # fmt: skip
        return f"{json.dumps(config, indent=2)}\n".encode()


def read_gguf_tokenizer(path: Path | str) -> GGUFTokenizer:
    """Read the tokenizer of a .gguf file.

    Raises:
        ValueError: the file is damaged, has no tokenizer, or one of a kind that is not supported.
    """
    header = read_header(path)
    try:
        return GGUFTokenizer(*_build(header), _chat_templates(header))
    except ValueError as error:
        message = str(error).removeprefix(f"{path}: ").removeprefix("tokenizer: ")
        raise ValueError(f"tokenizer {path}: {message}") from None


def has_gguf_tokenizer(path: Path | str) -> bool:
    """Return whether a .gguf file has a tokenizer of any kind."""
    return read_header(path).get(f"{TOKENIZER}model", str) not in NO_TOKENIZER


def _chat_templates(header: GGUFHeader) -> dict[str, str]:
    keys = [key for key in header.metadata if key == CHAT_TEMPLATE or key.startswith(f"{CHAT_TEMPLATE}.")]
    return {key.removeprefix(CHAT_TEMPLATE).removeprefix(".") or "default": header.get(key, str) for key in keys}


def build_library(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer that metadata describes; lists may stand in place of arrays.

    Raises:
        ValueError: there is none, or one of a kind that is not supported.
    """
    library, _ = _build(GGUFHeader(Path(), metadata, {}, memoryview(b"")))
    return library


def _build(header: GGUFHeader) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Return the tokenizer, and names and texts of its special tokens."""
    kind = header.get(f"{TOKENIZER}model", str)
    if kind in NO_TOKENIZER:
        raise ValueError("got no tokenizer, expected one")
    builders: dict[str, Callable[[GGUFHeader, _Words], _Parts]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ValueError(f"{TOKENIZER}model is {kind!r}, expected {' or '.join(builders)}")
    words = _read_words(header)
    parts = builders[kind](header, words)
    library = parts.library
    added = [AddedToken(words.texts[i], normalized=False, special=words.types[i] == CONTROL)
             for i in range(len(words.texts)) if words.types[i] in (CONTROL, USER_DEFINED)]  # fmt: skip
    call(library.add_tokens, added)
    special = _special_tokens(header, words, parts.default_ids)
    around = [special.get(f"{name}_token") if header.get(f"{TOKENIZER}add_{name}_token", bool, default) else None
              for name, default in (("bos", parts.add_bos), ("eos", False))]  # fmt: skip
    _add_template(library, around)
    return library, special


@dataclass(frozen=True)
class _Words:
    """Texts and types of the tokens, in the order of their ids."""

    texts: list[str]
    types: list[int]

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each text. Tokens of the type UNUSED are left out: they only fill up the embedding."""
        return {text: token for token, text in enumerate(self.texts) if self.types[token] != UNUSED}


@dataclass(frozen=True)
class _Parts:
    library: tokenizers.Tokenizer
    add_bos: bool  # if the file does not say it
    default_ids: Mapping[str, int]


def _read_words(header: GGUFHeader) -> _Words:
    texts = _array(header, "tokens", str)
    if not texts:
        raise ValueError(f"got no {TOKENIZER}tokens, expected an array of strings")
    types = _array(header, "token_type", int) or [NORMAL] * len(texts)
    if len(types) != len(texts):
        raise ValueError(f"got {len(types)} items in {TOKENIZER}token_type, expected {len(texts)}, one a token")
    ids: dict[str, int] = {}
    for token, text in enumerate(texts):
        if ids.setdefault(text, token) != token and UNUSED not in (types[token], types[ids[text]]):
            raise ValueError(f"got the token {text!r:.80} twice, as {ids[text]} and {token}, expected different tokens")
    return _Words(texts, types)


def _array(header: GGUFHeader, name: str, kind: type) -> list[Any]:
    """Return an array of strings or numbers as a list; empty if the file has none."""
    values = header.metadata.get(f"{TOKENIZER}{name}", [])
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values[:1]):
        raise ValueError(f"{TOKENIZER}{name} is {str(values)!r:.80}, expected an array of {kind.__name__}")
    return list(values)


def _byte_level(header: GGUFHeader, words: _Words) -> _Parts:
    name = header.get(f"{TOKENIZER}pre", str, "default")
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"{TOKENIZER}pre is {name!r}, expected one of {', '.join(PRE_TOKENIZERS)}")
    pre: PreTokenizer = PRE_TOKENIZERS[name]
    merges = []
    for number, line in enumerate(_array(header, "merges", str)):
        first, blank, second = line.partition(" ")
        if not blank or not first or not second or " " in second:
            raise ValueError(f"got merge {number} {line!r:.80}, expected two parts of a token and a blank between")
        merges.append((first, second))
    model = call(models.BPE, vocab=words.vocabulary, merges=merges, ignore_merges=pre.ignore_merges)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer, library.decoder = build_pre_tokenizer(pre), decoders.ByteLevel()
    if normalizer := build_normalizer(pre):
        library.normalizer = normalizer
    return _Parts(library, pre.add_bos, {})


def _sentencepiece(header: GGUFHeader, words: _Words) -> _Parts:
    architecture = header.get("general.architecture", str, "")
    is_gemma = architecture.startswith("gemma")
    texts, scores = words.texts, _array(header, "scores", float)
    if len(scores) != len(texts):
        raise ValueError(f"got {len(scores)} items in {TOKENIZER}scores, expected {len(texts)}, the number of tokens")
    if is_gemma:
        # Its blanks are written as blanks, and its scores are not in the order of its merges, its ids are.
        texts[:] = [SPACE * len(text) if text.strip(" ") == "" else text for text in texts]
        scores = [-float(token) for token in range(len(texts))]
    vocabulary = words.vocabulary
    merges = merges_by_score([(text, scores[token]) for text, token in vocabulary.items()])
    unknown = next((text for text, kind in zip(texts, words.types, strict=True) if kind == UNKNOWN), None)
    model = call(models.BPE, vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    prefix = header.get(f"{TOKENIZER}add_space_prefix", bool, not is_gemma)
    # As sentencepiece and llama.cpp, a blank comes before a text that begins with a blank too.
    before = [normalizers.Prepend(SPACE)] if prefix else []
    library.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    library.decoder = decoders.Sequence(parts)
    return _Parts(library, True, _SENTENCEPIECE_IDS)


def _special_tokens(header: GGUFHeader, words: _Words, default_ids: Mapping[str, int]) -> dict[str, str]:
    """Return names and texts of the special tokens."""
    special = {}
    for name, key in SPECIAL.items():
        token = header.get(f"{TOKENIZER}{key}", int, default_ids.get(name))
        if token is None or (token >= len(words.texts) and f"{TOKENIZER}{key}" not in header.metadata):
            continue
        if not 0 <= token < len(words.texts):
            raise ValueError(f"{TOKENIZER}{key} is {token}, expected an id below {len(words.texts)}")
        special[name] = words.texts[token]
    return special


def _add_template(library: tokenizers.Tokenizer, around: list[str | None]) -> None:
    """Put BOS before and EOS after a text, or one of them."""
    texts = [text for text in around if text is not None]
    if texts:
        parts = [around[0], "$A", around[1]]
        tokens = [(text, library.token_to_id(text)) for text in dict.fromkeys(texts)]
        if absent := [text for text, token in tokens if token is None]:
            raise ValueError(f"got the unused token {absent[0]!r:.80} around a text, expected one of the vocabulary")
        library.post_processor = processors.TemplateProcessing(
            single=[part for part in parts if part is not None], special_tokens=tokens
        )
