"""Token files of nanoGPT and llm.c: their ids and splits are kept, and damaged ones are named."""

import numpy as np
import pytest

from peakgpt.cli import main
from peakgpt.engine.data import token_files as module
from peakgpt.engine.data.prepare import prepare_tokens
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.token_files import find_token_files, is_token_source
from peakgpt.engine.data.tokenizer_training import train_tokenizer

RNG = np.random.default_rng(0)


def write_raw(path, ids):
    path.write_bytes(np.asarray(ids, "<u2").tobytes())


def write_llm_c(path, ids, magic=20240520, version=1, dtype="<u2", count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())


def ids_of(shards):
    ids = np.empty(len(shards), np.int64)
    shards.read(0, ids)
    return ids.tolist()


def prepared(tmp_path, sources, validation=None, share=0.1, vocab_size=1 << 20, **options):
    files = find_token_files(sources, validation, share)
    return [ids_of(s) for s in prepare_tokens(files, tmp_path / "out", vocab_size=vocab_size, **options)]


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_a_folder_of_nanogpt_keeps_its_split_and_its_pickle_is_not_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_TOKENS", block)
    data = tmp_path / "shakespeare_char"
    data.mkdir()
    train, validation = RNG.integers(0, 65, 1000).tolist(), RNG.integers(0, 65, 100).tolist()
    write_raw(data / "train.bin", train)
    write_raw(data / "val.bin", validation)
    (data / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    (data / "input.txt").write_text("text of the same data")
    assert main(["prepare", str(data), "--vocab", "65", "--out", str(tmp_path / "out")]) == 0
    opened = [TokenShards.open(tmp_path / "out", name) for name in ("train", "validation")]
    assert [ids_of(shards) for shards in opened] == [train, validation]
    assert {(s.vocab_size, s.text_bytes, s.end_id, s.documents, s.tokenizer) for s in opened} == {(65, *[None] * 4)}
    assert np.isnan(opened[0].bits_per_byte(1.0)) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("magic", "version", "dtype", "high"), [(20240520, 1, "<u2", 50257), (20240801, 7, "<u4", 128256)]
)
def test_files_of_llm_c_are_read_in_order(tmp_path, magic, version, dtype, high):
    parts = {name: RNG.integers(0, high, 300).tolist() for name in ("train_000001", "train_000002", "val_000000")}
    for name, ids in parts.items():
        write_llm_c(tmp_path / f"fineweb_{name}.bin", ids, magic, version, dtype)
    train, validation = prepared(tmp_path, [tmp_path])
    assert train == parts["train_000001"] + parts["train_000002"] and validation == parts["val_000000"]


def test_files_without_a_validation_file_are_cut_at_the_end(tmp_path):
    write_raw(tmp_path / "a.bin", range(70))
    write_llm_c(tmp_path / "b.bin", range(70, 100))
    train, validation = prepared(tmp_path, [tmp_path / "a.bin", tmp_path / "b.bin"], share=0.4)
    assert train == [*range(60)] and validation == [*range(60, 100)]


def test_validation_files_can_be_named(tmp_path):
    write_raw(tmp_path / "train.bin", range(10))
    write_raw(tmp_path / "val.bin", range(10, 20))
    write_raw(tmp_path / "c.bin", range(20, 30))
    train, validation = prepared(tmp_path, [tmp_path], [tmp_path / "c.bin"])
    assert train == [*range(20)] and validation == [*range(20, 30)]


def test_a_tokenizer_gives_documents_and_bytes_of_text(tmp_path):
    texts = ["naïve text", "more 日本 text"]
    tokenizer = train_tokenizer(texts, 280)
    ids = [token for text in texts * 9 for token in [*tokenizer.encode(text), tokenizer.end_id]]
    write_raw(tmp_path / "train.bin", ids)
    write_raw(tmp_path / "val.bin", ids[: len(ids) // 9])
    tokenizer.save(tmp_path)
    argv = ["prepare", str(tmp_path / "train.bin"), str(tmp_path / "val.bin"), "--tokenizer", str(tmp_path)]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    train = TokenShards.open(tmp_path / "out", "train")
    assert (train.documents, train.text_bytes) == (18, 9 * sum(len(text.encode()) for text in texts))
    assert (train.tokenizer, train.end_id) == (tokenizer.digest, tokenizer.end_id)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_damaged_files_are_named(tmp_path):
    good = tmp_path / "good.bin"
    write_raw(good, range(100))
    cases = {
        "odd.bin": (lambda p: p.write_bytes(b"abc"), "odd.bin: got 3 bytes, expected 2 for each token"),
        "empty.bin": (lambda p: p.write_bytes(b""), "empty.bin: got 0 bytes, expected 2 for each token"),
        "short.bin": (lambda p: write_llm_c(p, range(9), count=10), "short.bin: got 1042 bytes, expected 1024 and 2"),
        "none.bin": (lambda p: write_llm_c(p, [], count=0), "none.bin: got 1024 bytes"),
        "old.bin": (lambda p: write_llm_c(p, range(9), version=3), "old.bin: got version 3, expected 1"),
        "missing.bin": (lambda p: None, "missing.bin: got No such file"),
        "good.bin": (lambda p: None, "good.bin twice, expected each file once"),
        "one.bin": (lambda p: write_raw(p, [5]), "got 1 token, expected at least 2 to split"),
    }
    for name, (write, message) in cases.items():
        write(tmp_path / name)
        with pytest.raises(ValueError, match=f"token files?.* {message}|token files?.*{message}"):
            find_token_files([tmp_path / name, *([good] if name != "one.bin" else [])], None, 0.1)
    with pytest.raises(ValueError, match=r"token files .*val.bin: got none to train on"):
        write_raw(tmp_path / "val.bin", range(9))
        find_token_files([tmp_path / "val.bin"], None, 0.1)
    with pytest.raises(ValueError, match="tokens: got ids from 0 to 89, expected 0 to 63"):
        prepared(tmp_path, [good], vocab_size=64)
    assert not (tmp_path / "out").exists()


def test_folders_with_training_files_are_token_sources(tmp_path):
    files = {"train.bin": True, "x_train_000003.bin": True, "val.bin": False, "pytorch_model.bin": False}
    for name, expected in files.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(b"xx")
        assert is_token_source(folder) == expected and is_token_source(folder / name)
    assert not is_token_source(tmp_path / "missing") and not is_token_source(tmp_path)
