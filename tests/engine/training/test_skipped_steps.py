"""Updates whose numbers are not finite: skipped, named with their batch, and after ten in a row the end of the run."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from tiny_run import new_run
from wrong_losses import OneStepLate, make_loop

from peakgpt.cli import main
from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.run_layout import saved_steps
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.training import loop as module
from peakgpt.engine.training.checkpoint_manager import CheckpointManager
from peakgpt.engine.training.loop import SaveDue, StepMetrics
from peakgpt.engine.training.skipped_steps import MAX_IN_A_ROW, Diverged, SkippedStep

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = float("nan")


@pytest.fixture(params=["at once", "one step late"])
def arrival(request, monkeypatch):
    if request.param == "one step late":
        monkeypatch.setattr(module, "DelayedMetrics", OneStepLate)


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path / "run")


def weights(loop):
    return {name: tensor.clone() for name, tensor in loop.trainer.model.state_dict().items()}


@pytest.mark.usefixtures("arrival")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_that_is_not_finite_changes_no_weight_and_is_named_with_its_batch(run, dtype):
    loop, shards = make_loop(run.tokens, {3: NAN}, dtype=dtype)[0], TokenShards.open(run.tokens, "train")
    states, events = [weights(loop)], []

    def remember():
        if loop.trainer.steps_done == len(states):
            states.append(weights(loop))
        return False

    for event in loop.run(save_every=4, should_stop=remember):
        events.append(event)
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(states)]
    assert [step for step, is_same in enumerate(same, 1) if is_same] == [4]
    (skipped,) = [event for event in events if isinstance(event, SkippedStep)]
    fourth = [ids for ids, _ in itertools.islice(Batches(shards, 4, 16, 1337), 4)][-1]
    for begin, ids in zip(re.findall(r"\d+", skipped.batch.rpartition("each of ")[2]), fourth, strict=True):
        row = np.empty(16, np.int64)
        shards.read(int(begin), row)
        assert row.tolist() == ids.tolist()
    assert skipped.row()["step"] == 4 and skipped.row()["skipped"] == "the loss is nan"
    assert [event.step for event in events if isinstance(event, StepMetrics)] == [1, 2, 3, *range(5, 21)]
    assert [event.step for event in events if isinstance(event, SaveDue)] == [8, 12, 16, 20], "not at step 4"


@pytest.mark.usefixtures("arrival")
def test_ten_steps_in_a_row_end_the_run_and_keep_the_last_good_state(run):
    """Regression: a learning rate of 1e30 wrote a checkpoint of NaN, with exit code 0."""
    loop, seen = make_loop(run.tokens, dict.fromkeys(range(7, 60), NAN))
    with run, CheckpointManager(run, loop) as checkpoints:
        with pytest.raises(Diverged, match=r"step 17: the last 10 updates were skipped"):
            for event in loop.run(save_every=5):
                if isinstance(event, SaveDue):
                    checkpoints.save()
                else:
                    run.log(**event.row())
        rows = run.rows()
    assert [row["step"] for row in rows if "skipped" in row] == list(range(8, 8 + MAX_IN_A_ROW))
    assert saved_steps(run.path) == [5] and len(seen) <= 18


def test_nine_steps_in_a_row_do_not_end_the_run(run):
    loop, _ = make_loop(run.tokens, dict.fromkeys((*range(2, 11), *range(12, 15)), NAN))
    assert sum(isinstance(event, SkippedStep) for event in loop.run()) == 12 and loop.finished


@pytest.mark.usefixtures("arrival")
def test_a_run_whose_last_step_is_skipped_is_not_saved_as_finished(run):
    loop, events = make_loop(run.tokens, {19: NAN})[0], []
    with pytest.raises(Diverged, match="step 20: the last 1 updates were skipped"):
        for event in loop.run(save_every=5):
            events.append(event)
    assert [event.step for event in events if isinstance(event, SaveDue)] == [5, 10, 15]


def test_a_run_that_is_stopped_after_a_skipped_step_is_not_saved_there(run):
    loop, _ = make_loop(run.tokens, {6: NAN})
    events = list(loop.run(save_every=5, should_stop=lambda: loop.trainer.steps_done == 7))
    assert [event.step for event in events if isinstance(event, SaveDue)] == [5] and not loop.finished


def test_a_learning_rate_of_1e9_exits_with_code_3_and_saves_no_model(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("\n".join(f"line {i * i} of a text that is long enough" for i in range(400)))
    command = ["train", "--text", str(text), "--vocab", "300", "--lr", "1e9", "--warmup", "0", "--batch", "2",
               "--tokens", "16", "--steps", "40", "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    assert main([*command, "--save-every", "3", "--out", str(out)]) == 3
    assert "the last 10 updates were skipped" in capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum("skipped" in row for row in rows) == MAX_IN_A_ROW and saved_steps(out) == []
