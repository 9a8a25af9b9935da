"""A tokenizer as metadata of a .gguf file: the inverse of gguf_tokenizer.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from peakgpt.engine.data.gguf_header import TOKENIZER
from peakgpt.engine.data.gguf_pre_tokenizers import pre_tokenizer_name
from peakgpt.engine.data.gguf_tokenizer import (
    BYTE,
    CHAT_TEMPLATE,
    CONTROL,
    NORMAL,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    build_library,
)
from peakgpt.engine.data.library_call import call

# Texts that must give the same ids with the tokenizer and with the metadata: what a file cannot express shows here.
# None begins with a blank: llama.cpp puts one more before it, as sentencepiece; some classes of transformers do not.
PROBES = (
    "Hello world, it's 12345.6 o'clock!\n\n\tI'VE  three   blanks \r\n", "trailing ", "naïve café — 東京 🙂 é",
    "CamelCaseWords and snake_case == {1: [2, 3]};", "",
)  # fmt: skip
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def tokenizer_metadata(
    library: tokenizers.Tokenizer, special_tokens: Mapping[str, str], chat_templates: Mapping[str, str], rows: int
) -> dict[str, Any]:
    """Convert a tokenizer to metadata.

    Args:
        special_tokens: names and texts, such as {"eos_token": "</s>"}.
        chat_templates: by name; the usual one is "default".
        rows: of the model's embedding; ids without a token are written as unused ones.
    Returns:
        Metadata by key: strings, numbers, bools, and lists of them.
    Raises:
        ValueError: the tokenizer has more tokens than the model, or llama.cpp has none of its kind.
    """
    content = json.loads(call(library.to_str))
    ids = library.get_vocab(with_added_tokens=True)
    if max(ids.values(), default=-1) >= rows:
        raise ValueError(f"tokenizer: got ids up to {max(ids.values())}, expected ids below {rows}, the model's rows")
    texts = dict(zip(ids.values(), ids, strict=True))
    metadata = _words(content, [texts.get(i) for i in range(rows)])
    named = {key: ids[special_tokens[name]] for name, key in SPECIAL.items() if special_tokens.get(name) in ids}
    metadata |= {f"{TOKENIZER}{key}": token for key, token in named.items()}
    metadata |= _around(library, named)
    _expect_same(library, metadata)
    return metadata | _templates(chat_templates)


def _words(content: Mapping[str, Any], texts: Sequence[str | None]) -> dict[str, Any]:
    """Return the tokens, and how a text becomes tokens.

    Args:
        content: of a tokenizer.json.
        texts: of the tokens in the order of their ids; None for an id without a token.
    """
    model = content["model"]
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in content["added_tokens"]}
    is_bytes = (content.get("decoder") or {}).get("type") == "ByteLevel"
    if model["type"] != "BPE" or not (is_bytes or model.get("byte_fallback")):
        raise ValueError(f"tokenizer: got a {model['type']} model without bytes, expected BPE of bytes or of "
                         "SentencePiece: llama.cpp has no other")  # fmt: skip
    kinds = [UNUSED if text is None else added.get(i, NORMAL) for i, text in enumerate(texts)]
    words = {"tokens": [f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)], "token_type": kinds}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if is_bytes:
        pre = pre_tokenizer_name(content)
        if pre is None:
            got = str(content.get("pre_tokenizer"))[:200]
            raise ValueError(f"tokenizer: got the pre-tokenizer {got}, expected one that llama.cpp has")
        own = {"model": "gpt2", "pre": pre, "merges": [" ".join(merge) for merge in merges]}
    else:
        own = {"model": "llama", "pre": "default", "scores": _scores(texts, merges),
               "add_space_prefix": "▁" in json.dumps(_prefix(content), ensure_ascii=False)}  # fmt: skip
        for i, text in enumerate(texts):
            if kinds[i] == NORMAL and text is not None:
                kinds[i] = UNKNOWN if text == model.get("unk_token") else BYTE if _BYTE.fullmatch(text) else NORMAL
    return {f"{TOKENIZER}{name}": value for name, value in {**own, **words}.items()}


def _prefix(content: Mapping[str, Any]) -> Any:
    """Return the part of a tokenizer.json that puts a blank before a text."""
    parts = [content.get("normalizer"), content.get("pre_tokenizer")]
    parts = [one for part in parts if part for one in part.get("normalizers", part.get("pretokenizers", [part]))]
    return [part for part in parts if part["type"] == "Prepend" or part.get("prepend_scheme", "never") != "never"]


def _scores(texts: Sequence[str | None], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Return scores by which llama.cpp merges in the order of the merges: minus the rank of a token's first merge."""
    ranks: dict[str, int] = {}
    for rank, (first, second) in enumerate(merges):
        ranks.setdefault(first + second, rank)
    return [-float(ranks.get(text, 0)) if text else 0.0 for text in texts]


def _around(library: tokenizers.Tokenizer, named: Mapping[str, int]) -> dict[str, Any]:
    """Return whether BOS is put before a text and EOS after it."""
    parts = call(library.encode, "a")
    inside = [i for i, sequence in enumerate(parts.sequence_ids) if sequence is not None]
    before, after = parts.ids[: inside[0]], parts.ids[inside[-1] + 1 :]
    metadata: dict[str, Any] = {}
    for name, ids in (("bos", before), ("eos", after)):
        if len(ids) > 1 or (ids and named.get(f"{name}_token_id", ids[0]) != ids[0]):
            raise ValueError(f"tokenizer: got ids {ids} around a text, expected {name.upper()} alone: llama.cpp has no "
                             "other")  # fmt: skip
        metadata[f"{TOKENIZER}add_{name}_token"] = bool(ids)
        metadata |= {f"{TOKENIZER}{name}_token_id": token for token in ids}
    return metadata


def _expect_same(library: tokenizers.Tokenizer, metadata: Mapping[str, Any]) -> None:
    other = build_library(metadata)
    for text in PROBES:
        expected, got = (call(one.encode, text).ids for one in (library, other))
        if got != expected:
            raise ValueError(f"tokenizer: got ids {got[:8]} from the exported tokenizer for {text[:20]!r}, expected "
                             f"{expected[:8]}: llama.cpp has no tokenizer of this kind")  # fmt: skip


def _templates(chat_templates: Mapping[str, str]) -> dict[str, Any]:
    named = [name for name in chat_templates if name != "default"]
    metadata: dict[str, Any] = {f"{CHAT_TEMPLATE}.{name}": chat_templates[name] for name in named}
    if "default" in chat_templates:
        metadata[CHAT_TEMPLATE] = chat_templates["default"]
    return {**metadata, **({f"{CHAT_TEMPLATE}s": named} if named else {})}
