"""Corpus, token shards and batches: each token comes out once, in a reproducible order; errors name damaged files."""

import hashlib
import json
import math
import os

import numpy as np
import pytest
import torch

from peakgpt.engine.data import shards as data
from peakgpt.engine.data.batches import Batches, validation_batches
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.shards import TokenShards, tokenize_corpus, write_shards
from peakgpt.engine.data.tokenizer import END_OF_TEXT
from peakgpt.engine.data.tokenizer_training import train_tokenizer


def stream(folder, count, *, vocab_size=1 << 16, shard_tokens=37, name="train"):
    """Write shards in which the token at position p is p, so that a batch shows its positions."""
    source = np.array_split(np.arange(count), 5)
    write_shards(folder, name, source, vocab_size, shard_tokens, text_bytes=4 * count, corpus_digest="d")
    return TokenShards.open(folder, name)


# Corpus


def test_standard_library_corpus_is_reproducible_and_has_7_percent_validation():
    corpus, again = load_corpus(), load_corpus()
    assert corpus == again
    names = [document.name for document in (*corpus.train, *corpus.validation)]
    assert len(set(names)) == len(names) > 200
    assert "argparse.py" in names
    assert not {"test", "tests", "encodings", "site-packages"} & {part for name in names for part in name.split("/")}
    assert not any("_sysconfigdata" in name for name in names)
    for side in (corpus.train, corpus.validation):
        assert [d.name for d in side] == sorted(d.name for d in side)
    total = corpus.train_bytes + corpus.validation_bytes
    assert total > 5e6
    assert 0.05 < corpus.validation_bytes / total <= 0.07
    assert corpus.digest[:12] in str(corpus)


def write_files(folder, sizes):
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        (folder / f"{number:03}.txt").write_text(f"{number:03} ".ljust(size, "é"), encoding="utf-8")


def test_files_are_split_by_a_hash_of_their_names(tmp_path):
    write_files(tmp_path / "a", [500] * 300)
    corpus = load_corpus([tmp_path / "a"])
    train, validation = ({d.name for d in side} for side in (corpus.train, corpus.validation))
    assert not train & validation
    assert len(train | validation) == 300
    assert len(validation) == 21  # 7 %
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    moved = load_corpus([tmp_path / "elsewhere"])
    assert moved == corpus
    by_file = load_corpus(sorted((tmp_path / "elsewhere").iterdir(), reverse=True))
    assert by_file == corpus


@pytest.mark.parametrize("sizes", [[10, 10], [1, 10_000], [5000, 20, 5000], [3] * 7])
def test_both_splits_of_few_files_have_text(tmp_path, sizes):
    write_files(tmp_path / "a", sizes)
    corpus = load_corpus([tmp_path / "a"])
    assert len(corpus.train) >= 1
    assert len(corpus.validation) == 1
    assert corpus.validation_bytes <= corpus.train_bytes


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
    assert corpus.train_bytes + corpus.validation_bytes == len(text.encode())
    if text.startswith("line"):
        assert head.text.endswith("\n")
        assert 0.05 < len(tail.text) / len(text) < 0.1
    if text.startswith("title"):
        assert head.text.endswith(" ")


