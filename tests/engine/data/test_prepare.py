"""Preparing text: the streams have its tokens, and a preparation that was killed ends with the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from peakgpt.cli import main
from peakgpt.engine.data import encoding
from peakgpt.engine.data.corpus import corpus_of, load_corpus
from peakgpt.engine.data.documents import Document
from peakgpt.engine.data.prepare import JOURNAL, prepare
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.tokenizer import END_OF_TEXT, Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.kernels.files import lock

TEXTS = [f"document {number} of many, naïve 日本 " * (1 + number % 7) for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def ids_of(shards):
    ids = np.empty(len(shards), np.int64)
    shards.read(0, ids)
    return ids.tolist()


def test_streams_decode_to_the_text_of_their_split(tokenizer, tmp_path):
    corpus = corpus_of(TEXTS)
    opened = prepare(corpus, tokenizer, tmp_path / "out", shard_tokens=400)
    for name, shards, part in zip(("train", "validation"), opened, (corpus.train, corpus.validation), strict=True):
        assert tokenizer.decode(ids_of(shards)) == "".join(d.text + END_OF_TEXT for d in part)
        assert (shards.text_bytes, shards.documents) == (part.size_bytes, part.count)
        assert (shards.vocab_size, shards.end_id, shards.tokenizer) == (300, tokenizer.end_id, tokenizer.digest)
        assert TokenShards.open(tmp_path / "out", name).digest == shards.digest
    assert len(opened[0].maps) > 3 and not (tmp_path / "out" / JOURNAL).exists()
    assert opened[0].corpus == opened[1].corpus
    loaded = Tokenizer.load(tmp_path / "out")
    assert loaded.digest == tokenizer.digest and loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_the_corpus_digest_depends_on_names_texts_and_boundaries(tokenizer, tmp_path):
    def digest(*pairs):
        documents = [Document(name, lambda parts=parts: parts) for name, *parts in pairs]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return prepare(corpus_of(documents, ["v"]), tokenizer, folder)[0].corpus

    digests = [
        digest(("a", "x"), ("b", "yz")), digest(("a", "xy"), ("b", "z")), digest(("a", "x"), ("c", "yz")),
        digest(("a", "xyz")), digest(("a", "x"), ("b", "yz"), ("d", "")), digest(("a", "x"), ("by", "z")),
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    assert digest(("a", "x"), ("b", "y", "z")) == digests[0], "blocks do not count"


def test_sizes_of_pieces_batches_and_blocks_change_no_byte(tokenizer, tmp_path, monkeypatch):
    whole = Document.of("long", "".join(TEXTS))
    expected = ids_of(prepare(corpus_of([whole], ["v"]), tokenizer, tmp_path / "a")[0])
    for number, (piece, batch, block) in enumerate([(3, 5, 1), (7, 50, 13), (100, 99, 1000)]):
        monkeypatch.setattr(encoding, "PIECE_CHARS", piece)
        monkeypatch.setattr(encoding, "BATCH_CHARS", batch)
        blocks = [whole.text[i : i + block] for i in range(0, len(whole.text), block)]
        cut = Document("long", lambda blocks=blocks: blocks)
        assert ids_of(prepare(corpus_of([cut], ["v"]), tokenizer, tmp_path / str(number))[0]) == expected


def test_pieces_do_not_depend_on_the_blocks_of_a_text(monkeypatch):
    """The position of a preparation counts pieces."""
    monkeypatch.setattr(encoding, "PIECE_CHARS", 10)
    text = "".join(TEXTS)
    pieces = list(encoding.cut_text([text]))
    assert "".join(piece for piece, _ in pieces) == text and len(pieces) > 100
    for size in (1, 9, 10, 11, 100):
        assert list(encoding.cut_text([text[i : i + size] for i in range(0, len(text), size)])) == pieces
    assert list(encoding.cut_text([])) == [("", True)]


def small_pieces(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_CHARS", 40)
    monkeypatch.setattr(encoding, "BATCH_CHARS", 100)


class Interrupted:
    """Interrupts a preparation after a number of pieces."""

    def __init__(self, pieces):
        self.pieces = pieces

    def __call__(self, done_bytes, tokens):
        self.pieces -= 1
        if not self.pieces:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rereadable", [True, False])
def test_an_interrupted_preparation_goes_on_and_ends_with_the_same_bytes(tokenizer, tmp_path, monkeypatch, rereadable):
    small_pieces(monkeypatch)

    def run(folder, **options):
        prepare(corpus_of(TEXTS if rereadable else iter(TEXTS)), tokenizer, folder, shard_tokens=300, **options)

    run(tmp_path / "whole")
    expected, interrupted, kept = contents(tmp_path / "whole"), 0, 0
    for number, pieces in enumerate([2, 10, 31, 60, 100, 101, 102, 150, 200, 1]):
        out = tmp_path / str(number)
        for more in (pieces, pieces, pieces // 2):  # each time from where the last one ended
            try:
                run(out, progress=Interrupted(more))
            except KeyboardInterrupt:
                interrupted += 1
                shards = sorted(path.name for path in out.glob("*-*.bin"))
                journal = json.loads((out / JOURNAL).read_text()) if out.exists() else {}
                assert out.exists() == bool(shards) and not list(out.glob(".*"))
                rows = [journal[name]["shards"] for name in ("train", "validation") if name in journal]
                assert shards == sorted(row["file"] for shard_rows in rows for row in shard_rows)
                kept += bool(shards)
            else:
                break
        if (out / "train.json").exists():
            continue
        encoded = []
        monkeypatch.setattr(Tokenizer, "encode_batch", counting(encoded))
        run(out)
        assert contents(out) == expected
        if kept and pieces > 100:
            assert sum(map(len, encoded)) < sum(map(len, TEXTS)), "finished shards are not encoded again"
    assert interrupted > 15 and kept > 8


def counting(encoded, real=Tokenizer.encode_batch):
    def encode_batch(self, texts, **options):
        encoded.extend(texts)
        return real(self, texts, **options)

    return encode_batch


PROGRAM = """
import sys, time
from peakgpt.engine.data import encoding
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.prepare import prepare
from peakgpt.engine.data.tokenizer import Tokenizer
encoding.PIECE_CHARS, encoding.BATCH_CHARS = 40, 100
prepare(load_corpus(["text"]), Tokenizer.load("tok"), "out", shard_tokens=300, progress=lambda *_: time.sleep(0.002))
"""


def test_a_preparation_that_was_killed_goes_on(tokenizer, tmp_path, monkeypatch):
    """With SIGKILL, in the middle of a shard."""
    (tmp_path / "text").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    (tmp_path / "tok").mkdir()
    tokenizer.save(tmp_path / "tok")
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM])
    while process.poll() is None and len(list(tmp_path.glob("out/train-*.bin"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and (tmp_path / "out" / JOURNAL).exists()
    small_pieces(monkeypatch)
    for folder in ("out", "whole"):
        prepare(load_corpus(["text"]), tokenizer, tmp_path / folder, shard_tokens=300)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def begun(tokenizer, folder, monkeypatch):
    """A preparation that was interrupted after some shards."""
    small_pieces(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus_of(TEXTS), tokenizer, folder, shard_tokens=300, progress=Interrupted(150))


def test_what_does_not_continue_a_preparation_is_refused(tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begun(tokenizer, out, monkeypatch)
    before = contents(out)
    changed, fewer = ["other", *TEXTS[1:]], TEXTS[:3]
    last = [*TEXTS[:20], TEXTS[20].upper(), *TEXTS[21:]]
    for texts, size, message in (
        (changed, 300, "got other text than the finished shards are made of"),
        (last, 300, "got other text than the finished shards are made of"),
        (fewer, 300, "got other text than the finished shards are made of"),
        (TEXTS, 301, "got a preparation with other settings or another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(corpus_of(texts), tokenizer, out, shard_tokens=size)
        assert contents(out) == before
    with pytest.raises(ValueError, match="another tokenizer, expected the same"):
        prepare(corpus_of(TEXTS), train_tokenizer(TEXTS, 280), out, shard_tokens=300)
    next(out.glob("train-00000*")).unlink()
    with pytest.raises(ValueError, match=r"got no train-00000-.*.bin, expected the finished shards"):
        prepare(corpus_of(TEXTS), tokenizer, out, shard_tokens=300)
    for damaged in ("{", "7", '{"train": {}}', '{"train": {"pieces": "1", "offset": 0, "sha256": "", "shards": []}}'):
        (out / JOURNAL).write_text(damaged)
        with pytest.raises(ValueError, match=r"preparation.json: got .*, expected a journal"):
            prepare(corpus_of(TEXTS), tokenizer, out, shard_tokens=300)


def test_folders_that_cannot_be_used_are_refused(tokenizer, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("x")
    (tmp_path / "used").mkdir()
    handle = os.open(tmp_path / "used", os.O_RDONLY)
    assert lock(handle)
    before = contents(tmp_path)
    for name, message in {
        "file": "got File exists|got Not a directory",
        "file/out": "got Not a directory",
        "full": "got a folder with files, expected a new or empty one",
        "used": "a running process writes it, expected a free one",
    }.items():
        with pytest.raises(ValueError, match=f"folder .*{message}"):
            prepare(corpus_of(TEXTS), tokenizer, tmp_path / name)
    os.close(handle)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", [1, 2, 3, 5, 9])
def test_a_full_disk_is_one_sentence_and_keeps_finished_shards_only(tokenizer, tmp_path, monkeypatch, call):
    calls, real = [], os.fsync

    def fsync(handle):
        calls.append(handle)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    out = tmp_path / "new" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(ValueError, match="got No space left on device, expected more free space") as raised:
            prepare(corpus_of(TEXTS), tokenizer, out, shard_tokens=1000)
    shards = list(out.glob("train-*.bin"))
    assert bool(shards) == ("are kept" in str(raised.value)) == (call == 9)
    assert shards or not list(tmp_path.iterdir())
    prepare(corpus_of(TEXTS), tokenizer, out, shard_tokens=1000)
    prepare(corpus_of(TEXTS), tokenizer, tmp_path / "whole", shard_tokens=1000)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_disk_that_is_full_in_the_middle_of_a_shard_leaves_nothing(tokenizer, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"folder .*: got File too large, expected a folder to write into"):
            prepare(corpus_of([text * 40 for text in TEXTS]), tokenizer, tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_texts_of_a_program_without_a_validation_document_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="corpus: got no validation text, expected some; name it with --validation"):
        prepare(corpus_of(iter(["one", "two"])), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    train, validation = prepare(corpus_of(iter(["one", "two"]), iter(["three"])), tokenizer, tmp_path / "out")
    assert (train.documents, validation.documents) == (2, 1)


PEAK = """
import resource, sys
from peakgpt.cli import main
assert main(["prepare", sys.argv[1], "--vocab", "4096", "--out", f"{sys.argv[1]}-out"]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """From the size of the tokenizer's sample on; 600 MB are for any corpus, most of them torch and the sample."""
    library = b"".join(document.text.encode() for document in load_corpus().train)
    peaks_kb = []
    for copies in (4, 20):
        (tmp_path / f"{copies}.txt").write_bytes(library * copies)
        program = [sys.executable, "-c", PEAK, str(tmp_path / f"{copies}.txt")]
        peaks_kb.append(int(subprocess.run(program, capture_output=True, text=True).stdout.split()[-1]))
    assert peaks_kb[1] < 1.1 * peaks_kb[0] and peaks_kb[1] < 600_000


# The command


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("some text to train on\n" * 50)
    (tmp_path / "bad.txt").write_bytes(b"text\xff")
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokens.bin").write_bytes(np.arange(100, dtype="<u2").tobytes())
    (tmp_path / "lines.jsonl").write_text('{"body": "one two three"}\n' * 40)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("good.txt --out full", "folder full: got a folder with files, expected a new or empty one"),
        ("good.txt good.txt --out new/out", "good.txt twice, expected each source once"),
        ("good.txt --validation good.txt --out out", "good.txt for training and validation"),
        ("bad.txt --out out", "bad.txt: got byte 0xff at position 4"),
        ("pipe --out out", "pipe: got a pipe, expected a file"),
        ("/dev/zero --out out", "/dev/zero: got a device, expected a file"),
        ("missing.txt --out out", "missing.txt: got No such file or directory, expected a file"),
        ("empty --out out", "folder empty: got no text in it"),
        ("lines.jsonl --out out", "lines.jsonl:1: got fields body, expected text in the field 'text' (--field)"),
        ("good.txt --vocab 9 --out out", "vocab_size: got 9, expected at least 257"),
        ("good.txt --vocab 300 --tokenizer empty --out out", "--vocab: got it with --tokenizer, expected one of them"),
        ("good.txt --tokenizer empty --out out", "tokenizer"),
        ("good.txt --end-id 5 --out out", "--end-id: got it with text"),
        ("good.txt --validation-share 0 --out out", "--validation-share is 0.0, expected more than 0"),
        ("good.txt --validation lines.jsonl --validation-share 0.5 --out out", "--validation-share: got it with"),
        ("good.txt tokens.bin --out out", "sources: got token files, such as tokens.bin, and text"),
        ("tokens.bin --out out", "token files: got neither --vocab nor --tokenizer"),
        ("tokens.bin --vocab 50 --out out", "tokens: got ids from 0 to 92, expected 0 to 49"),
        ("tokens.bin --vocab 100 --end-id 100 --out out", "--end-id: got 100, expected an id below"),
        ("tokens.bin --vocab 100 --errors replace --out out", "--errors: got it with .bin files"),
        ("good.txt --out", "expected one argument"),
    ],
)
def test_bad_input_is_one_sentence_with_exit_code_2_and_writes_nothing(workspace, capsys, argv, message):
    before = sorted(workspace.rglob("*"))
    assert main(["prepare", *argv.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(workspace.rglob("*")) == before


def test_the_command_prepares_text_of_several_kinds(workspace, capsys):
    argv = ["prepare", "good.txt", "lines.jsonl", "--field", "body", "--vocab", "280", "--validation-share", "0.2"]
    assert main([*argv, "--out", "out"]) == 0
    out = capsys.readouterr().out
    train, validation = (TokenShards.open("out", name) for name in ("train", "validation"))
    assert f"train: {len(train):,} tokens in {train.documents} documents" in out
    assert train.documents + validation.documents == 41
    assert "next: peakgpt train --dataset out" in out
    assert main(["prepare", "bad.txt", "--errors", "replace", "--tokenizer", "out", "--out", "two"]) == 0
    assert Tokenizer.load("two").digest == Tokenizer.load("out").digest
