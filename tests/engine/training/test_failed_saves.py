"""Saves that fail: a full disk at every call, files that may not grow, no memory. The older checkpoints stay."""

import builtins
import errno
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import checkpoint_bytes, make_loop, new_run, train

from peakgpt.engine.checkpoint.checkpoint_config import CheckpointConfig
from peakgpt.engine.checkpoint.run_checkpoints import run_faults
from peakgpt.engine.data.run_layout import saved_steps, step_folder
from peakgpt.engine.training import checkpoint_manager, snapshot
from peakgpt.engine.training.checkpoint_manager import CheckpointManager
from peakgpt.engine.training.loop import SaveDue
from peakgpt.engine.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread", "no_flush")

# Every call by which a save changes the disk. `open` counts if it writes.
CALLS = [(os, name) for name in ("open", "write", "fsync", "rename", "replace", "mkdir", "symlink")]
CALLS += [(builtins, "open"), (Path, "write_text")]
STEPS = 8
FULL = r"checkpoint of step 8 in \S+: No space left on device, expected to save it; the checkpoint of step 6 is kept"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 8 steps with checkpoints of steps 3, 6 and 8, stopped after step 6, and the whole run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, until in (("whole", None), ("stopped", 6)):
        run = new_run(folder / name)
        train(run, make_loop(run.tokens, steps=STEPS), save_every=3, until=until)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole / "stopped", tmp_path / "run")


def save_after_two_steps(path, started=lambda: None):
    """Resume, call `started` and save step 8. The checkpoint of step 6 is deleted, and `best` gets another target."""
    loop = make_loop(path / "tokens", steps=STEPS)
    config = CheckpointConfig(save_every=3, keep_last=1)
    with RunFolder.reopen(path) as run, CheckpointManager(run, loop, config=config) as checkpoints:
        assert checkpoints.load() == 6
        started()
        for event in loop.run(save_every=3):
            if isinstance(event, SaveDue):
                checkpoints.save(best=3)
            else:
                run.log(**event.row())


class FullDisk:
    """Counts the calls that change the disk, and fails the one with a given number as a full disk does."""

    def __init__(self, fail_at):
        self.count, self.fail_at = 0, fail_at

    def begin(self, monkeypatch):
        for module, name in CALLS:
            monkeypatch.setattr(module, name, self._wrapped(getattr(module, name), name))

    def _wrapped(self, call, name):
        def counted(*args, **options):
            flags = (*args, *options.values())[1] if name == "open" and len(args) + len(options) > 1 else "w"
            writes = flags & os.O_CREAT if isinstance(flags, int) else set(str(flags)) & set("wax")
            self.count += bool(writes)
            if writes and self.count == self.fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **options)

        return counted


def save_to(disk, path):
    with pytest.MonkeyPatch.context() as patch:
        save_after_two_steps(path, lambda: disk.begin(patch))


def expect_whole_run(path, whole):
    """Continue after the failure: the bits are those of a run without it."""
    assert list(run_faults(path)) == [] and saved_steps(path)
    train(run := RunFolder.reopen(path), make_loop(path / "tokens", steps=STEPS), save_every=3)
    assert checkpoint_bytes(step_folder(path, STEPS)) == checkpoint_bytes(step_folder(whole / "whole", STEPS))
    with RunFolder.reopen(whole / "whole") as expected:
        assert [row["loss"] for row in run.rows()] == [row["loss"] for row in expected.rows()]
    assert not list(path.rglob(".*"))


def test_a_full_disk_at_any_call_keeps_a_checkpoint_and_stops_the_run(whole, copy, tmp_path):
    """Seen to fail: old checkpoints deleted before the new one is complete; the error of the thread dropped."""
    disk = FullDisk(fail_at=0)
    save_to(disk, shutil.copytree(copy, tmp_path / "counted"))
    failed = 0
    for fail_at in range(1, disk.count + 1):
        path = shutil.copytree(copy, tmp_path / f"run-{fail_at}")
        try:
            save_to(FullDisk(fail_at), path)
        except OSError as error:
            assert re.fullmatch(FULL, str(error)), error
            failed += 1
        expect_whole_run(path, whole)
        shutil.rmtree(path)
    assert failed == disk.count - 1 > 30  # the folder checkpoints/ exists already


@pytest.mark.parametrize("limit", [300, 5_000, 40_000])
def test_files_that_may_not_grow_keep_the_older_checkpoint(limit, whole, copy):
    """The system writes a part of the data, then none, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (copy / "metrics.jsonl").write_bytes((whole / "stopped" / "metrics.jsonl").read_bytes())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"(checkpoint of step 8 in .*|metrics\.jsonl).*, expected"):
            save_after_two_steps(copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved_steps(copy) == [3, 6]
    expect_whole_run(copy, whole)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_copy_that_does_not_fit_into_memory_is_one_sentence(error, whole, copy, monkeypatch):
    real = torch.empty

    def empty(*args, **options):
        if "pin_memory" in options:  # a buffer of the snapshot
            raise error
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot.torch, "empty", empty)
        with pytest.raises(OSError, match=r"step 8 in .*does not fit into memory.*the checkpoint of step 6 is kept"):
            save_after_two_steps(copy)
    expect_whole_run(copy, whole)


@pytest.mark.parametrize("error", [MemoryError(), Exception("from Rust: No space left on device (os error 28)")])
def test_an_error_in_the_thread_stops_the_run_at_the_next_event(error, whole, copy, monkeypatch):
    def fail(*_):
        raise error

    loop = make_loop(copy / "tokens", steps=STEPS)
    with RunFolder.reopen(copy) as run, monkeypatch.context() as patch:
        patch.setattr(checkpoint_manager, "write_training_state", fail)
        checkpoints = CheckpointManager(run, loop)
        checkpoints.load()
        with pytest.raises(OSError, match=r"checkpoint of step 7 .*(MemoryError|error 28).*step 6 is kept") as caught:
            for _ in loop.run():
                checkpoints.save()
                checkpoints._thread.join()
                checkpoints.check()
        assert "\n" not in str(caught.value) and loop.trainer.steps_done == 7
    expect_whole_run(copy, whole)


def test_the_error_of_a_save_does_not_hide_another_error(copy, monkeypatch):
    monkeypatch.setattr(checkpoint_manager, "write_training_state", lambda *_: torch.tensor(1).item("x"))
    loop = make_loop(copy / "tokens", steps=STEPS)
    with (
        pytest.warns(UserWarning, match="checkpoint of step 7"),
        pytest.raises(KeyError, match="mine"),
        RunFolder.reopen(copy) as run,
        CheckpointManager(run, loop) as checkpoints,
    ):
        checkpoints.load()
        list(loop.run(1))
        checkpoints.save()
        raise KeyError("mine")
