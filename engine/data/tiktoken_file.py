"""Files of tiktoken: the words of a byte-level vocabulary in base64 with their ranks, which are their ids.

    IQ== 0
    Ig== 1

The file lacks the expression that cuts a text into pieces, and the special tokens. The encodings of OpenAI have a name,
tokenizer.model and tiktoken.model are Llama 3's, and for any other file tokenizer_config.json names the expression as
`pat_str`, which is tiktoken's word for it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from peakgpt.engine.data.library_call import call
from peakgpt.engine.data.token_pieces import BYTE_ALPHABET

MAX_ID = 1 << 20  # unnamed ids below it get a token each
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_ALPHABET.items()}


class Encoding(NamedTuple):
    """What a file of words lacks."""

    pattern: str  # of the pieces that a text is cut into; a merge never crosses two pieces
    special_tokens: Mapping[str, int]


# Of tiktoken_ext/openai_public.py of tiktoken 0.14, without its possessive quantifiers: the same pieces.
_R50K = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = "|".join((
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
))  # fmt: skip
_O200K = "|".join((
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
))  # fmt: skip
_END = "<|endoftext|>"
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
ENCODINGS = {
    "r50k_base.tiktoken": Encoding(_R50K, {_END: 50256}),
    "p50k_base.tiktoken": Encoding(_R50K, {_END: 50256}),
    "cl100k_base.tiktoken": Encoding(_CL100K, {_END: 100257, **dict(zip(_FIM, range(100258, 100261), strict=True)),
                                               "<|endofprompt|>": 100276}),
    "o200k_base.tiktoken": Encoding(_O200K, {_END: 199999, "<|endofprompt|>": 200018}),
    **dict.fromkeys(("tokenizer.model", "tiktoken.model"), Encoding(_CL100K, {})),
}  # fmt: skip


def is_tiktoken(data: bytes) -> bool:
    """Return whether the first line of a file is a word in base64 and a rank."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", data[:1000]) is not None


def build_tiktoken(name: str, data: bytes, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Build a tokenizer from a file of words.

    Args:
        name: of the file.
        config: content of tokenizer_config.json: its `added_tokens_decoder` has more special tokens, and `pat_str` the
            expression of a file without a known name.
    Raises:
        ValueError: the file is damaged, or the expression is not known.
    """
    encoding = _encoding(name, config)
    ranks = _read_ranks(data)
    words = {"".join(map(CHAR_OF_BYTE.__getitem__, word)): rank for word, rank in ranks.items()}
    special = _special_tokens(encoding, config, len(ranks))
    if taken := sorted(set(special.values()) & set(ranks.values())):
        raise ValueError(f"got a word and a special token of id {taken[0]}, expected each with an id of its own")
    try:
        model = call(models.BPE, vocab={**words, **special}, merges=_merges(ranks), ignore_merges=True)
        library = tokenizers.Tokenizer(model)
        pieces = pre_tokenizers.Split(Regex(encoding.pattern), "isolated")
    except Exception as error:
        reason = str(error).removeprefix("tokenizer: got ")[:200]
        raise ValueError(f"got {reason}, expected words, ranks and an expression of tiktoken") from None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    library.decoder, library.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    library.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return library


def _encoding(name: str, config: Mapping[str, Any]) -> Encoding:
    pattern = config.get("pat_str")
    if isinstance(pattern, str):
        return Encoding(pattern, {})
    if name not in ENCODINGS:
        raise ValueError(f"got words without the expression that cuts a text, expected it as pat_str in "
                         f"tokenizer_config.json, or one of the names {', '.join(ENCODINGS)}")  # fmt: skip
    return ENCODINGS[name]


def _read_ranks(data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        word, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"got line {number} {line[:60]!r}, expected a word in base64 and a rank") from None
    absent = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if absent is not None or len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0:
        reason = "a rank twice or below 0" if absent is None else f"no word for byte 0x{absent:02x}"
        raise ValueError(f"got {reason}, expected every byte, and words of different ranks from 0 on")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Return all pairs of words that make a word, the lowest rank first: tiktoken merges any such pair."""
    text = {word: "".join(map(CHAR_OF_BYTE.__getitem__, word)) for word in ranks}
    merges: list[tuple[str, str]] = []
    for word in sorted(ranks, key=ranks.__getitem__):
        pairs = [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in ranks and word[i:] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(text[first], text[second]) for first, second in pairs]
    return merges


def _special_tokens(encoding: Encoding, config: Mapping[str, Any], words: int) -> dict[str, int]:
    """Return the special tokens and their ids. As in transformers, unnamed ids between two of them get a name."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        texts = {int(token): value["content"] for token, value in listed.items() if int(token) >= words}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"got {error!r} in added_tokens_decoder, expected ids and tokens") from None
    if max(texts, default=0) > MAX_ID:
        raise ValueError(f"got id {max(texts)} in added_tokens_decoder, expected up to {MAX_ID}")
    reserved = {f"<|reserved_token_{token}|>": token for token in range(words, max(texts, default=words))
                if token not in texts}  # fmt: skip
    named = {str(text): token for token, text in texts.items()}
    return {**encoding.special_tokens, **dict(sorted({**reserved, **named}.items(), key=lambda item: item[1]))}
