"""The vocabulary files of a tokenizer folder, converted for the `tokenizers` library. In order of precedence:

    tokenizer.json              everything but the names of the special tokens
    tokenizer.model             SentencePiece (Llama 2), or the words of tiktoken (Llama 3)
    tiktoken.model, *.tiktoken  the words of tiktoken
    vocab.json + merges.txt     byte-pair encoding: GPT-2's of bytes, GPT-1's of characters
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from peakgpt.engine.data.library_call import call
from peakgpt.engine.data.sentencepiece_model import build_sentencepiece
from peakgpt.engine.data.text_file import read_bytes, read_text
from peakgpt.engine.data.tiktoken_file import build_tiktoken, is_tiktoken
from peakgpt.engine.data.tokenizer_classes import CLASSES, WORD_END, class_of_merges
from peakgpt.engine.data.tokenizer_names import MERGES, MODEL, TIKTOKEN, TOKENIZER, VOCAB


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that a file describes.

    Args:
        source: name of the file.
        library: the tokenizer. transformers may build parts of it anew.
        classes: the classes whose parts fit the words of this file.
        default_class: the class of a folder that names none of `classes`.
        special_tokens: names and texts of special tokens, which a file of SentencePiece has.
    """

    source: str
    library: tokenizers.Tokenizer
    classes: tuple[str, ...] = tuple(CLASSES)
    default_class: str = ""
    special_tokens: dict[str, str] = field(default_factory=dict)


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Read the vocabulary of a folder.

    Args:
        config: content of tokenizer_config.json.
    Raises:
        ValueError: there is no file, it is damaged, or SentencePiece is not installed.
    """
    tiktoken = sorted(path.name for path in folder.glob("*.tiktoken"))
    readers: dict[str, Callable[[Path, Mapping[str, Any]], Vocabulary]] = {
        TOKENIZER: _read_json, MODEL: _read_model, TIKTOKEN: _read_model, **dict.fromkeys(tiktoken, _read_model),
        VOCAB: _read_merges,
    }  # fmt: skip
    for name, read in readers.items():
        path = folder / name
        if path.exists():
            try:
                return read(path, config)
            except ValueError as error:
                raise ValueError(f"tokenizer {error}") from None
    raise ValueError(f"tokenizer {folder / TOKENIZER}: got {_without_vocabulary(folder)}")


def _without_vocabulary(folder: Path) -> str:
    found = [name for name in ("vocab.txt", "tekken.json") if (folder / name).exists()]
    if not found:
        return f"No such file, expected {TOKENIZER}, {MODEL}, {TIKTOKEN}, *.tiktoken, or {VOCAB} and {MERGES}"
    return (
        f"No such file but {', '.join(found)}, which peakgpt does not read; expected tokenizer.json, which "
        f"transformers writes: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def _read_json(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    try:
        return Vocabulary(path.name, call(tokenizers.Tokenizer.from_str, read_text(path)))
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        reason = str(error).removeprefix("tokenizer: got ")[:300]
        raise ValueError(f"{path}: got {reason}, expected a file saved by tokenizers") from None


def _read_model(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    data = read_bytes(path)
    try:
        if path.name != MODEL or is_tiktoken(data):
            return Vocabulary(path.name, build_tiktoken(path.name, data, config), classes=())
        library, special_tokens = build_sentencepiece(data)
        return Vocabulary(path.name, library, ("LlamaTokenizer",), special_tokens=special_tokens)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_merges(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Read vocab.json, word -> id, and merges.txt, two parts of a word a line after a line with the version."""
    merges_path = path.with_name(MERGES)
    if not merges_path.exists():
        raise ValueError(f"{merges_path}: got No such file, expected it beside {VOCAB}")
    lines = [line for line in read_text(merges_path).split("\n") if line and not line.startswith("#version")]
    merges = [tuple(line.split(" ")) for line in lines]
    if damaged := next((line for line, parts in zip(lines, merges, strict=True) if len(parts) != 2), None):
        raise ValueError(f"{merges_path}: got line {damaged!r:.80}, expected two parts of a word and a space between")
    words = _read_words(path)
    unknown = token if isinstance(token := config.get("unk_token", "<unk>"), str) else "<unk>"
    is_gpt1 = any(word.endswith(WORD_END) for word in words)
    options = {"end_of_word_suffix": WORD_END, "unk_token": unknown if unknown in words else None} if is_gpt1 else {}
    try:
        model = call(models.BPE, vocab=words, merges=merges, **options)
    except ValueError as error:
        reason = str(error).removeprefix("tokenizer: got ")[:300]
        raise ValueError(f"{merges_path}: got {reason}, expected merges of the words of {VOCAB}") from None
    classes = ("OpenAIGPTTokenizer",) if is_gpt1 else ("GPT2Tokenizer", "GPTNeoXTokenizer")
    return Vocabulary(path.name, tokenizers.Tokenizer(model), classes, class_of_merges(model))


def _read_words(path: Path) -> dict[str, int]:
    expected = "expected JSON with one object of words and ids"
    try:
        words = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got {str(error).removeprefix(f'{path}: ')!r:.200}, {expected}") from None
    ids = list(words.values()) if isinstance(words, dict) else [None]
    if not all(type(token) is int and 0 <= token < 1 << 32 for token in ids):
        raise ValueError(f"{path}: got {type(words).__name__} {str(words)[:80]!r}, {expected}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path}: got words that share an id, {expected} of their own")
    return words
