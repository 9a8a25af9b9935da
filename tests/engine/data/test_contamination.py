"""Shared runs of words are found as a search in all texts would find them."""

import random
import tracemalloc

import numpy as np
import pytest

from peakgpt.engine.data import contamination
from peakgpt.engine.data.contamination import ContaminationCheck, ngram_size
from peakgpt.engine.data.documents import Document
from peakgpt.engine.data.words import words_of


def ngrams(text, n):
    words = words_of(text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def random_text(rng, vocabulary, count):
    return "".join(rng.choice(vocabulary) + rng.choice([" ", ", ", "\n", "! "]) for _ in range(count))


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("vocabulary", [2, 4, 300])
def test_result_equals_a_search_in_all_texts(n, vocabulary):
    """Few words give many matches, in overlapping and in several examples."""
    rng = random.Random(n * vocabulary)
    common = [f"W{i}" for i in range(vocabulary)]
    examples = [(f"e{i}", random_text(rng, common, rng.randrange(1, 30))) for i in range(20)]
    corpus = [random_text(rng, [*common, "other"], rng.randrange(60)) for _ in range(15)]
    corpus += [f"other {text} other" for _, text in examples[:5]]
    check = ContaminationCheck(examples, n)
    for number, text in enumerate(corpus):
        blocks = [text[i : i + 11] for i in range(0, len(text), 11)]
        check.add(Document(f"d{number}", lambda blocks=blocks: blocks))
    inside = [set(ngrams(text, n)) for text in corpus]
    for example, (name, text) in zip(check.finish(), examples, strict=True):
        own = ngrams(text, n)
        where = [number for number, there in enumerate(inside) if there & set(own)]
        assert (example.name, example.words, example.ngrams) == (name, len(words_of(text)), len(own))
        assert example.found == sum(any(gram in there for there in inside) for gram in own)
        assert example.documents == len(where)
        assert example.document == (f"d{where[0]}" if where else None)
        assert example.ngram is None if not where else tuple(example.ngram.split()) in inside[where[0]] & set(own)
        assert example.status == ("dirty" if where else "clean" if own else "short")


def test_equal_hashes_of_different_words_are_no_match(monkeypatch):
    monkeypatch.setattr(contamination, "_hashes", lambda ids, n: np.zeros(max(0, len(ids) - n + 1), np.uint64))
    check = ContaminationCheck([("e0", "a b c d"), ("e1", "c d a b")], 3)
    check.add(Document.of("d", "b c d a, d c b a"))
    assert [example.found for example in check.finish()] == [1, 1]
    check.add(Document.of("d", "d c a b d"))
    assert [example.found for example in check.finish()] == [1, 1]


def test_size_is_the_length_that_five_percent_do_not_reach_from_8_to_13():
    assert ngram_size([3] * 100) == 8
    assert ngram_size([100] * 100) == 13
    assert ngram_size([10] * 100) == 10
    assert ngram_size([4, *[11] * 99]) == 11
    assert ngram_size([*[9] * 10, *[20] * 90]) == 9


def test_memory_is_below_100_bytes_for_each_word_of_the_evaluation():
    rng = random.Random(5)
    words = [f"w{i}" for i in range(2000)]
    examples = [(f"e{i}", " ".join(rng.choices(words, k=100))) for i in range(300)]
    ContaminationCheck(examples)
    tracemalloc.start()
    check = ContaminationCheck(examples)
    size = tracemalloc.get_traced_memory()[0]
    check.add(Document("d", lambda: ("w1 " * 1000 for _ in range(50))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < 100 * 30_000 and peak < 3 * size  # the corpus adds nothing that stays, and little at a time


def test_case_punctuation_and_blanks_do_not_hide_a_match():
    check = ContaminationCheck([("e", "The quick brown fox jumps over the lazy dog.")], 8)
    check.add(Document.of("d", 'He said: "the QUICK, brown\n\nfox -- jumps over... the\tlazy"'))
    [example] = check.finish()
    assert (check.n, example.status, example.found) == (8, "dirty", 1)  # of two
    assert example.ngram == "the quick brown fox jumps over the lazy"


def test_evaluation_without_anything_to_compare_is_refused():
    with pytest.raises(ValueError, match="evaluation: got no examples, expected at least one"):
        ContaminationCheck([])
    with pytest.raises(ValueError, match="got examples of up to 2 words, expected one with at least 8, the length"):
        ContaminationCheck([("a", "two words"), ("b", "one")])


def test_a_beginning_that_many_examples_share_is_looked_up_once(monkeypatch):
    """Mutation that makes it fail: a record for each example that has an N-gram."""
    records, real = [], ContaminationCheck._record
    monkeypatch.setattr(ContaminationCheck, "_record", lambda self, *args: (records.append(args), real(self, *args)))
    shared = " ".join(f"w{i}" for i in range(20))
    check = ContaminationCheck([(f"e{i}", f"{shared} own{i}") for i in range(50)], 8)
    for number in range(2):
        check.add(Document.of(f"d{number}", f"x {shared} y {shared}"))
    assert len(records) <= 2 * (13 + 2)  # a piece of a text overlaps the one before it
    assert {(e.found, e.documents, e.document, e.ngram) for e in check.finish()} == {
        (13, 2, "d0", " ".join(f"w{i}" for i in range(8)))
    }
