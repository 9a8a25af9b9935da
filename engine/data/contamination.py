"""Find examples of an evaluation in a training corpus, by the runs of words that they share.

An example is dirty if one of its N-grams, which are runs of N words, occurs in the corpus. N is the number of words
that 5 % of the examples do not reach, but at least 8, because shorter runs match by accident, and at most 13. An
example of fewer than N words is not checked. Words have no case and no punctuation. Brown et al. 2020, "Language Models
are Few-Shot Learners", arXiv:2005.14165, appendix C.

The N-grams of the evaluation are in memory, below 100 bytes a word; the corpus is streamed. N-grams are compared by a
polynomial hash first, then word by word:

    h(w_1 .. w_N) = sum_i id(w_i) B^(N - i)  mod 2^64
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from peakgpt.engine.data.documents import Document
from peakgpt.engine.data.words import whole_words, words_of

MIN_N, MAX_N, PERCENTILE = 8, 13, 5
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd; of the golden ratio


def ngram_size(lengths: Sequence[int]) -> int:
    """Return N for examples of these lengths in words."""
    return int(np.clip(np.percentile(lengths, PERCENTILE, method="lower"), MIN_N, MAX_N)) if len(lengths) else MIN_N


@dataclass
class Example:
    """An example and what the corpus has of it.

    Args:
        name: such as "eval.jsonl:3".
        words: their number.
        ngrams: the number of its N-grams; 0 means that it is too short to be checked.
        found: those that occur in the corpus.
        ngram, document: the first one that occurs, and the document in which it occurs.
        documents: the number of documents with at least one of its N-grams.
    """

    name: str
    words: int
    ngrams: int = 0
    found: int = 0
    ngram: str | None = None
    document: str | None = None
    documents: int = 0
    _last: int = field(default=-1, repr=False)  # number of the last document with one of its N-grams

    @property
    def status(self) -> str:
        return "dirty" if self.found else "clean" if self.ngrams else "short"


class ContaminationCheck:
    """The N-grams of an evaluation, and where documents of a corpus have them."""

    def __init__(self, examples: Iterable[tuple[str, str]], n: int | None = None):
        """
        Args:
            examples: (name, text) pairs.
            n: words in an N-gram; None computes it from the lengths.
        Raises:
            ValueError: there are no examples, or all are shorter than N words.
        """
        self._ids: dict[str, int] = {}  # word -> id from 1; 0 stands for every other word
        texts = [(name, self._numbered(words_of(text))) for name, text in examples]
        if not texts:
            raise ValueError("evaluation: got no examples, expected at least one")
        self.n = n or ngram_size([len(ids) for _, ids in texts])
        self.examples = [Example(name, len(ids), max(0, len(ids) - self.n + 1)) for name, ids in texts]
        if not any(example.ngrams for example in self.examples):
            raise ValueError(f"evaluation: got examples of up to {max(e.words for e in self.examples)} words, expected "
                             f"one with at least {self.n}, the length of the runs that are compared")  # fmt: skip
        self._words = list(self._ids)
        self._stream = np.concatenate([ids for _, ids in texts])
        starts = np.cumsum([0, *(len(ids) for _, ids in texts[:-1])])
        counts = [example.ngrams for example in self.examples]
        # For each N-gram, sorted by its hash: where it begins, and its example.
        begins = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])
        hashes = _hashes(self._stream, self.n)[begins]
        order = np.argsort(hashes, kind="stable")
        self._sorted, self._begins = hashes[order], begins[order]
        self._owners = np.repeat(np.arange(len(counts)), counts)[order]
        self._seen = np.zeros(len(order), bool)
        self.documents = 0

    def add(self, document: Document) -> None:
        """Look for the N-grams in a document of the corpus."""
        before = np.zeros(0, np.uint32)
        for text in whole_words(document.blocks()):
            get = self._ids.get
            ids = np.concatenate([before, np.array([get(word, 0) for word in words_of(text)], np.uint32)])
            self._match(ids, document.name)
            before = ids[max(0, len(ids) - self.n + 1) :]
        self.documents += 1

    def finish(self) -> list[Example]:
        """Return the examples, with the number of N-grams that were found."""
        for example, found in zip(self.examples, np.bincount(self._owners[self._seen], minlength=len(self.examples)),
                                  strict=True):  # fmt: skip
            example.found = int(found)
        return self.examples

    def _match(self, ids: np.ndarray, document: str) -> None:
        known = np.concatenate([[0], np.cumsum(ids != 0)])
        places = np.flatnonzero(known[self.n :] - known[: -self.n] == self.n)  # N words of the evaluation in a row
        if not len(places):
            return
        hashes = _hashes(ids, self.n)[places]
        first = np.searchsorted(self._sorted, hashes)
        is_hit = self._sorted[np.minimum(first, len(self._sorted) - 1)] == hashes
        for place, begin, value in zip(places[is_hit], first[is_hit], hashes[is_hit], strict=True):
            words = ids[place : place + self.n]
            while begin < len(self._sorted) and self._sorted[begin] == value:  # all examples that have it
                start = self._begins[begin]
                if np.array_equal(self._stream[start : start + self.n], words):
                    self._record(int(begin), words, document)
                begin += 1

    def _record(self, index: int, words: np.ndarray, document: str) -> None:
        self._seen[index] = True
        example = self.examples[self._owners[index]]
        if example.document is None:
            example.document, example.ngram = document, " ".join(self._words[i - 1] for i in words)
        if example._last != self.documents:
            example._last, example.documents = self.documents, example.documents + 1

    def _numbered(self, words: list[str]) -> np.ndarray:
        ids = self._ids
        return np.array([ids.setdefault(word, len(ids) + 1) for word in words], np.uint32)


def _hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Return the hash of the N-gram that begins at each position, uint64 (len(ids) - n + 1,)."""
    count = max(0, len(ids) - n + 1)
    values = np.zeros(count, np.uint64)
    for offset in range(n):
        values = values * _BASE + ids[offset : offset + count].astype(np.uint64)
    return values
