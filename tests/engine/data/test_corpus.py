"""The corpus: a reproducible split of files and records, which is never held in memory; errors name the file."""

import gzip
import os

import pytest

from peakgpt.engine.data import split
from peakgpt.engine.data.corpus import corpus_of, load_corpus
from peakgpt.engine.data.documents import Document


def test_standard_library_corpus_is_reproducible_and_has_7_percent_validation():
    corpus, again = load_corpus(), load_corpus()
    assert contents(corpus) == contents(again)
    names = [document.name for document in (*corpus.train, *corpus.validation)]
    assert len(set(names)) == len(names) > 200
    assert "argparse.py" in names
    assert not {"test", "tests", "encodings", "site-packages"} & {part for name in names for part in name.split("/")}
    assert not any("_sysconfigdata" in name for name in names)
    for side in (corpus.train, corpus.validation):
        assert [d.name for d in side] == sorted(d.name for d in side)
    total = corpus.size_bytes
    assert total > 5e6
    assert 0.05 < corpus.validation.size_bytes / total <= 0.07


def contents(corpus):
    return [[(document.name, document.text) for document in part] for part in (corpus.train, corpus.validation)]


def write_files(folder, sizes):
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        (folder / f"{number:03}.txt").write_text(f"{number:03} ".ljust(size, "é"), encoding="utf-8")


def test_files_are_split_by_a_hash_of_their_names(tmp_path):
    write_files(tmp_path / "a", [500] * 300)
    corpus = load_corpus([tmp_path / "a"])
    names_and_texts = contents(corpus)
    train, validation = ({d.name for d in side} for side in (corpus.train, corpus.validation))
    assert not train & validation
    assert len(train | validation) == 300
    assert len(validation) == 21  # 7 %
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    moved = load_corpus([tmp_path / "elsewhere"])
    assert contents(moved) == names_and_texts
    by_file = load_corpus(sorted((tmp_path / "elsewhere").iterdir(), reverse=True))
    assert contents(by_file) == names_and_texts


@pytest.mark.parametrize("sizes", [[10, 10], [1, 10_000], [5000, 20, 5000], [3] * 7])
def test_both_splits_of_few_files_have_text(tmp_path, sizes):
    write_files(tmp_path / "a", sizes)
    corpus = load_corpus([tmp_path / "a"])
    assert corpus.train.count >= 1 and corpus.validation.count == 1
    assert corpus.validation.size_bytes <= corpus.train.size_bytes
    for part in (corpus.train, corpus.validation):
        assert (part.count, part.size_bytes) == (len(list(part)), sum(len(d.text.encode()) for d in part))


@pytest.mark.parametrize(
    "text",
    ["line\n" * 1000, "é\nb", "title\n" + "word " * 1000, "x" * 1000, "ab", "a\n" + "b" * 998, "b" * 998 + "\nc"],
)
def test_single_file_is_cut_by_position(tmp_path, text):
    (tmp_path / "one").write_text(text, encoding="utf-8")
    corpus = load_corpus([tmp_path / "one"])
    [head], [tail] = corpus.train, corpus.validation
    assert head.text + tail.text == text
    assert 1 <= len(tail.text) <= max(1, len(text) // 2)
    assert corpus.size_bytes == len(text.encode())
    if text.startswith("line"):
        assert head.text.endswith("\n")
        assert 0.05 < len(tail.text) / len(text) < 0.1
    if text.startswith("title"):
        assert head.text.endswith(" ")


def test_only_text_files_of_a_folder_are_read(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name, content in {
        "a.txt": b"a",
        "sub/b.md": b"b",
        "c.png": b"\0",
        "d.py": b"",
        ".e.txt": b"e",
        "sub/.git/f.txt": b"f",
    }.items():
        (tmp_path / name).write_bytes(content)
    corpus = load_corpus([tmp_path])
    assert sorted(d.name for d in (*corpus.train, *corpus.validation)) == ["a.txt", "sub/b.md"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: got an empty file, expected UTF-8 text"),
        ("binary.txt", b"ab\0c", r"binary.txt: got a binary file \(NUL at byte 2\), expected UTF-8 text"),
        ("latin.txt", "é".encode("latin-1"), "latin.txt: got byte 0xe9 at position 0, which is not UTF-8"),
        ("one.txt", b"x", "one.txt: got 1 character, expected at least 2"),
        ("missing.txt", None, "missing.txt: got No such file or directory, expected a file"),
    ],
)
def test_unreadable_text_files_are_named_in_the_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus([tmp_path / name])


def test_a_corpus_without_text_files_raises(tmp_path):
    with pytest.raises(ValueError, match="corpus: got no files"):
        load_corpus([])
    (tmp_path / "a.png").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"got no text in it, expected files ending in \.py"):
        load_corpus([tmp_path])


