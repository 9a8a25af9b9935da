"""Run folders: every flipped bit is found and named; a checkpoint appears whole, after all of it is on the disk."""

import os
import random
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_run import make_loop, new_run, train

from peakgpt.cli import main
from peakgpt.engine.checkpoint.run_checkpoints import run_faults, write_checkpoint
from peakgpt.engine.data.run_layout import saved_steps, step_folder
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = new_run(tmp_path_factory.mktemp("trained") / "run")
    tokenizer = train_tokenizer(["the cat sat on the mat "] * 9, 270)
    train(run, make_loop(run.tokens, steps=10), validate_every=3, tokenizer=tokenizer)
    return run.path


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def tensor_at(path, place):
    """Return the name of the tensor that a byte of a safetensors file belongs to; None in the header."""
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with safe_open(path, "pt") as file:
        end = header
        for name in file.offset_keys():
            end += file.get_tensor(name).nbytes
            if header <= place < end:
                return name
    return None


def flip(path, place, bit):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_one_flipped_bit_anywhere_is_found_and_named(run):
    """Seen to fail: no digest of one file; a manifest that is parsed, so that "E" may replace "e"; rows not checked."""
    draw = random.Random(0)
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    names = {"config.toml", "metrics.jsonl", "manifest.json", "train.json", "tokenizer.json"}
    assert {path.name for path in files} > names | {"model.safetensors", "training_state.safetensors"}
    assert list(run_faults(run)) == []
    for path in files:
        size = path.stat().st_size
        for place in {0, 7, size - 1, *(draw.randrange(size) for _ in range(12))}:
            bit = draw.randrange(8)
            tensor = tensor_at(path, place) if path.suffix == ".safetensors" else None
            flip(path, place, bit)
            found = list(run_faults(run))
            assert found and all("\n" not in fault for fault in found), (path, place, bit)
            assert any(fault.startswith(str(path)) and (tensor or "") in fault for fault in found), (path, place, found)
            flip(path, place, bit)
    assert list(run_faults(run)) == []


@pytest.mark.parametrize("kind", ["cut", "longer", "missing", "renamed"])
def test_a_file_of_another_size_or_name_is_found(kind, run):
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    for path in files:
        data = path.read_bytes()
        path.unlink()
        if kind != "missing":
            changed = {"cut": data[:-1], "longer": data + b"\0", "renamed": data}[kind]
            path.with_name(path.name + "x" * (kind == "renamed")).write_bytes(changed)
        found = list(run_faults(run))
        # Rows after the last checkpoint are cut off when the run is resumed.
        assert any(str(path) in fault or path.name == "manifest.json" for fault in found) or (
            kind == "longer" and path.name == "metrics.jsonl"
        ), path
        path.with_name(path.name + "x").unlink(missing_ok=True)
        path.write_bytes(data)


def test_verify_has_the_exit_code_of_a_check(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert "every file is as it was written; checkpoints of steps: 5, 10" in capsys.readouterr().out
    flip(step_folder(run, 5) / "model.safetensors", -9, 0)
    assert main(["verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "step-00000005/model.safetensors: transformer.wte.weight has digest" in lines[0] and len(lines) == 2
    assert main(["verify", str(run / "tokens")]) == 2
    assert "got no run in it" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.toml", "tokens/train.json", "manifest.json"])
def test_a_run_with_a_damaged_file_is_not_resumed(file, run):
    flip(run / file, 3, 0)
    with pytest.raises(ValueError, match=f"{file}.*damaged|{file}: .*expected"):
        RunFolder.reopen(run)
    flip(run / file, 3, 0)
    RunFolder.reopen(run).close()


def recorded_calls(monkeypatch, metrics):
    """Record which files have unflushed data when a folder is moved to its final name, metrics.jsonl among them."""
    written, moves = {str(metrics)}, []
    fsync, rename = os.fsync, os.rename

    def note_fsync(handle):
        fsync(handle)
        written.discard(os.readlink(f"/proc/self/fd/{handle}"))

    def note_rename(source, target):
        if ".incoming" in str(source) and ".incoming" not in str(target):
            below = {str(path) for path in [metrics, Path(source), *Path(source).rglob("*")]}
            moves.append(sorted(below & written))
        rename(source, target)
        written.add(str(Path(target).parent))

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    return written, moves


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the names of open files from /proc")
def test_a_checkpoint_gets_its_name_after_all_of_it_is_on_the_disk(run, monkeypatch):
    """Seen to fail: the move before the flush of the files, of the folder, or of metrics.jsonl."""
    written, moves = recorded_calls(monkeypatch, run / "metrics.jsonl")
    facts = {"best": None, "metrics": {"bytes": 0, "sha256": ""}}

    def fill(folder):
        (folder / "inside").mkdir()
        for path in (folder / "a", folder / "inside" / "b"):
            path.write_text("x")
        written.update(map(str, [*folder.rglob("*"), folder]))

    write_checkpoint(run, 11, fill, facts)
    assert moves == [[]] and not written
    assert saved_steps(run)[-1] == 11 and (step_folder(run, 11) / "inside" / "b").read_text() == "x"
    assert (step_folder(run, 11).stat().st_mode & 0o777) == (run.stat().st_mode & 0o777)
