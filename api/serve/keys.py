"""API keys: where they come from, which are valid, and how a request's key is compared."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from peakgpt.engine.data.text_file import read_bytes

MAX_FILE_BYTES = 1 << 16


def read_key_file(path: Path) -> list[str]:
    """Return the keys of a file, one a line. Blanks around a key and blank lines do not count.

    Raises:
        ValueError: the file cannot be read, has no key, or has a line that is no key.
    """
    try:
        data = read_bytes(path)
    except ValueError as error:
        raise ValueError(f"API key file {error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"API key file {path}: got more than {MAX_FILE_BYTES} bytes, expected one key a line")
    lines = [line.strip() for line in data.decode("utf-8-sig", errors="replace").splitlines()]
    return check_keys([line for line in lines if line], f"API key file {path}")


def check_keys(keys: Sequence[str], source: str) -> list[str]:
    """Return the keys without blanks around them. No message quotes a key.

    Args:
        keys: at least one.
        source: where they come from, for messages.
    Raises:
        ValueError: no key, a blank key, or a key that an HTTP header cannot carry.
    """
    keys = [key.strip() for key in keys]
    if not keys or not all(keys):
        raise ValueError(f"{source}: got {'a blank' if keys else 'no'} API key, expected at least one character")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise ValueError(f"{source}: got an API key with other characters, expected printable ASCII")
    return keys


class Keys:
    """The keys that clients may send."""

    def __init__(self, keys: Sequence[str]):
        """
        Args:
            keys: the result of `check_keys`.
        """
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def accept(self, header: bytes) -> bool:
        """Accept `Bearer KEY`, or `Basic` with the key as password for browsers. Compares in constant time."""
        kind, _, value = header.strip().partition(b" ")
        if kind.lower() == b"basic":
            try:
                value = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != b"bearer":
            return False
        digest = hashlib.sha256(value.strip()).digest()
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0
