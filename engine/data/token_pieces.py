"""The bytes of each token of a text, as the decoder of a tokenizer.json gives them.

A token's bytes depend on its neighbors in two ways only, whatever the decoder: some decoders treat the first token of a
text differently (Metaspace drops its leading space), and some add a space between two tokens (WordPiece, GPT-1's BPE).
So each token has three parts, found once by decoding it alone, after another token, and before another token.

A byte-level token is bytes in GPT-2's alphabet; a byte-fallback token `<0xE2>` is one byte. An added token is the text
that it matches, even if its letters belong to GPT-2's alphabet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import tokenizers

from peakgpt.engine.data.library_call import call

SUPPORTED = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece", "BPEDecoder"}
MAX_ID = (1 << 32) - 1  # of the library
_PLAIN = "a"  # a token that every supported decoder leaves as it is
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Return character -> byte: printable Latin-1 is itself, the other bytes are the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


BYTE_ALPHABET = _byte_alphabet()


class Piece(NamedTuple):
    """The bytes of one token."""

    first: bytes  # if it is the first token of a text
    later: bytes  # if another token is before it
    tail: bytes = b""  # added if another token is after it


EMPTY = Piece(b"", b"")


class TokenPieces:
    """Maps token ids to pieces; ids that the vocabulary does not have are empty, as in transformers."""

    def __init__(self, library: tokenizers.Tokenizer):
        """
        Raises:
            ValueError: the decoder has an unsupported part.
        """
        self.library, self._pieces = library, dict[int, Piece]()
        types = [] if library.decoder is None else list(_types(json.loads(library.decoder.__getstate__())))
        self.is_byte_level = "ByteLevel" in types
        if not SUPPORTED.issuperset(types) or (self.is_byte_level and not {"ByteLevel", "Fuse"}.issuperset(types)):
            raise ValueError(f"got decoder {', '.join(types)}, expected ByteLevel, or parts of {', '.join(SUPPORTED)}")
        self._has_fallback = "ByteFallback" in types
        self._added: dict[str, bool] = {}
        self._added_at = -1  # size of the vocabulary when `_added` was read
        self._separator = self._decode(_PLAIN, _PLAIN)[1:-1]

    def __getitem__(self, token: int) -> Piece:
        piece = self._pieces.get(token)
        if piece is None:
            if not 0 <= token <= MAX_ID:
                raise ValueError(f"token id: got {token}, expected 0 to {self.library.get_vocab_size() - 1}")
            name = self.library.id_to_token(token)
            if name is None:
                return EMPTY  # not stored, because the user may add tokens later
            piece = self._pieces[token] = self._piece(name)
        return piece

    def _piece(self, name: str) -> Piece:
        if self._is_literal(name):
            return Piece(name.encode(), (self._separator + name).encode())
        if self.is_byte_level:
            values = [BYTE_ALPHABET.get(char) for char in name]
            data = name.encode() if None in values else bytes(values)
            return Piece(data, data)
        first = self._decode(name)
        fallback = _FALLBACK.fullmatch(name) if self._has_fallback else None
        if fallback:
            data = bytes.fromhex(fallback[1])
            return Piece(first.encode() if data < b"\x80" else data, data)
        later = self._decode(_PLAIN, name).removeprefix(_PLAIN)
        tail = self._decode(_PLAIN, name, _PLAIN).removeprefix(_PLAIN + later).removesuffix(self._separator + _PLAIN)
        return Piece(first.encode(), later.encode(), tail.encode())

    def _decode(self, *names: str) -> str:
        decoder = self.library.decoder
        return " ".join(names) if decoder is None else call(decoder.decode, list(names))

    def _is_literal(self, name: str) -> bool:
        """Return whether a token is text as it stands.

        Gemma lists words of its model, such as two blanks as U+2581 twice, as added tokens too: they go through the
        decoder. In GPT-2's alphabet no word of a model is written like this, so there every added token is text.
        """
        if self._added_at != (size := self.library.get_vocab_size()):
            added = self.library.get_added_tokens_decoder().values()
            self._added, self._added_at = {token.content: token.special for token in added}, size
        special = self._added.get(name)
        return special is not None and (special or self.is_byte_level or self.library.model.token_to_id(name) is None)


def _types(decoder: dict[str, Any]) -> Iterator[str]:
    """Yield the types of a decoder's parts."""
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _types(part)
    else:
        yield decoder["type"]
