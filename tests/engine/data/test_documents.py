"""Readers of documents: every format and compression gives the same texts, and every fault is named with its place."""

import gzip
import json
import os
import sys

import pytest

from peakgpt.engine.data import documents as module
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.documents import ReadOptions, read_documents
from peakgpt.engine.data.sources import open_sources

TEXTS = ["naïve text\n", "two\r\nlines", "🎉" * 40, "last"]


def compress(data, suffix):
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:20], data[20:])]
        return b"".join(frames)
    return gzip.compress(data[:20]) + gzip.compress(data[20:]) if suffix == ".gz" else data


def write_parquet(path, texts, field="text", **options):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, **options)


def read(path, **options):
    return [(d.name, d.text) for d in read_documents(path, path.name, ReadOptions(**options))]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_and_json_lines_are_read_in_any_compression(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 7)  # cuts characters
    text = "".join(TEXTS)
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(text.encode(), suffix))
    assert read(tmp_path / f"a.txt{suffix}") == [(f"a.txt{suffix}", text)]
    lines = "\n".join(["", *(json.dumps({"content": t, "n": 1}) for t in TEXTS), '{"content": ""}', "  "])
    name = f"a.jsonl{suffix}"
    (tmp_path / name).write_bytes(compress(lines.encode(), suffix))
    assert read(tmp_path / name, field="content") == [(f"{name}:{i}", t) for i, t in enumerate(TEXTS, 2)]


def test_parquet_is_read_in_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PARQUET_ROWS", 2)
    write_parquet(tmp_path / "a.parquet", [*TEXTS, ""], "body", row_group_size=3)
    assert read(tmp_path / "a.parquet", field="body") == [(f"a.parquet:{i}", t) for i, t in enumerate(TEXTS, 1)]