def test_a_folder_gives_code_and_records_compressed_too(tmp_path):
    for name in ("a.rs", "b.CU", "c.ipynb", "d.txt.gz", "e.bin", "f.json"):
        (tmp_path / name).write_bytes(gzip.compress(b"text") if name.endswith(".gz") else b"text")
    (tmp_path / "g.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    corpus = load_corpus([tmp_path])
    names = sorted(d.name for part in (corpus.train, corpus.validation) for d in part)
    assert names == ["a.rs", "b.CU", "d.txt.gz", "g.jsonl:1", "g.jsonl:2"]


def test_links_and_hidden_files(tmp_path):
    """A link to a file is read, a link to a folder is not followed; a hidden file that the user names is read."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.txt").write_text("b")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link.txt").symlink_to(tmp_path / "far" / "b.txt")
    (tmp_path / "near" / "folder").symlink_to(tmp_path / "far")
    (tmp_path / "near" / ".hidden.txt").write_text("hidden")
    corpus = load_corpus([tmp_path / "near", tmp_path / "near" / ".hidden.txt"])
    assert sorted(d.text for part in (corpus.train, corpus.validation) for d in part) == ["b", "hidden"]


def test_a_source_that_is_named_twice_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    for sources in ([tmp_path / "a.txt"] * 2, [tmp_path, tmp_path / "a.txt"], [tmp_path / "a.txt", tmp_path]):
        with pytest.raises(ValueError, match=r"corpus: got .*a.txt twice, expected each source once"):
            load_corpus(sources)
    with pytest.raises(ValueError, match=r"got .*a.txt for training and validation, expected it in one of them"):
        load_corpus([tmp_path / "a.txt"], validation=[tmp_path])


def test_validation_text_can_be_given(tmp_path):
    write_files(tmp_path / "a", [50] * 20)
    write_files(tmp_path / "b", [70] * 3)
    corpus = load_corpus([tmp_path / "a"], validation=[tmp_path / "b"])
    assert (corpus.train.count, corpus.validation.count, corpus.validation.size_bytes) == (20, 3, 3 * 136)
    assert [stream for stream, _ in corpus.parts()] == ["train"] * 20 + ["validation"] * 3


@pytest.mark.parametrize("limit", [10**6, 100])
def test_records_are_split_exactly_or_by_hash_alone_if_there_are_many(monkeypatch, limit):
    monkeypatch.setattr(split, "MAX_LISTED", limit)
    texts = [f"{number:05}" * 20 for number in range(3000)]
    corpus = corpus_of(texts, share=0.1)
    train, validation = ([d.text for d in part] for part in (corpus.train, corpus.validation))
    assert sorted(train + validation) == texts and len(train) == corpus.train.count
    assert len(validation) == 300 if limit > 3000 else 240 < len(validation) < 360
    assert corpus.train.size_bytes == 100 * len(train) and corpus.size_bytes == 300_000
    more = corpus_of([*texts, *texts[:50]], share=0.1)
    if limit == 100:  # documents that come later move none
        assert {d.name for d in corpus.validation} == {d.name for d in more.validation if int(d.name) <= 3000}


def test_documents_that_can_be_read_once_are_split_by_hash(monkeypatch):
    monkeypatch.setattr(split, "MAX_LISTED", 10)
    texts = [str(number) for number in range(200)]
    once, twice = corpus_of(iter(texts)), corpus_of(texts)
    assert (once.size_bytes, str(once)) == (None, "texts of unknown number and size")
    assert [(s, d.text) for s, d in once.parts()] == [(s, d.text) for s, d in twice.parts()]


def test_bad_documents_of_a_program_are_refused():
    two = [Document.of("a", "x"), Document.of("a", "y")]
    for documents, share, message in (
        ([], 0.1, "corpus: got no text"),
        (two, 0.1, "two documents with the name 'a'"),
        (["a"], 0.0, "validation share: got 0.0, expected above 0 and below 1"),
        (["a"], 1.0, "validation share: got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            corpus_of(documents, share=share)


def test_a_sample_is_all_of_a_small_text_and_a_share_of_a_large_one():
    texts = [f"{number} " * 2000 for number in range(300)]
    part = corpus_of(texts, ["other"]).train
    assert "".join(part.sample(10**8)) == "".join(texts)
    sample = list(part.sample(part.size_bytes // 3))
    assert 0.2 < sum(map(len, sample)) / part.size_bytes < 0.5
    assert int(sample[0].split()[0]) < 30 and int(sample[-1].split()[0]) > 270, "from all of the text"
    once = corpus_of(iter(texts), ["other"]).train
    assert sum(map(len, once.sample(100_000))) < 120_000


def test_what_a_folder_has_is_never_left_out_in_silence(tmp_path, monkeypatch):
    (tmp_path / "link.txt").symlink_to(tmp_path / "deleted.txt")
    with pytest.raises(ValueError, match=r"text file .*link.txt: got No such file or directory, expected a file"):
        load_corpus([tmp_path])
    (tmp_path / "link.txt").unlink()
    (tmp_path / "B.TXT.GZ").write_bytes(gzip.compress(b"compressed text\n" * 9))
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a name that is not UTF-8\n" * 9)
    corpus = load_corpus([tmp_path])
    assert sorted(d.name for part in (corpus.train, corpus.validation) for d in part) == ["B.TXT.GZ", r"caf\xe9.txt"]

    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"folder .*: got Permission denied, expected a folder to read"):
        load_corpus([tmp_path])