def test_corpus_digest_depends_on_names_and_contents(tmp_path):
    def digest(**files):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in files.items():
            (tmp_path / f"{name}.txt").write_text(text)
        return load_corpus([tmp_path]).digest

    digests = [
        digest(a="x", b="yz"),
        digest(a="xy", b="z"),
        digest(a="x", c="yz"),
        digest(a="x", b="yz", c="w"),
        digest(a="xb.txtyz"),
    ]
    assert len(set(digests)) == 5
    assert digest(a="x", b="yz") == digests[0]


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
    corpus = load_corpus([tmp_path, tmp_path / "a.txt"])
    assert sorted(d.name for d in (*corpus.train, *corpus.validation)) == ["a.txt", "sub/b.md"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: got an empty file, expected UTF-8 text"),
        ("binary.txt", b"ab\0c", r"binary.txt: got a binary file \(NUL at byte 2\), expected UTF-8 text"),
        ("latin.txt", "é".encode("latin-1"), "latin.txt: got byte 0xe9 at position 0, which is not UTF-8"),
        ("one.txt", b"x", "one.txt: got 1 character, expected at least 2"),
        ("missing.txt", None, "missing.txt: No such file or directory, expected a text file"),
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


# Shards


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "<u2"), (1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_shards_return_the_tokens_written(tmp_path, vocab_size, dtype):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, vocab_size, size) for size in (0, 1, 100, 0, 7, 250)] + [[vocab_size - 1], []]
    tokens = np.concatenate([np.asarray(part, np.int64) for part in parts])
    for shard_tokens in (1, 7, 100, len(tokens), 10_000):
        write_shards(tmp_path, "t", iter(parts), vocab_size, shard_tokens, text_bytes=718, corpus_digest="abc")
        shards = TokenShards.open(tmp_path, "t")
        assert len(shards.maps) == math.ceil(len(tokens) / shard_tokens)
        assert {str(m.dtype.newbyteorder("<").str) for m in shards.maps} == {dtype}
        for start, count in [(0, len(tokens)), (5, 20), (len(tokens) - 1, 1), (3, 0)]:
            out = np.full(count, -1)
            shards.read(start, out)
            assert out.tolist() == tokens[start : start + count].tolist()
        assert (shards.vocab_size, len(shards), shards.corpus) == (vocab_size, 359, "abc")
        assert shards.bytes_per_token == 2
        assert shards.bits_per_byte(math.log(2)) == pytest.approx(0.5)
        # The files of an older, longer stream are deleted.
        assert len(list(tmp_path.iterdir())) == len(shards.maps) + 1


def test_streams_in_one_folder_are_independent(tmp_path):
    stream(tmp_path, 100, name="train")
    stream(tmp_path, 80, name="train_2")
    stream(tmp_path, 60, name="train")
    assert [len(TokenShards.open(tmp_path, name)) for name in ("train", "train_2")] == [60, 80]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("call", range(1, 11))  # fsync of file and folder, for four shards and the index
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_failed_write_leaves_the_folder_unchanged(tmp_path, monkeypatch, call, existing, error):
    if existing:
        stream(tmp_path, 100)
    before = contents(tmp_path)
    calls = []

    def fsync(number):
        calls.append(number)
        if len(calls) == call:
            raise error
        real(number)

    real = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(error):
        write_shards(tmp_path, "train", [np.arange(100, 200)], 300, 25, text_bytes=1, corpus_digest="d")
    if call < 10:
        assert contents(tmp_path) == before
    else:  # the new index is in place: the new stream is complete, and old files are deleted
        assert len(TokenShards.open(tmp_path, "train").maps) == 4
        assert len(contents(tmp_path)) == 5


def test_files_of_a_killed_writer_are_deleted(tmp_path):
    shards = stream(tmp_path, 100)
    for name in ("train-00007-0123456789ab.bin", ".train-00000-0123456789ab.bin.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "train-notes.bin").write_bytes(b"not ours")
    assert TokenShards.open(tmp_path, "train").digest == shards.digest
    stream(tmp_path, 90)
    names = set(contents(tmp_path))
    assert len(names) == 5
    assert names > {"train.json", "train-notes.bin"}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("change", [lambda b: b[:-2], lambda b: b[:-1], lambda b: b + b"\0\0", lambda b: b""])
def test_truncated_shard_is_named_in_the_error(tmp_path, change, check):
    stream(tmp_path, 100)
    path = sorted(tmp_path.glob("train-00001-*.bin"))[0]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name}: got {path.stat().st_size} bytes, expected 74"):
        TokenShards.open(tmp_path, "train", check=check)


def test_every_flipped_bit_is_detected(tmp_path):
    stream(tmp_path, 20)
    [path] = tmp_path.glob("*.bin")
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"{path.name}: got sha256 [0-9a-f]{{12}}, expected [0-9a-f]{{12}}"):
            TokenShards.open(tmp_path, "train")
        TokenShards.open(tmp_path, "train", check=False)  # does not read the contents
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}: got No such file"):
        TokenShards.open(tmp_path, "train")


