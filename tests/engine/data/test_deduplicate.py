"""Duplicates are found exactly or by similarity, in every run the same, with a kept partner that stays."""

import json
import os
import random
import subprocess
import sys
import tracemalloc

import pytest

from peakgpt.engine.data.deduplicate import Deduplicator, Duplicate, NearDuplicates
from peakgpt.engine.data.documents import Document

WORDS = [f"word{i}" for i in range(3000)]


def found_in(texts, near=None):
    """Return (document, kept, similarity, exact) of the duplicates among texts, whose names are their numbers."""
    deduplicator = Deduplicator(near)
    checked = [deduplicator.check(Document.of(str(i), text)) for i, text in enumerate(texts)]
    return [duplicate for duplicate in checked if duplicate]


def shingles(text, size):
    words = text.split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def jaccard(one, other, size=5):
    one, other = shingles(one, size), shingles(other, size)
    return len(one & other) / len(one | other)


def changed(rng, text, count):
    words = text.split()
    for place in rng.sample(range(len(words)), count):
        words[place] = f"new{rng.random()}"
    return " ".join(words)


def test_exact_duplicates_are_those_of_equal_normalized_texts():
    texts = ["A b,  c\n", "a B, c", "a b c", "e\u0301", "\u00e9", "", " \n", "a b, cd"]
    assert found_in(texts) == [Duplicate(a, b, 1.0, True) for a, b in (("1", "0"), ("4", "3"), ("6", "5"))]


def test_texts_in_blocks_equal_whole_texts():
    pytest.importorskip("datasketch")
    text = " ".join(random.Random(0).choices(WORDS, k=200))
    blocks = [text[i : i + 7] for i in range(0, len(text), 7)]
    for near in (None, NearDuplicates()):
        deduplicator = Deduplicator(near)
        assert deduplicator.check(Document.of("whole", text)) is None
        assert deduplicator.check(Document("blocks", lambda: blocks)) == Duplicate("blocks", "whole", 1.0, True)
    index = Deduplicator(NearDuplicates())._index
    assert (index.hashes(blocks) == index.hashes([text])).all()


def test_near_duplicates_are_found_by_their_similarity():
    """Of 60 pairs far above the threshold all are found, of 60 pairs far below none; the estimate is near the truth."""
    pytest.importorskip("datasketch")
    rng = random.Random(0)
    for count, expected in ((4, 60), (40, 0)):
        texts = [" ".join(rng.choices(WORDS, k=400)) for _ in range(60)]
        others = [changed(rng, text, count) for text in texts]
        duplicates = found_in(texts + others, NearDuplicates())
        assert len(duplicates) == expected
        for duplicate in duplicates:
            number = int(duplicate.document) - 60
            truth = jaccard(texts[number], others[number])
            assert int(duplicate.kept) == number and not duplicate.exact
            assert truth > 0.88 and abs(duplicate.similarity - truth) < 5 * (truth * (1 - truth) / 128) ** 0.5 + 0.01
        assert expected or all(jaccard(*pair) < 0.55 for pair in zip(texts, others, strict=True))


def test_parameters_decide_what_is_similar():
    pytest.importorskip("datasketch")
    rng = random.Random(1)
    text = " ".join(rng.choices(WORDS, k=300))
    other = changed(rng, text, 20)  # about 0.55 of the shingles of 5 words, 0.87 of the single words
    assert found_in([text, other], NearDuplicates()) == []
    assert [d.document for d in found_in([text, other], NearDuplicates(threshold=0.4))] == ["1"]
    assert [d.document for d in found_in([text, other], NearDuplicates(shingle=1, num_perm=256))] == ["1"]


def test_short_documents_and_those_without_words():
    pytest.importorskip("datasketch")
    texts = ["one two", "One, two!", "one three", "!!!", "???", "one", "(one)"]
    assert found_in(texts, NearDuplicates()) == [Duplicate("1", "0", 1.0, False), Duplicate("6", "5", 1.0, False)]


def test_kept_partner_is_kept_and_the_most_similar_one():
    pytest.importorskip("datasketch")
    rng = random.Random(2)
    first = " ".join(rng.choices(WORDS, k=400))
    second = changed(rng, first, 30)  # kept: too different
    third = changed(rng, second, 2)
    duplicates = found_in([first, second, third, third], NearDuplicates(threshold=0.6))
    assert [(d.document, d.kept) for d in duplicates] == [("2", "1"), ("3", "1")]


def test_duplicates_are_the_same_in_every_process(tmp_path):
    pytest.importorskip("datasketch")
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=60)) for _ in range(30)]
    texts += [changed(rng, text, 1) for text in texts]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = """
import json, sys
from peakgpt.engine.data.deduplicate import Deduplicator, NearDuplicates
from peakgpt.engine.data.documents import Document
one = Deduplicator(NearDuplicates())
found = [one.check(Document.of(str(i), text)) for i, text in enumerate(json.load(open(sys.argv[1])))]
print(json.dumps([vars(duplicate) for duplicate in found if duplicate]))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(tmp_path / "texts.json")]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    here = found_in(texts, NearDuplicates())
    assert json.loads(other) == [vars(duplicate) for duplicate in here] and len(here) > 15


@pytest.mark.parametrize(("near", "limit"), [(None, 500), (NearDuplicates(), 3000)])
def test_memory_for_a_kept_document_does_not_depend_on_its_length(near, limit):
    pytest.importorskip("datasketch")
    deduplicator = Deduplicator(near)
    deduplicator.check(Document.of("first", "imports and permutations"))
    documents = [Document.of(f"web.jsonl:{i}", f"start{i} " + " ".join(f"{i}w{j}" for j in range(6 if i % 2 else 100)))
                 for i in range(300)]  # fmt: skip
    tracemalloc.start()
    for document in documents:
        deduplicator.check(document)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size / len(documents) < limit and len(deduplicator.names) == 301


@pytest.mark.parametrize(("values", "message"), [
    ({"threshold": 0.0}, "threshold: got 0.0, expected above 0 and below 1"),
    ({"threshold": 1.0}, "threshold: got 1.0"),
    ({"shingle": 0}, "got shingle=0, num_perm=128"),
    ({"num_perm": 1}, "got shingle=5, num_perm=1, expected at least 1 word and 2 hashes"),
])  # fmt: skip
def test_parameters_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        NearDuplicates(**values)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    Deduplicator()
    with pytest.raises(ValueError, match=r"near duplicates: got .*pip install 'peakgpt\[dedup\]'"):
        Deduplicator(NearDuplicates())