@pytest.mark.parametrize("folder", ["saved", "files"])
def test_a_data_set_of_hugging_face_is_read_from_a_folder(tmp_path, folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = datasets.Dataset.from_dict({"text": [*TEXTS, ""], "id": [0, 1, 2, 3, 4]})
    path = tmp_path / folder
    if folder == "saved":
        datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(path)
    else:
        path.mkdir()
        data.to_parquet(path / "train.parquet")
    [source] = open_sources([f"hf:{path}"], ReadOptions())
    assert source.rereadable
    for _ in range(2):
        assert [d.text for d in source] == TEXTS
    if folder == "saved":
        [source] = open_sources([f"hf:{path}::test"], ReadOptions())
        assert [(d.name, d.text) for d in source] == [(f"hf:{path}::test:1", TEXTS[1])]
    for name, message in {
        f"hf:{path}::dev": "expected one that `datasets` can load",
        f"hf:{tmp_path}/none": "expected one that `datasets` can load",
        "hf:": "expected hf:NAME",
        "hf:a:b:c:d": "expected hf:NAME",
    }.items():
        with pytest.raises(ValueError, match=message):
            list(open_sources([name], ReadOptions())[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", "a.txt: got byte 0xff at position 3, which is not UTF-8"),
        ("b.txt", b"0123456789\xc3", "b.txt: got byte 0xc3 at position 10"),
        ("c.txt", b"0123456\xf0\x9f\x8eabc", "c.txt: got byte 0xf0 at position 7"),
        ("d.txt", b"0123456\0", r"d.txt: got a binary file \(NUL at byte 7\)"),
        ("e.txt.gz", gzip.compress(b"x" * 99)[:-3], r"e.txt.gz: got .*end-of-stream marker.*, expected a complete .gz"),
        ("f.txt.gz", b"plain text", r"f.txt.gz: got Not a gzipped file.*, expected a complete .gz file"),
        ("f.txt.gz", gzip.compress(b"x" * 99)[:20] + b"\1" * 12, "f.txt.gz: got .*, expected a complete .gz file"),
        ("g.jsonl", b'{"text": "a"}\n{"body": "b", "n": 1}', "g.jsonl:2: got fields body, n, expected text"),
        ("h.jsonl", b'{"text": "a"}\n\n{"text"', "h.jsonl:3: got Expecting .*, expected a JSON object a line"),
        ("i.jsonl", b'["text"]', "i.jsonl:1: got list, expected a JSON object a line"),
        ("j.jsonl", b'{"text": null}', "j.jsonl:1: got text=None, expected text in the field 'text'"),
        ("k.jsonl", b'{"text": "\\ud800"}', r"k.jsonl:1: got the lone surrogate U\+D800"),
        ("l.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "l.jsonl: got byte 0xe9 at position 24"),
        ("m.jsonl", b"[" * 100_000, "m.jsonl:1: got .*recursion"),
        ("n.jsonl", b"", "n.jsonl: got an empty file"),
        ("o.parquet", b"PAR1 and no more", "o.parquet: got .*, expected a complete Parquet file"),
        ("p.parquet.gz", b"", "p.parquet.gz: got a compressed Parquet file"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 13 else "",
)
def test_faults_are_named_with_file_and_place(tmp_path, name, content, message, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(module, "BLOCK_BYTES", 8)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"text file .*{message}"):
        load_corpus([tmp_path / name])


def test_truncated_and_damaged_zstd_files_are_named(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor(write_checksum=True).compress(os.urandom(300_000).hex().encode())
    path = tmp_path / "a.txt.zst"
    middle = data[:99] + b"\xff" * 50 + data[149:]
    for damaged in (data[:-5], data[:200_000], data[:9], data + data[:50], middle, b"no"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a.txt.zst: got .*, expected a complete .zst file"):
            load_corpus([path])


def test_truncated_and_other_parquet_files_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS * 50)
    good = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(good[: len(good) // 2])
    write_parquet(tmp_path / "c.parquet", [1, 2])
    write_parquet(tmp_path / "d.parquet", ["a", None])
    write_parquet(tmp_path / "e.parquet", [])
    for name, message in {
        "a.parquet --field body": "a.parquet: got columns id, text, expected 'body'",
        "b.parquet": "b.parquet: got .*, expected a complete Parquet file",
        "c.parquet": "c.parquet:1: got text=1, expected text",
        "d.parquet": "d.parquet:2: got text=None, expected text",
        "e.parquet": "e.parquet: got no rows, expected at least 1",
    }.items():
        file, _, field = name.partition(" --field ")
        with pytest.raises(ValueError, match=message):
            load_corpus([tmp_path / file], options=ReadOptions(field=field or "text"))


def test_invalid_utf_8_is_replaced_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 4)
    options = {"errors": "replace"}
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xc3\xa9\xe2\x82")
    assert read(tmp_path / "a.txt", **options) == [("a.txt", "abc\ufffdé\ufffd")]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xffb"}\n{"text": "\\ud800c"}')
    assert [text for _, text in read(tmp_path / "a.jsonl", **options)] == ["a\ufffdb", "\ufffdc"]
    with pytest.raises(ValueError, match="errors: got 'ignore', expected strict or replace"):
        ReadOptions(errors="ignore")


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"zstandard: got no such package, expected `pip install peakgpt\[data\]`"):
        load_corpus([tmp_path / "a.txt.zst"])


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    expected = {"pipe.txt": "got a pipe, expected a file", "/dev/zero": "got a device", "none.txt": "got No such file"}
    if os.geteuid():
        expected["secret.txt"] = "got Permission denied"
    for name, message in expected.items():
        with pytest.raises(ValueError, match=f"text file .*{message}"):
            load_corpus([tmp_path / name])


def test_invalid_utf_8_in_parquet_is_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"good", b"bad \xff"])
    unchecked = pyarrow.StringArray.from_buffers(2, *texts.buffers()[1:])
    parquet.write_table(pyarrow.table({"text": unchecked}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: got byte 0xff in a text after row 0, which is not UTF-8"):
        read(tmp_path / "a.parquet")