def test_damaged_index_is_named_in_the_error(tmp_path):
    stream(tmp_path, 100)
    path = tmp_path / "train.json"
    good = json.loads(path.read_text())

    def refused(text, match):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"token index .*train.json: got .*{match}"):
            TokenShards.open(tmp_path, "train")

    refused("{", "expected an index")
    refused("[1]", "format 'list'")
    refused(json.dumps(good | {"format": "other"}), "format 'other'")
    refused(json.dumps(good | {"tokens": 99}), "99 tokens with 100 in the shards")
    changes = [
        {"dtype": "int8"},
        {"vocab_size": "9"},
        {"text_bytes": 0},
        {"corpus": None},
        {"shards": []},
        {"shards": [1]},
    ]
    for change in changes:
        refused(json.dumps(good | change), next(iter(change))[:5])
    for change in [{"file": "../train-00000-0123456789ab.bin"}, {"tokens": -1}, {"sha256": 5}]:
        refused(json.dumps(good | {"shards": [good["shards"][0] | change]}), "shard ")
    path.unlink()
    with pytest.raises(ValueError, match=r"train.json: got .*No such file"):
        TokenShards.open(tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_iter": [[0, 10]]}, "tokens: got ids from 0 to 10, expected 0 to 9"),
        ({"token_iter": [[-1]]}, "tokens: got ids from -1 to -1"),
        ({"token_iter": [[0.5]]}, "tokens: got float64 of shape"),
        ({"token_iter": [[[1]]]}, r"tokens: got int64 of shape \(1, 1\)"),
        ({"token_iter": [[], []]}, "got no tokens, expected at least 1"),
        ({"name": "../up"}, "shard name: got '../up'"),
        ({"shard_tokens": 0}, "got shard_tokens=0"),
        ({"text_bytes": 0}, "text_bytes=0"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, change, message):
    arguments = {"name": "t", "token_iter": [[1]], "vocab_size": 10, "shard_tokens": 5, "text_bytes": 1}
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, **(arguments | change), corpus_digest="d")
    assert not list(tmp_path.iterdir())


# Batches


def epoch(batches):
    return [next(batches) for _ in range(batches.epoch_batches)]


@pytest.mark.parametrize(
    ("count", "batch", "tokens"), [(1000, 4, 16), (1000, 1, 1), (65, 4, 16), (66, 4, 16), (79, 4, 16), (1001, 3, 250)]
)
def test_epoch_uses_every_token_at_most_once(tmp_path, count, batch, tokens):
    batches = Batches(stream(tmp_path, count), batch, tokens, seed=1)
    for _ in range(4):
        seen, targets_seen = [], []
        for ids, targets in epoch(batches):
            assert ids.shape == targets.shape == (batch, tokens)
            assert ids.dtype == targets.dtype == torch.int64
            assert ids.is_contiguous()
            assert targets.is_contiguous()
            # The token at position p is p: the rows are windows of the stream, the targets are shifted by one.
            assert torch.equal(ids, ids[:, :1] + torch.arange(tokens))
            assert torch.equal(targets, ids + 1)
            seen += ids.flatten().tolist()
            targets_seen += targets.flatten().tolist()
        assert len(set(seen)) == len(seen)
        assert len(set(targets_seen)) == len(targets_seen)
        assert max(targets_seen) < count
        # An epoch leaves out the tokens before its offset, less than a window at the end, and less than a batch.
        assert len(seen) >= max(batch * tokens, count - 1 - 2 * (tokens - 1) - (batch - 1) * tokens)


def test_epochs_differ_in_order_and_offset(tmp_path):
    shards = stream(tmp_path, 2000)
    batches = Batches(shards, 2, 16, seed=3)
    starts = [[int(row[0]) for ids, _ in epoch(batches) for row in ids] for _ in range(20)]
    assert all(order != sorted(order) for order in starts)
    assert len({tuple(order) for order in starts}) == 20
    assert len({order[0] % 16 for order in starts}) > 8
    other = Batches(shards, 2, 16, seed=4)
    assert [int(row[0]) for ids, _ in epoch(other) for row in ids] != starts[0]


def test_order_of_windows_never_changes(tmp_path):
    """Resuming after an upgrade of numpy or torch needs the same order: these numbers may never change."""
    batches = Batches(stream(tmp_path, 200), 2, 16, seed=5)
    assert [next(batches)[0][:, 0].tolist() for _ in range(8)] == [
        [177, 129],
        [145, 17],
        [49, 33],
        [1, 65],
        [81, 161],
        [97, 113],
        [149, 101],
        [53, 69],
    ]


