"""What a user names a model by: a path, or a name of the hub with a revision or a file."""

from pathlib import Path

import pytest

from peakgpt.engine.data.hub import HubFiles, HubModel
from peakgpt.engine.data.model_source import is_path, locate, parse_source

PATHS = ["./gpt2", "../gpt2", "/models/gpt2", "~/gpt2", "gpt2/", "a/b/c", "model.gguf", "models/model.gguf", ".hidden",
         "a//b", "C:\\gpt2", "", "a b"]  # fmt: skip
NAMES = {
    "gpt2": HubModel("gpt2"),
    "org/name": HubModel("org/name"),
    "meta-llama/Llama-3.2-1B": HubModel("meta-llama/Llama-3.2-1B"),
    "gpt2@main": HubModel("gpt2", "main"),
    "org/name@refs/pr/1": HubModel("org/name", "refs/pr/1"),
    "org/name/q8.gguf": HubModel("org/name", None, "q8.gguf"),
    "org/name/folder/q8.gguf@v1": HubModel("org/name", "v1", "folder/q8.gguf"),
}


@pytest.mark.parametrize("source", PATHS)
def test_what_looks_like_a_path_is_one(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(parse_source(source), Path) and is_path(source)
    assert isinstance(parse_source(Path("gpt2")), Path), "a Path is never a name of the hub"


@pytest.mark.parametrize("source", NAMES)
def test_names_of_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source(source) == NAMES[source] and str(NAMES[source]) == source and not is_path(source)


def test_a_revision_is_given_once_and_to_the_hub_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source("gpt2", "v1") == HubModel("gpt2", "v1")
    with pytest.raises(ValueError, match="revision is 'v1' for gpt2@v2, expected one of the two"):
        parse_source("gpt2@v2", "v1")
    with pytest.raises(ValueError, match=r"revision is 'v1' for the path ./gpt2, expected none"):
        parse_source("./gpt2", "v1")


@pytest.mark.parametrize("source", ["gpt2", "org/name", "org/name/q8.gguf"])
def test_a_path_that_exists_wins(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(source).mkdir(parents=True)
    assert locate(source, HubFiles(("config.json",))) == Path(source)


@pytest.mark.parametrize("source", ["./run/modle", "modle.gguf"])
def test_a_missing_path_names_the_nearest_one(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run/model").mkdir(parents=True)
    Path("model.gguf").touch()
    nearest = source.replace("modle", "model").removeprefix("./")
    with pytest.raises(ValueError, match=f"^{source}: got no such folder or .gguf file, .*; nearest here: {nearest}$"):
        locate(source, HubFiles(("config.json",)))
