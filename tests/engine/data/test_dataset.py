"""Prepared folders as training data: used in place, checked, mixed, and recorded in the run."""

import json
import shutil

import numpy as np
import pytest
from token_streams import stream

from peakgpt.cli import main
from peakgpt.engine.data.corpus import corpus_of
from peakgpt.engine.data.data_config import DataConfig
from peakgpt.engine.data.dataset import RECORD, Dataset, TrainingData, tokenizer_for
from peakgpt.engine.data.prepare import prepare
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.training import loop
from peakgpt.engine.training.run_config import RunConfig

TEXTS = [f"document {number} of many, naïve 日本 " * 20 for number in range(40)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two folders with one tokenizer, one with another."""
    root = tmp_path_factory.mktemp("prepared")
    tokenizer = train_tokenizer(TEXTS, 300)
    prepare(corpus_of(TEXTS), tokenizer, root / "web")
    prepare(corpus_of(TEXTS[:20]), tokenizer, root / "books")
    prepare(corpus_of(TEXTS), train_tokenizer(TEXTS, 280), root / "other")
    return root


def open_data(run, *folders, weights=None):
    config = DataConfig(dataset=tuple(map(str, folders)), dataset_weights=weights)
    return TrainingData.open(config, run / "tokens")


def test_a_mixture_of_folders_is_trained_on_in_place(prepared, tmp_path):
    data = open_data(tmp_path, prepared / "web", prepared / "books", weights=(3.0, 1.0))
    assert list(data.validation) == ["web", "books"] and data.vocab_size == 300
    assert data.tokenizer.digest == data.datasets[0].train.tokenizer
    batches = data.batches(4, 16, seed=1)
    assert [int(p["windows"]) for p in batches.state_dict()["sources"]] == [0, 0]
    batches.take(40)
    assert [int(p["windows"]) for p in batches.state_dict()["sources"]] == [30, 10]
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [RECORD], "no shard is copied"
    by_size = open_data(tmp_path / "two", prepared / "web", prepared / "books").batches(1, 16, seed=1)
    sizes = [len(dataset.train) for dataset in data.datasets]
    by_size.take(100)
    assert by_size.state_dict()["sources"][0]["windows"] == pytest.approx(100 * sizes[0] / sum(sizes), abs=1)


def test_changed_data_are_refused(prepared, tmp_path):
    folder = tmp_path / "web"
    shutil.copytree(prepared / "web", folder)
    open_data(tmp_path, folder)
    open_data(tmp_path, folder)
    with pytest.raises(ValueError, match="data sets books: got other shards than the run began with"):
        open_data(tmp_path, prepared / "books")
    shutil.copy(prepared / "other" / "tokenizer.json", folder)
    with pytest.raises(ValueError, match=r"data set web: got shards of tokenizer .* with .*, expected the same"):
        open_data(tmp_path, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"data set web: got shards of tokenizer .* with tokenizer none"):
        open_data(tmp_path, folder)
    [shard] = folder.glob("validation-*.bin")
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"token shard .*validation-00000.*: got sha256"):
        open_data(tmp_path, folder)
    (folder / "preparation.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data set .*web: got a folder that is not complete"):
        open_data(tmp_path, folder)
    (tmp_path / "tokens" / RECORD).write_text("{")
    with pytest.raises(ValueError, match=r"data.json: got .*, expected the digests"):
        open_data(tmp_path, prepared / "web")


def test_folders_that_do_not_fit_are_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match="data sets: got different tokenizers, expected one tokenizer for all"):
        open_data(tmp_path, prepared / "web", prepared / "other")
    with pytest.raises(ValueError, match=r"data sets: got .*web twice, expected each folder once"):
        open_data(tmp_path, prepared / "web", prepared / "books" / ".." / "web")
    with pytest.raises(ValueError, match=r"token index .*none.*: got .*No such file"):
        open_data(tmp_path, tmp_path / "none")
    data = open_data(tmp_path, prepared / "web")
    with pytest.raises(ValueError, match="data set web: got shards of tokenizer"):
        data.check_tokenizer(Dataset.open(prepared / "other").tokenizer)
    data.check_tokenizer(Dataset.open(prepared / "books").tokenizer)


def test_tokens_without_a_tokenizer_are_trained_on(tmp_path):
    for name in ("train", "validation"):
        stream(tmp_path / "data", 500, vocab_size=500, name=name)
    data = open_data(tmp_path, tmp_path / "data")
    assert data.tokenizer is None and data.vocab_size == 500
    ids, _ = data.batches(2, 16, seed=0).take(2)
    assert np.array_equal(ids - ids[:, :1], np.tile(np.arange(16), (2, 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": ("a",), "text": ("b",)}, r"text: got it with dataset \[a\]"),
        ({"dataset": ("a",), "vocab": 300}, "vocab: got it with dataset"),
        ({"dataset": ("a",), "field": "body"}, "field: got it with dataset"),
        ({"dataset_weights": (1.0,)}, "got 1 dataset_weights, expected one for each of 0"),
        ({"dataset": ("a", "b"), "dataset_weights": (1.0,)}, "got 1 dataset_weights, expected one for each of 2"),
        ({"dataset": ("a",), "dataset_weights": (0.0,)}, "dataset_weights is .*, expected more than 0"),
        ({"validation_text": ("a",), "validation_share": 0.1}, "validation_share: got it with validation_text"),
        ({"validation_share": 1.0}, "validation_share is 1.0, expected below 1"),
        ({"errors": "ignore"}, "errors is 'ignore', expected one of strict, replace"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.of(settings)


def test_a_tokenizer_is_not_trained_on_text_that_can_be_read_once():
    with pytest.raises(ValueError, match=r"got text that can be read once only, expected a tokenizer for it"):
        tokenizer_for(corpus_of(iter(TEXTS)))


def test_the_command_trains_on_a_prepared_folder_without_copying_it(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "peak_flops_s", lambda device, dtype, again=False: 1e9)
    small = ["--n-layer", "1", "--n-head", "1", "--n-embd", "32", "--steps", "2", "--batch", "2", "--tokens", "16"]
    argv = ["train", *small, "--dataset", str(prepared / "web"), str(prepared / "books"), "--dataset-weights", "3", "1"]
    assert main([*argv, "--device", "cpu", "--out", "run"]) == 0
    assert [path.name for path in (tmp_path / "run" / "tokens").iterdir()] == [RECORD]
    assert len(json.loads((tmp_path / "run" / "tokens" / RECORD).read_text())) == 2
