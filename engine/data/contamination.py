"""Find examples of an evaluation in a training corpus, by the runs of words that they share.

An example is dirty if one of its N-grams, which are runs of N words, occurs in the corpus. N is the number of words
that 5 % of the examples do not reach, but at least 8, because shorter runs match by accident, and at most 13. An
example of fewer than N words is not checked. Words have no case and no punctuation. Brown et al. 2020, "Language Models
are Few-Shot Learners", arXiv:2005.14165, appendix C.

The N-grams of the evaluation are in memory, below 100 bytes a word; the corpus is streamed. N-grams are compared by a
polynomial hash first, then word by word:

    h(w_1 .. w_N) = sum_i id(w_i) B^(N - i)  mod 2^64

Equal N-grams are one group: thousands of examples may begin with the same instruction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
        begins = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])
        order, is_new = self._grouped(begins, _hashes(self._stream, self.n)[begins])
        self._owners = np.repeat(np.arange(len(counts)), counts)[order]  # the example of each N-gram, by group
        self._bounds = np.append(np.flatnonzero(is_new), len(order))  # of the groups
        self._begins = begins[order[self._bounds[:-1]]]  # where the N-gram of a group begins
        self._hashes = _hashes(self._stream, self.n)[self._begins]  # ascending
        self._seen = np.zeros(len(self._begins), bool)
        # Of each example: number of the last document with one of its N-grams, and of all of them.
        self._last, self._documents = np.full(len(counts), -1), np.zeros(len(counts), np.int64)
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
        owners = self._owners[np.repeat(self._seen, np.diff(self._bounds))]
        found = np.bincount(owners, minlength=len(self.examples)).tolist()
        for example, count, documents in zip(self.examples, found, self._documents.tolist(), strict=True):
            example.found, example.documents = count, documents
        return self.examples

    def _grouped(self, begins: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return an order by hash in which equal N-grams are neighbors, and whether each one begins a group."""
        order = np.argsort(hashes, kind="stable")
        for last_try in (False, True):
            sorted_hashes, sorted_begins = hashes[order], begins[order]
            same_hash = sorted_hashes[1:] == sorted_hashes[:-1]
            same = same_hash & self._are_equal(self._stream, sorted_begins[1:], sorted_begins[:-1])
            if last_try or np.array_equal(same, same_hash):
                return order, np.append(True, ~same)
            # Different N-grams with one hash: by hash, then by their words.
            order = np.lexsort([self._stream[begins + i] for i in range(self.n)] + [hashes])

    def _are_equal(self, ids: np.ndarray, places: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Return whether the N-grams at places of a text are those that begin at `begins` of the evaluation."""
        equal = np.ones(len(places), bool)
        for i in range(self.n):
            equal &= ids[places + i] == self._stream[begins + i]
        return equal

    def _match(self, ids: np.ndarray, document: str) -> None:
        known = np.concatenate([[0], np.cumsum(ids != 0)])
        places = np.flatnonzero(known[self.n :] - known[: -self.n] == self.n)  # N words of the evaluation in a row
        if not len(places):
            return
        groups = self._groups_of(ids, places, _hashes(ids, self.n)[places])
        found, first = np.unique(groups[groups >= 0], return_index=True)
        for group in found[np.argsort(first)].tolist():  # in the order of the text
            self._record(group, document)

    def _groups_of(self, ids: np.ndarray, places: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """Return the group of the N-gram at each place of a text, -1 if it is in no example."""
        groups = np.full(len(places), -1)
        candidates, left = np.searchsorted(self._hashes, hashes), np.arange(len(places))
        while True:  # one round, unless N-grams of different words have one hash
            left = left[candidates[left] < len(self._hashes)]
            left = left[self._hashes[candidates[left]] == hashes[left]]
            if not len(left):
                return groups
            equal = self._are_equal(ids, places[left], self._begins[candidates[left]])
            groups[left[equal]] = candidates[left[equal]]
            left = left[~equal]
            candidates[left] += 1

    def _record(self, group: int, document: str) -> None:
        self._seen[group] = True
        owners = self._owners[self._bounds[group] : self._bounds[group + 1]]
        for index in np.unique(owners[self._last[owners] < 0]).tolist():
            begin = self._begins[group]
            example, words = self.examples[index], self._stream[begin : begin + self.n]
            example.document, example.ngram = document, " ".join(self._words[i - 1] for i in words)
        self._documents[owners[self._last[owners] != self.documents]] += 1  # repeated indices count once
        self._last[owners] = self.documents

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
