"""TensorBoard and Weights & Biases get the rows of metrics.jsonl, and a resumed run has no step twice."""

import importlib.util
import json
import time

import pytest

from peakgpt.engine.training import metric_sinks
from peakgpt.engine.training.metric_sinks import numbers, open_sinks, require_packages
from peakgpt.engine.training.validation_config import MetricsConfig

CHECKPOINT, KILLED_AT, END = 4, 7, 9  # steps


def log(config, folder, steps, *, steps_done=0, close=True):
    (sink,) = open_sinks(config, folder, {"lr": 1e-3}, steps_done=steps_done)
    for step in steps:
        sink.log({"contender": "peakgpt", "step": step, "loss": 5.0 - step, "mfu": 0.1, "skipped": "text"})
        if step % 2 == 0:
            sink.log({"step": step, "validation_loss": 6.0 - step, "wiki/validation_loss": 1.0, "is_best": True})
    if close:
        sink.close()
    return sink


def test_numbers_of_a_row_are_curves():
    row = {"step": 3, "contender": "peakgpt", "loss": 1.5, "is_best": True, "samples": [], "tokens": 7}
    assert numbers(row) == {"loss": 1.5, "tokens": 7}


def test_tensorboard_hides_the_steps_that_a_killed_run_made_after_its_checkpoint(tmp_path):
    """Fails without purge_step: steps 5 to 7 are there twice."""
    pytest.importorskip("tensorboard", reason="the packages of peakgpt[tensorboard] are not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = MetricsConfig(enable_tensorboard=True)
    log(config, tmp_path, range(1, KILLED_AT + 1))
    log(config, tmp_path, range(CHECKPOINT + 1, END + 1), steps_done=CHECKPOINT)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(step, 5.0 - step) for step in range(1, END + 1)]
    assert [e.step for e in events.Scalars("validation_loss")] == [2, 4, 6, 8]
    assert [e.step for e in events.Scalars("wiki/validation_loss")] == [2, 4, 6, 8]
    assert "is_best" not in events.Tags()["scalars"] and "skipped" not in events.Tags()["scalars"]


def records(path):
    """Yield the bytes of each record of a .wandb file: a LevelDB log in blocks of 32 KiB after a header of 7 bytes."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def history(folder):
    """Yield (run id, step, loss) of all offline runs in a folder."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                      for item in record.history.item}  # fmt: skip
            if "loss" in values:
                yield path.stem.removeprefix("run-"), values["_step"], values["loss"]


def test_wandb_offline_has_one_run_with_each_step_once(tmp_path, monkeypatch):
    """Fails if a resumed run gets an id of its own, or logs steps that were logged before the kill."""
    pytest.importorskip("wandb", reason="the packages of peakgpt[wandb] are not installed")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_CONFIG_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    config = MetricsConfig(enable_wandb=True, wandb_project="tests")
    log(config, tmp_path, range(1, KILLED_AT + 1))
    time.sleep(1.1)  # the folder of a process is named after the second in which it starts
    log(config, tmp_path, range(CHECKPOINT + 1, END + 1), steps_done=CHECKPOINT)
    deadline = time.monotonic() + 30  # wandb's service may still write when `finish` has returned
    while len(found := list(history(tmp_path))) < END and time.monotonic() < deadline:
        time.sleep(0.2)
    assert sorted((step, loss) for _, step, loss in found) == [(step, 5.0 - step) for step in range(1, END + 1)]
    assert len({run for run, _, _ in found}) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_the_run(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(metric_sinks.importlib.util, "find_spec", lambda n: None if n == name else find(n))
    require_packages(MetricsConfig())
    with pytest.raises(ValueError, match=rf"--enable-{name}: .* pip install 'peakgpt\[{name}\]'"):
        require_packages(MetricsConfig(**{f"enable_{name}": True}))


def test_an_option_that_would_be_ignored_is_refused():
    with pytest.raises(ValueError, match="wandb_project is 'mine' without enable_wandb"):
        MetricsConfig(wandb_project="mine")
    for text in ("5", "3:2", "0:1", "a:b", "1:2:3"):
        with pytest.raises(ValueError, match=f"profile is '{text}', expected START:END"):
            MetricsConfig(profile=text)
