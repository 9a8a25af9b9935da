"""Models of the Hugging Face hub: the real client against a server of this machine that speaks the hub's protocol."""

import errno
import fcntl
import io
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server import Hub, Repository
from safetensors.torch import load_file

from peakgpt.cli import main
from peakgpt.engine.data.hub import HubFiles
from peakgpt.engine.data.model_source import locate
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.run_session import initial_model, source_tokenizer
from peakgpt.engine.training.run_config import RunConfig, run_settings

constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
CLUTTER = ("README.md", "tf_model.h5", "flax_model.msgpack", "model.fp16.safetensors", "rust_model.ot",
           "onnx/model.onnx", "onnx/config.json", "onnx/model.safetensors", "original/consolidated.00.pth",
           "64.tflite", "pytorch_model.bin")  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the canary sings a song, é and more"], 270)


def make_model(tokenizer, seed=0):
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "block_size": 64, "vocab_size": tokenizer.vocab_size}
    return GPT(GPTConfig(**sizes)).eval()


def publish(folder, model, tokenizer, clutter=CLUTTER, **options):
    """Write a model as people upload it: with copies of its weights in other formats."""
    model.save_pretrained(folder, tokenizer, **options)
    for name in clutter:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"another format" * 1000)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch, tokenizer):
    """A hub with tiny/gpt2, in two revisions; this process is its client, with an empty cache and without a token."""
    cache = tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub() as running:
        set_endpoint(monkeypatch, running.url)
        first = publish(tmp_path / "served" / "main", make_model(tokenizer), tokenizer)
        second = publish(tmp_path / "served" / "v2", make_model(tokenizer, seed=1), tokenizer)
        running.models["tiny/gpt2"] = Repository({"main": first, "v2": second})
        yield running


