"""Find documents that occur more than once in a corpus, exactly or nearly.

Exact: the normalized texts are equal: NFC of Unicode, lower case, one space for each run of blanks. Near: the sets A
and B of their shingles, which are runs of k words, have a Jaccard similarity of at least t, as estimated from P minimum
hashes of each set:

    J(A, B) = |A and B| / |A or B|        standard error of the estimate: sqrt(J (1 - J) / P)

Pairs to compare come from locality-sensitive hashing: the hashes are cut into b bands of r, and two documents are
compared if they agree in all hashes of a band, which has the probability 1 - (1 - J^r)^b.

Broder 1997, "On the resemblance and containment of documents"; Lee et al. 2021, "Deduplicating Training Data Makes
Language Models Better", arXiv:2107.06499, section 4.
"""

from __future__ import annotations

import hashlib
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from peakgpt.engine.data.documents import Document
from peakgpt.engine.data.words import whole_words, words_of

SEED = 1  # of the permutations: the same documents are found in every run
# Of pairs compared in vain and of pairs missed. Comparing is cheap: 16 bands of 8 find 95 % of pairs at a threshold of
# 0.8, and 9 bands of 13, which equal weights give, 40 %.
WEIGHTS = (0.05, 0.95)


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """When two documents are near-duplicates.

    Args:
        threshold: similarity from which a document is removed, above 0 and below 1.
        shingle: words in a shingle. A shorter document is one shingle.
        num_perm: minimum hashes of a document.
    """

    threshold: float = 0.8
    shingle: int = 5
    num_perm: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold: got {self.threshold}, expected above 0 and below 1")
        if self.shingle < 1 or self.num_perm < 2:
            raise ValueError(f"near duplicates: got shingle={self.shingle}, num_perm={self.num_perm}, expected at "
                             "least 1 word and 2 hashes")  # fmt: skip


@dataclass(frozen=True)
class Duplicate:
    """A document to remove.

    Args:
        document: its name.
        kept: name of the document that stays.
        similarity: estimated Jaccard similarity of their shingles; 1 for an exact duplicate.
        exact: whether the normalized texts are equal.
    """

    document: str
    kept: str
    similarity: float
    exact: bool


class Deduplicator:
    """Decides for one document after the other whether an earlier one, which is kept, is its duplicate.

    Memory grows with the number of documents that are kept, not with their lengths: below 0.5 kB for each, and
    below 3 kB with near duplicates of 128 hashes.
    """

    def __init__(self, near: NearDuplicates | None = None):
        """
        Args:
            near: None finds exact duplicates only.
        Raises:
            ValueError: the package `datasketch` is not installed.
        """
        self.names: list[str] = []  # of the documents that are kept
        self._exact: dict[bytes, int] = {}
        self._index = None if near is None else _SimilarityIndex(near)

    @property
    def bands(self) -> tuple[int, int] | None:
        """The bands of the hashing and the hashes in each; None without near duplicates."""
        return self._index and (self._index.bands, self._index.rows)

    def check(self, document: Document) -> Duplicate | None:
        """Return the duplicate, or None if the document is kept."""
        digest = _digest(document.blocks())
        if (same := self._exact.get(digest)) is not None:
            return Duplicate(document.name, self.names[same], 1.0, True)
        if self._index is not None:
            hashes = self._index.hashes(document.blocks())
            if hashes is not None:
                similar, similarity = self._index.find(hashes)
                if similar is not None:
                    return Duplicate(document.name, self.names[similar], similarity, False)
                self._index.add(len(self.names), hashes)
        self._exact[digest] = len(self.names)
        self.names.append(document.name)
        return None


def _digest(blocks: Iterable[str]) -> bytes:
    """Return a digest of the normalized text."""
    digest = hashlib.blake2b(digest_size=16)
    for text in whole_words(blocks):
        for word in unicodedata.normalize("NFC", text).lower().split():
            digest.update(f"{word} ".encode())
    return digest.digest()


class _SimilarityIndex:
    """The minimum hashes of the documents that are kept, and which of them agree in a band."""

    def __init__(self, near: NearDuplicates):
        try:
            import datasketch
        except ImportError as error:
            raise ValueError(f"near duplicates: got {error}, expected it installed: pip install 'peakgpt[dedup]'"
                             ) from None  # fmt: skip
        self.near = near
        plan = datasketch.MinHashLSH(threshold=near.threshold, num_perm=near.num_perm, weights=WEIGHTS)
        self.bands, self.rows = plan.b, plan.r
        self._empty = datasketch.MinHash(num_perm=near.num_perm, seed=SEED, hashfunc=zlib.crc32)
        # A table for each band: digest -> documents. The tables of datasketch take twice the memory.
        self._tables: list[dict[bytes, list[int] | int]] = [{} for _ in range(self.bands)]
        self._hashes: dict[int, np.ndarray] = {}

    def hashes(self, blocks: Iterable[str]) -> np.ndarray | None:
        """Return the minimum hashes of a document, uint32 (num_perm,); None if it has no word."""
        sketch, size, words, is_short = self._empty.copy(), self.near.shingle, list[str](), True
        for text in whole_words(blocks):
            words += words_of(text)
            if shingles := {" ".join(words[i : i + size]).encode() for i in range(len(words) - size + 1)}:
                sketch.update_batch(list(shingles))
                is_short = False
            words = words[-(size - 1) :] if size > 1 else []
        if is_short and words:
            sketch.update_batch([" ".join(words).encode()])
        return None if is_short and not words else sketch.hashvalues.astype(np.uint32)

    def find(self, hashes: np.ndarray) -> tuple[int | None, float]:
        """Return the most similar document and the similarity; None and 0 if none reaches the threshold."""
        found = [table.get(key, ()) for table, key in zip(self._tables, self._keys(hashes), strict=True)]
        numbers = sorted({n for same in found for n in ((same,) if isinstance(same, int) else same)})
        if not numbers:
            return None, 0.0
        similarities = np.mean(np.stack([self._hashes[number] for number in numbers]) == hashes, axis=1)
        best = int(np.argmax(similarities))  # the earliest of equals
        similarity = float(similarities[best])
        return (numbers[best], similarity) if similarity >= self.near.threshold else (None, 0.0)

    def add(self, number: int, hashes: np.ndarray) -> None:
        """Keep a document."""
        self._hashes[number] = hashes
        for table, key in zip(self._tables, self._keys(hashes), strict=True):
            if (same := table.setdefault(key, number)) != number:
                table[key] = [*((same,) if isinstance(same, int) else same), number]

    def _keys(self, hashes: np.ndarray) -> list[bytes]:
        rows = hashes[: self.bands * self.rows].reshape(self.bands, self.rows)
        return [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
