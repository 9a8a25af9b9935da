"""Run folders: one writer, exclusive creation, nothing of others deleted, logs cut back, staging folders swept."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.stop_signals import STOPPING, stop_on_signals
from peakgpt.kernels.files import STAGE, staging_folder
from peakgpt.kernels.strict_json import dumps

DIE_WHILE_PREPARING = """
import os, sys
from peakgpt.engine.training.run_folder import RunFolder
with RunFolder(sys.argv[1]).discarded_on_bad_input(): os._exit(9)
"""


DIE_WHILE_MOVING = """
import os, sys
from peakgpt.engine.training.run_folder import RunFolder
left, rename = int(sys.argv[2]), os.rename
def dying_rename(source, target):
    global left
    if left == 0: os._exit(9)
    left -= 1
    rename(source, target)
with RunFolder(sys.argv[1]) as run, run.discarded_on_bad_input():
    (run.root / "config.toml").write_text("x")
    (run.root / "tokens").mkdir()
    (run.root / "tokens" / "train.json").write_text("x")
    os.rename = dying_rename
"""


def entries(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("at", ["runs/other/weights", "runs/bad/notes", "runs/bad/tokens/mine", "other"])
@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_bad_input_deletes_only_what_this_process_made(tmp_path, at, error):
    """Regression: the topmost new folder was deleted with the runs that others had put there meanwhile."""
    run = RunFolder(tmp_path / "runs" / "bad")
    with pytest.raises(error), run.discarded_on_bad_input():
        (run.tokens).mkdir()
        (run.tokens / "train.json").write_text("{}")
        file = tmp_path / at
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("of another process")
        raise error("bad input")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / at]


def test_bad_input_leaves_no_folder(tmp_path):
    run = RunFolder(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="bad"), run.discarded_on_bad_input():
        raise ValueError("bad")
    assert entries(tmp_path) == []


def test_one_of_several_starts_gets_the_folder(tmp_path):
    for number in range(20):
        start, children = time.time() + 0.01, []
        for _ in range(3):
            if not (child := os.fork()):
                while time.time() < start:
                    pass
                try:
                    RunFolder(tmp_path / str(number))
                    os._exit(0)
                except ValueError:
                    os._exit(1)
            children.append(child)
        assert sorted(os.waitpid(child, 0)[1] for child in children)[:2] == [0, 256]


def test_default_names_of_one_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    runs = [RunFolder.with_default_name("train") for _ in range(3)]
    assert [run.path.name for run in runs] == ["train-now", "train-now-2", "train-now-3"]


def test_a_running_process_locks_its_folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    for opened in (RunFolder, RunFolder.reopen):
        with pytest.raises(ValueError, match=r"run folder .*: (a running process|got a folder with files)"):
            opened(tmp_path / "run")
    run.close()
    RunFolder.reopen(tmp_path / "run").close()


def test_a_run_that_was_killed_while_it_was_prepared_is_started_again(tmp_path):
    path = tmp_path / "run"
    assert subprocess.run([sys.executable, "-c", DIE_WHILE_PREPARING, path]).returncode == 9
    assert len(entries(path)) == 2
    with RunFolder(path) as run, run.discarded_on_bad_input():
        (run.root / "config.toml").write_text("{}")
    assert entries(path) == ["config.toml", "manifest.json", "metrics.jsonl"]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_run_that_was_killed_while_its_files_were_moved_is_started_again(moved, tmp_path):
    """Regression: the moved files counted as those of another run."""
    path = tmp_path / "run"
    assert subprocess.run([sys.executable, "-c", DIE_WHILE_MOVING, path, str(moved)]).returncode == 9
    assert len([entry for entry in path.iterdir() if not entry.name.startswith(".incoming")]) == 1 + moved
    with pytest.raises(ValueError, match=r"got no manifest\.json, expected one; .* started again with --out"):
        RunFolder.reopen(path)
    with RunFolder(path) as run, run.discarded_on_bad_input():
        (run.root / "config.toml").write_text("again")
    assert entries(path) == ["config.toml", "manifest.json", "metrics.jsonl"]


@pytest.mark.parametrize("tail", [b"", b'{"step": 7, "lo', b'{"step": 6, "loss": 1}\n{"step": 5'])
@pytest.mark.parametrize("saved", [0, 3, 5])
def test_metrics_are_cut_back_to_the_mark_of_a_checkpoint(tmp_path, saved, tail):
    run = RunFolder(tmp_path / "run")
    marks = [run.metrics.mark()]
    for step in range(1, 6):
        run.log(step=step, loss=float("nan"))
        run.log(step=step, validation_loss=1.0)
        marks.append(run.metrics.mark())
    run.close()
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    with RunFolder.reopen(run.path) as again:
        again.metrics.cut(marks[saved]["bytes"])
        assert again.metrics.mark() == marks[saved]
        again.log(step=saved + 1)
        assert [row["step"] for row in again.rows()] == [s for s in range(1, saved + 1) for _ in (0, 1)] + [saved + 1]


def test_only_staging_folders_of_dead_processes_are_swept(tmp_path):
    kept = [".incoming-notes", ".incoming-abcdefg", ".incoming-ABCDEFGH", "incoming-abcdefgh"]
    for name in (*kept, ".incoming-abcdefgh", ".incoming-12_45678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".incoming-a_file__").write_text("a file")
    (tmp_path / ".incoming-a_link__").symlink_to(tmp_path / "incoming-abcdefgh")
    with staging_folder(tmp_path) as live, staging_folder(tmp_path) as second:
        assert STAGE.fullmatch(live.name) and live.is_dir() and second.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*kept, ".incoming-a_file__", ".incoming-a_link__"]
    )
    assert (tmp_path / "incoming-abcdefgh" / "file").exists()


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_asks_and_the_second_acts(number):
    hits = []
    before = signal.signal(number, lambda *_: hits.append(1))
    try:
        with stop_on_signals() as stop:
            assert not stop() and stop.exit_code == 0
            os.kill(os.getpid(), number)
            assert stop() and stop.exit_code == 128 + number and not hits
            os.kill(os.getpid(), number)
        assert hits == [1]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), [1.0, -float("inf")], {"a": {"b": (float("nan"),)}}, 1.5]
)
def test_json_has_no_number_that_is_not_finite(value):
    def refuse(name):
        raise AssertionError(name)

    for indent in (None, 1):
        json.loads(dumps({"value": value}, indent=indent), parse_constant=refuse)