def set_endpoint(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def weights_of(folder):
    return load_file(folder / "model.safetensors")["transformer.wte.weight"]


def embedding(source, **options):
    return GPT.from_pretrained(source, **options).transformer.wte.weight


def error_of(capsys, source):
    """Return the one sentence of a command that fails for a model."""
    assert main(["generate", source, "--prompt", "the"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("peakgpt: error: ") and error.count("\n") == 1, error
    return error


def test_only_needed_files_are_downloaded_and_only_once(hub):
    model, tokenizer = GPT.from_pretrained("tiny/gpt2"), Tokenizer.load("tiny/gpt2")
    assert torch.equal(model.transformer.wte.weight, weights_of(hub.models["tiny/gpt2"].revisions["main"]))
    assert tokenizer.encode("the canary")
    assert hub.downloads() == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    hub.requests.clear()
    GPT.from_pretrained("tiny/gpt2")
    assert hub.requests == ["GET /api/models/tiny/gpt2/revision/main"], "the commit is asked for, no file"


def test_a_tokenizer_alone_needs_no_weights(hub):
    Tokenizer.load("tiny/gpt2")
    assert hub.downloads() == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_revisions(hub, capsys):
    main_, second = (weights_of(folder) for folder in hub.models["tiny/gpt2"].revisions.values())
    assert torch.equal(embedding("tiny/gpt2", revision="v2"), second) and not torch.equal(main_, second)
    assert torch.equal(embedding("tiny/gpt2@v2"), second)
    assert torch.equal(embedding(f"tiny/gpt2@{hub.models['tiny/gpt2'].commit('v2')[0]}"), second)
    assert torch.equal(embedding("tiny/gpt2"), main_)
    error = error_of(capsys, "tiny/gpt2@v3")
    assert f"tiny/gpt2@v3: got a model of {hub.url} without this revision" in error


def test_weights_in_shards(hub, tmp_path, tokenizer):
    model = make_model(tokenizer)
    folder = publish(tmp_path / "served" / "shards", model, tokenizer, max_shard_size="8KB")
    hub.models["tiny/shards"] = Repository({"main": folder})
    assert torch.equal(embedding("tiny/shards"), model.transformer.wte.weight)
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1 and {name for name in hub.downloads() if "safetensors" in name} == shards | {
        "model.safetensors.index.json"
    }


@pytest.mark.parametrize("count", [1, 2])
def test_pickles_where_there_is_no_safetensors(count, hub, tmp_path, tokenizer):
    """As many older models have them, in one file or in shards with an index."""
    model = make_model(tokenizer)
    folder = publish(tmp_path / "served" / "old", model, tokenizer, clutter=["tf_model.h5"])
    items = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    shards = [f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin" for i in range(count)]
    names = shards if count > 1 else ["pytorch_model.bin"]
    for i, name in enumerate(names):
        torch.save(dict(items[i::count]), folder / name)
    if count > 1:
        owners = {key: name for i, name in enumerate(names) for key, _ in items[i::count]}
        text = str({"weight_map": owners}).replace("'", '"')
        (folder / "pytorch_model.bin.index.json").write_text(text)
    hub.models["tiny/old"] = Repository({"main": folder})
    loaded = GPT.from_pretrained("tiny/old")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert {name for name in hub.downloads() if ".bin" in name} == {path.name for path in folder.glob("*.bin*")}


def test_a_cut_download_continues_where_it_stopped(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # the client keeps whole chunks
    file = hub.models["tiny/gpt2"].revisions["main"] / "model.safetensors"
    hub.cut["model.safetensors"] = 11_000
    assert torch.equal(embedding("tiny/gpt2"), weights_of(file.parent))
    ranges = [request.split()[-1] for request in hub.requests if request.startswith(f"GET /lfs{file}")]
    assert ranges == [f"/lfs{file}", "bytes=11000-"]


def test_the_cache_alone_is_enough_offline(hub, monkeypatch, capsys):
    expected = embedding("tiny/gpt2")
    Tokenizer.load("tiny/gpt2@v2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(embedding("tiny/gpt2"), expected) and Tokenizer.load("tiny/gpt2")
    assert not hub.requests
    for source in ("tiny/gpt2@v2", "tiny/other"):  # of the first only the tokenizer is in the cache
        error = error_of(capsys, source)
        assert f"{source}: got no such folder, and HF_HUB_OFFLINE is set while {constants.HF_HUB_CACHE} does" in error


def test_a_hub_that_is_away(hub, monkeypatch, capsys):
    expected = embedding("tiny/gpt2")
    set_endpoint(monkeypatch, "http://127.0.0.1:1")  # nothing listens there
    assert torch.equal(embedding("tiny/gpt2"), expected), "the cache is used as it is"
    error = error_of(capsys, "tiny/other")
    assert "tiny/other: got no such folder, and of http://127.0.0.1:1 ConnectError: " in error
    set_endpoint(monkeypatch, hub.url)
    hub.status = 503
    assert f"tiny/other: got no such folder, and of {hub.url} status 503, expected" in error_of(capsys, "tiny/other")


def test_a_name_that_is_neither_names_the_nearest_folder(hub, tmp_path, capsys):
    (tmp_path / "canary").mkdir()
    expected = f"canray: got no such folder, and {hub.url} has no such model, expected one of the two; "
    error = error_of(capsys, "canray")
    assert expected in error and error.endswith("; nearest here: canary\n")
    assert "no name that a model of the hub can have" in error_of(capsys, "a--b")


def test_private_and_gated_models_need_a_token(hub, monkeypatch, capsys):
    """Without one, the hub does not say that a private model exists; it says so of a gated one."""
    folders = hub.models["tiny/gpt2"].revisions
    hub.models["tiny/private"] = Repository(folders, token="right")
    hub.models["tiny/gated"] = Repository(folders, token="right", gated=True)
    for token in (None, "wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        assert "has no such model, expected one of the two; a private model needs a token: HF_TOKEN" in error_of(
            capsys, "tiny/private"
        )
        assert f"tiny/gated: got a gated model of {hub.url}, expected a token of an account" in error_of(
            capsys, "tiny/gated"
        )
    monkeypatch.setenv("HF_TOKEN", "right")
    for name in ("tiny/private", "tiny/gated"):
        assert torch.equal(embedding(name), weights_of(folders["main"]))


def test_a_full_disk_is_one_sentence(hub, monkeypatch, capsys):
    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode, **options: FullDisk(path, "wb")
                        if path.name.endswith(".incomplete") else opened(path, *mode, **options))  # fmt: skip
    error = error_of(capsys, "tiny/gpt2")
    assert f"got 'No space left on device' while its files were written to {constants.HF_HUB_CACHE}" in error


def test_gguf_files_of_the_hub_are_named_one_by_one(hub, tmp_path, capsys):
    folder = tmp_path / "served" / "gguf"
    folder.mkdir()
    for name in ("model-q4_0.gguf", "model-q8_0.gguf"):
        (folder / name).write_bytes(b"GGUF" + name.encode())
    hub.models["tiny/gguf"] = Repository({"main": folder})
    error = error_of(capsys, "tiny/gguf")
    names = "tiny/gguf/model-q4_0.gguf, tiny/gguf/model-q8_0.gguf"
    assert f"got GGUF files only, of which one is to be named ({names})" in error
    assert locate("tiny/gguf/model-q8_0.gguf", HubFiles(())).read_bytes() == b"GGUFmodel-q8_0.gguf"
    assert "without this file" in error_of(capsys, "tiny/gguf/model-q2_k.gguf")


def test_the_first_of_several_gguf_files_brings_the_others(hub, tmp_path):
    folder = tmp_path / "served" / "gguf"
    (folder / "q8").mkdir(parents=True)
    names = [f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for name in names:
        (folder / "q8" / name).write_bytes(name.encode())
    hub.models["tiny/gguf"] = Repository({"main": folder})
    first = locate(f"tiny/gguf/q8/{names[0]}", HubFiles(()))
    assert [first.with_name(name).read_bytes() for name in names] == [name.encode() for name in names]


def test_every_command_takes_a_name_of_the_hub(hub, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("the canary sings a song and more " * 200)
    assert main(["generate", "tiny/gpt2", "--prompt", "the", "--max-tokens", "3", "--temperature", "0"]) == 0
    assert main(["score", "tiny/gpt2@v2", "--continuation", "canary"]) == 0
    assert main(["quantize", "tiny/gpt2", "q8", "--bits", "8"]) == 0
    assert main(["prepare", str(text), "--tokenizer", "tiny/gpt2", "--out", "data"]) == 0


def test_a_training_run_begins_with_a_model_of_the_hub(hub, tmp_path):
    """The name stays as it is; the path of a folder becomes absolute."""
    settings = run_settings()
    (tmp_path / "folder").mkdir()
    values = {name: settings[name].read(value, is_text=True) for name, value in
              {"init": "tiny/gpt2@v2", "tokenizer": "tiny/gpt2", "text": "folder"}.items()}  # fmt: skip
    assert values == {"init": "tiny/gpt2@v2", "tokenizer": "tiny/gpt2", "text": (str(tmp_path / "folder"),)}
    assert settings["init"].read("folder", is_text=True) == str(tmp_path / "folder")
    config = RunConfig.of(values)
    tokenizer = source_tokenizer(config)
    model = initial_model(config, SimpleNamespace(vocab_size=tokenizer.vocab_size))
    assert torch.equal(model.transformer.wte.weight, weights_of(hub.models["tiny/gpt2"].revisions["v2"]))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_shown_on_a_terminal_only(is_terminal, hub, tmp_path):
    """A process of its own, which reads the settings of the client from its environment."""
    code = "from peakgpt.engine.data.hub import *; print(download(HubModel('tiny/gpt2'), HubFiles(('*.safetensors',))))"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True,
                               stderr=child if is_terminal else subprocess.PIPE)  # fmt: skip
    os.close(child)
    out, err = process.communicate(timeout=120)
    shown = os.read(parent, 1 << 16).decode() if is_terminal else err
    os.close(parent)
    assert process.returncode == 0 and Path(out.strip(), "model.safetensors").is_file()
    assert Path(out.strip()).is_relative_to(tmp_path / "home") and ("100%" in shown) == is_terminal, shown
    assert is_terminal or shown == ""
    shutil.rmtree(tmp_path / "home")
