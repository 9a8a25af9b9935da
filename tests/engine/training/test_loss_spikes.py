"""Loss spikes: what one is, the way back to a checkpoint, the data that are left out, and resuming to the bit."""

import itertools

import pytest
from tiny_run import new_run
from wrong_losses import OneStepLate, make_loop

from peakgpt.engine.data.run_layout import saved_steps
from peakgpt.engine.training import loop as module
from peakgpt.engine.training.checkpoint_manager import CheckpointManager
from peakgpt.engine.training.loop import SaveDue
from peakgpt.engine.training.loss_spikes import LossSpike, SpikeDetector
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.skipped_steps import Diverged
from peakgpt.engine.training.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SPIKES = {"spike_sigma": 50.0, "spike_window": 4, "spike_rollback": 3, "spike_skip": 2}
ONE, TWO = {12: 1000.0}, {12: 1000.0, 17: 1000.0}  # batches with a spike


class Killed(Exception):
    """The process ends here."""


def train(run, wrong, *, kill_after=None, **settings):
    """Train to the end, or until so many updates; return the batches seen."""
    loop, seen = make_loop(run.tokens, wrong, **{**SPIKES, **settings})

    def should_stop():
        if kill_after is not None and len(seen) == kill_after:
            raise Killed
        return False

    with run, CheckpointManager(run, loop) as checkpoints:
        checkpoints.load()
        for event in loop.run(save_every=5, should_stop=should_stop):
            if isinstance(event, SaveDue):
                checkpoints.save()
                continue
            if isinstance(event, LossSpike):
                event = checkpoints.roll_back(event) or event
            run.log(**event.row())
    return seen


def rows(run):
    return [{k: v for k, v in row.items() if k not in ("elapsed_s", "tokens_per_s")} for row in run.rows()]


def test_a_spike_is_above_mean_and_deviation_of_the_last_losses():
    detector = SpikeDetector(TrainConfig(spike_sigma=2.0, spike_window=4))
    assert [detector.check(step, loss) for step, loss in enumerate([1.0, 3.0, 1.0, 3.0, 4.0])] == [None] * 5
    # The last four are 3, 1, 3, 4: mean 2.75, deviation sqrt(1.1875).
    spike = detector.check(5, 5.0)
    assert spike.threshold == pytest.approx(2.75 + 2 * 1.1875**0.5) and (spike.step, spike.loss) == (5, 5.0)
    other = SpikeDetector(TrainConfig(spike_sigma=2.0, spike_window=4))
    other.load_state_dict(detector.state_dict())
    assert list(other.losses) == [1.0, 3.0, 4.0, 5.0] and other.losses.maxlen == 4


def test_a_spike_goes_back_and_leaves_its_data_out_once(tmp_path):
    """Mutation that makes it fail: skip the batches twice, or let the position in the data go back too."""
    run = new_run(tmp_path / "run")
    # Batches 10 to 12 led to the spike of step 13, 13 and 14 are left out after it.
    assert train(run, ONE) == [*range(13), *range(15, 25)]
    (back,) = [row for row in rows(run) if "spike_loss" in row]
    assert (back["step"], back["spike_step"], back["skipped_batches"]) == (10, 13, 2)
    assert [row["step"] for row in rows(run)] == [*range(1, 11), 10, *range(11, 21)]
    assert saved_steps(run.path)[-1] == 20


def test_a_second_spike_after_the_same_checkpoint_meets_other_data(tmp_path):
    run = new_run(tmp_path / "run")
    assert train(run, TWO) == [*range(13), 15, 16, 17, *range(20, 30)]
    assert [row["step"] for row in rows(run)] == [*range(1, 11), 10, *range(11, 21)], "the second one is in the log"


@pytest.mark.parametrize(
    ("wrong", "optimizer"), [(ONE, "adamw"), (TWO, "adamw"), (ONE, "muon")], ids=["one spike", "two spikes", "muon"]
)
def test_a_run_that_is_killed_around_a_spike_has_the_rows_of_one_that_was_not(tmp_path, wrong, optimizer):
    """Mutation that makes it fail: keep the checkpoints after the one that was loaded."""
    whole = new_run(tmp_path / "whole")
    updates = len(train(whole, wrong, optimizer=optimizer))
    for kill_after in (12, 13, 14, 16, 18, updates - 3):
        killed = new_run(tmp_path / f"killed{kill_after}")
        with pytest.raises(Killed):
            train(killed, wrong, kill_after=kill_after, optimizer=optimizer)
        train(RunFolder.reopen(killed.path), wrong, optimizer=optimizer)
        assert rows(killed) == rows(whole)


def test_a_training_that_spikes_for_ever_ends(tmp_path):
    run = new_run(tmp_path / "run")
    with pytest.raises(Diverged, match="gone back to step 10 10 times after loss spikes"):
        train(run, dict.fromkeys(range(12, 60, 3), 1000.0), spike_skip=0)


def test_checkpoints_that_lead_to_the_spike_are_deleted(tmp_path):
    run = new_run(tmp_path / "run")
    with pytest.raises(Killed):
        train(run, ONE, kill_after=14, spike_rollback=4)  # the checkpoint of step 10 is too near
    assert saved_steps(run.path) == [5]


def test_metrics_that_arrive_late_skip_no_batch_twice(tmp_path, monkeypatch):
    """On CUDA the step after the spike has already run; its batch is left out too, and its numbers are dropped."""
    monkeypatch.setattr(module, "DelayedMetrics", OneStepLate)
    run = new_run(tmp_path / "run")
    seen = train(run, ONE)
    assert seen == [*range(14), *range(16, 26)] and len(set(seen)) == len(seen)
    assert [row["step"] for row in rows(run)] == [*range(1, 11), 10, *range(11, 21)]


def test_without_an_early_enough_checkpoint_the_training_goes_on(tmp_path):
    run = new_run(tmp_path / "run")
    assert train(run, ONE, spike_rollback=12) == list(range(20))
    spikes = [row for row in rows(run) if "spike_loss" in row]
    assert [row["step"] for row in spikes] == [13] and "skipped_batches" not in spikes[0]
    assert all(a["step"] <= b["step"] for a, b in itertools.pairwise(rows(run)))
