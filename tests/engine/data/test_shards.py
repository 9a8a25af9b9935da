"""Token shards: what was written is read, a failure leaves nothing behind, and errors name damaged files."""

import hashlib
import json
import math
import os

import numpy as np
import pytest
from token_streams import stream

from peakgpt.engine.data import shards as data
from peakgpt.engine.data.shard_writer import write_shards
from peakgpt.engine.data.shards import TokenShards


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
    for name in ("train-00007-0123456789ab.bin", ".train.bin.tmp"):
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


def test_index_has_the_digest_and_dtype_of_its_shards(tmp_path):
    """Digest and dtype can be checked by anyone with sha256sum and numpy."""
    stream(tmp_path, 100)
    index = json.loads((tmp_path / "train.json").read_text())
    for shard in index["shards"]:
        content = (tmp_path / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(np.frombuffer(content, data.DTYPES[index["dtype"]])) == shard["tokens"]