def test_resumed_batches_equal_uninterrupted_ones(tmp_path):
    shards = stream(tmp_path, 500)
    whole = Batches(shards, 3, 16, seed=7)
    expected = [next(whole) for _ in range(60)]
    assert whole.epoch >= 4
    for count in (0, 1, 9, 10, 11, 37):
        first = Batches(shards, 3, 16, seed=7)
        for _ in range(count):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        resumed = Batches(TokenShards.open(tmp_path, "train"), 3, 16, seed=7)
        next(resumed)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for ids, targets in expected[count:]:
            again = next(resumed)
            assert torch.equal(again[0], ids)
            assert torch.equal(again[1], targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "x"}, "data position: got data='x'"),
        ({"batch": 4}, "data position: got batch=4, expected 3"),
        ({"tokens": 8}, "data position: got tokens=8, expected 16"),
        ({"seed": 8}, "data position: got seed=8, expected 7"),
        ({"index": 1000}, "data position: got index=1000, expected 0 to 10"),
        ({"index": -1}, "data position: got index=-1"),
        ({"epoch": None}, "data position: got epoch=None"),
    ],
)
def test_position_in_other_data_is_refused(tmp_path, change, message):
    batches = Batches(stream(tmp_path, 500), 3, 16, seed=7)
    next(batches)
    state = batches.state_dict()
    with pytest.raises(ValueError, match=message):
        batches.load_state_dict(state | change)
    assert batches.state_dict() == state


def test_too_little_data_raises(tmp_path):
    shards = stream(tmp_path, 64)
    with pytest.raises(ValueError, match="training data: got 64 tokens, expected at least 65 for one batch of 4 x 16"):
        Batches(shards, 4, 16, seed=0)
    with pytest.raises(ValueError, match="validation data: got 64 tokens, expected at least 65 for one window"):
        validation_batches(shards, 1, 64)
    for sizes in ((0, 16), (4, 0)):
        with pytest.raises(ValueError, match="batch x tokens: got"):
            Batches(shards, *sizes, seed=0)
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match=f"seed: got {seed}"):
            Batches(shards, 1, 16, seed)


@pytest.mark.parametrize(
    ("count", "batch", "rows", "batches"), [(641, 4, 4, 10), (640, 4, 4, 9), (49, 4, 3, 1), (17, 4, 1, 1)]
)
def test_validation_batches_cover_the_stream_once(tmp_path, count, batch, rows, batches):
    shards = stream(tmp_path, count)
    sweep = list(validation_batches(shards, batch, 16))
    assert len(sweep) == batches
    ids = torch.cat([ids for ids, _ in sweep])
    assert torch.equal(ids.flatten(), torch.arange(batches * rows * 16))
    assert all(torch.equal(targets, ids + 1) and ids.shape == (rows, 16) for ids, targets in sweep)


def test_ids_above_65535_are_kept(tmp_path):
    shards = stream(tmp_path, 70_001, vocab_size=70_001, shard_tokens=50_000)
    assert max(int(targets.max()) for _, targets in validation_batches(shards, 10, 100)) == 70_000


def test_tokenized_corpus_decodes_to_its_text(tmp_path):
    """The shards also have the number of bytes, which bits per byte need."""
    write_files(tmp_path / "text", [400] * 40)
    corpus = load_corpus([tmp_path / "text"])
    tokenizer = train_tokenizer((d.text for d in corpus.train), 300)
    opened = tokenize_corpus(corpus, tokenizer, tmp_path / "tokens")
    for shards, side in zip(opened, (corpus.train, corpus.validation), strict=True):
        ids = np.empty(len(shards), np.int64)
        shards.read(0, ids)
        assert tokenizer.decode(ids.tolist()) == "".join(d.text + END_OF_TEXT for d in side)
        assert shards.text_bytes == sum(len(d.text.encode()) for d in side)
        assert (shards.corpus, shards.vocab_size) == (corpus.digest, 300)


def test_index_has_the_digest_and_dtype_of_its_shards(tmp_path):
    """Digest and dtype can be checked by anyone with sha256sum and numpy."""
    stream(tmp_path, 100)
    index = json.loads((tmp_path / "train.json").read_text())
    for shard in index["shards"]:
        content = (tmp_path / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(np.frombuffer(content, data.DTYPES[index["dtype"]])) == shard["tokens"]
