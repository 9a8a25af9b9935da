"""Time budgets and progress of long commands, on a clock of the test."""

import io
import itertools
import sys
from types import SimpleNamespace

import pytest

from peakgpt.cli import COMMANDS, HEARTBEATS
from peakgpt.commands.quickstart import ENDS
from peakgpt.engine.training.schedule import Schedule
from peakgpt.engine.training.time_limit import TimeLimit
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.heartbeat import INTERVAL_S, Heartbeat, enter_phase, heartbeat
from peakgpt.quickstart_session import COMPARISON_SHARE, ROUNDS, Plan
from peakgpt.time_budget import TimeBudget


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Stream(io.StringIO):
    """Counts what a reader of the pipe has seen."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


@pytest.mark.parametrize("pause_s", [0.5, 3.0, 7.0, 9.0, 500.0])
def test_a_silent_command_writes_a_line_every_10_seconds(pause_s):
    """The command writes each `pause_s`; the thread beats each second. Fails if a line is not flushed."""
    clock, stream = Clock(), Stream()
    watched = Heartbeat(stream, "a phase", clock)
    written_s, seen, silent_s = 0.0, "", 0.0
    for second in range(1000):
        if second - written_s >= pause_s:
            watched.write("result\n")
            written_s = second
        clock.now_s += 1.0
        watched.beat()
        silent_s = 0.0 if stream.seen != seen else silent_s + 1.0
        seen = stream.seen
        assert silent_s < 10.0
    assert ("a phase: 8 s\n" in stream.seen) == (pause_s > INTERVAL_S)


def test_a_heartbeat_is_a_stream_and_ends_with_its_command(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(KeyError), heartbeat("stdout", "one"):
        enter_phase("two")
        print("text", end="")
        assert sys.stdout.getvalue() == "text" and sys.stdout is not stream
        print()
        assert stream.seen == "text\n"
        sys.stdout._clock = lambda: 1e9
        sys.stdout.beat()
        assert stream.seen.startswith("text\ntwo: ")
        kept = sys.stdout
        raise KeyError
    kept.close()  # regression: absl's log handler closed standard error at the end of a command
    assert sys.stdout is stream and not stream.closed
    enter_phase("three")  # without effect


def test_commands_with_a_heartbeat_exist():
    assert set(HEARTBEATS) <= set(COMMANDS) and "generate" not in HEARTBEATS, "it streams text itself"


@pytest.mark.parametrize("slowness", [0.1, 1.0, 3.0, 30.0])
def test_a_phase_takes_items_within_its_share_and_leaves_the_rest(slowness):
    clock = Clock()
    budget = TimeBudget(300.0, ENDS, clock)
    taken = 0
    for _ in budget.take("tokenizer", range(1000)):
        clock.now_s += slowness
        taken += 1
    assert taken == 1000 if slowness == 0.1 and taken * slowness < 30 else taken * slowness <= 30.0 + slowness
    left_s = budget.left_s("training")
    assert left_s == pytest.approx(ENDS["training"] * 300 - taken * slowness)
    clock.now_s += 1000
    assert budget.left_s("training") == 0.0


@pytest.mark.parametrize("slower", [0.25, 0.5, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("at", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("reserve_s", [0.0, 10.0])
def test_training_ends_in_time_when_the_machine_changes_its_speed(slower, at, reserve_s):
    """Another process takes a core, or leaves one, after a part of the time. Fails if the plan is kept."""
    clock, step_s, budget_s = Clock(), 0.1, 100.0
    trainer, start_s = SimpleNamespace(steps=1, steps_done=0), clock()
    limit = TimeLimit(budget_s, reserve_s=lambda: reserve_s, clock=clock)
    limit.plan(trainer)
    plans = []
    while trainer.steps_done < trainer.steps:
        seconds = step_s * (slower if clock() - start_s >= at * budget_s else 1.0)
        clock.now_s += seconds
        trainer.steps_done += 1
        limit.observe(seconds)
        limit.plan(trainer)
        plans.append(trainer.steps)
    left_s = start_s + budget_s - reserve_s - clock()
    assert -step_s * slower <= left_s <= 2 * step_s * max(slower, 1.0), "in time, and no time is left over"
    assert trainer.steps_done == trainer.steps and plans[-1] == plans[-2], "the schedule ends at zero"


def test_the_learning_rate_of_a_run_with_a_time_limit_falls_to_zero_without_a_jump_up():
    """The machine is 4 x slower from half of the time on. Fails if the schedule does not follow the plan."""
    clock, trainer = Clock(), SimpleNamespace(steps=1, steps_done=0)
    schedule, limit, rates, seconds = Schedule(TrainConfig()), TimeLimit(100.0, clock=clock), [], 0.1
    while True:
        limit.plan(trainer)
        if trainer.steps_done >= trainer.steps:
            break
        rates.append(schedule.lr(trainer.steps_done, trainer.steps))
        seconds = 0.1 if clock() < 150.0 else 0.4
        clock.now_s += seconds
        limit.observe(seconds)
        trainer.steps_done += 1
    decay = rates[100:]
    assert all(after <= before * 1.01 for before, after in itertools.pairwise(decay))
    assert rates[-1] < 0.02 * max(rates)


def test_one_slow_step_changes_the_plan_little_while_much_time_is_left():
    """Fails if the last few steps alone are the speed: the learning rate would jump down and up."""
    clock, trainer = Clock(), SimpleNamespace(steps=1, steps_done=0)
    limit, plans = TimeLimit(1000.0, clock=clock), []
    for step in range(1, 600):
        seconds = 1.0 if step == 400 else 0.1
        clock.now_s += seconds
        limit.observe(seconds)
        trainer.steps_done = step
        limit.plan(trainer)
        plans.append(trainer.steps)
    assert max(plans[300:]) - min(plans[300:]) < 0.05 * min(plans[300:])


def test_a_slow_first_step_or_one_slow_step_does_not_end_a_run():
    """The reserve is 400 steps long. Fails if it is computed from the last step alone, and without the cap."""
    clock, trainer = Clock(), SimpleNamespace(steps=1, steps_done=0)
    limit = TimeLimit(30.0, reserve_s=lambda: 400 * limit.typical_step_s, clock=clock)
    while trainer.steps_done < trainer.steps:
        seconds = 1.0 if trainer.steps_done in (0, 5) else 0.01
        clock.now_s += seconds
        trainer.steps_done += 1
        limit.observe(seconds)
        limit.plan(trainer)
    assert limit.left_s == pytest.approx(4.0, abs=0.5)


@pytest.mark.parametrize("first_s", [1.0, 25.0, 39.0])
def test_a_first_step_that_compiles_does_not_end_a_run(first_s):
    """Also if it takes most of the time; the steps after it are quick. Fails if the first step is the speed."""
    clock, trainer = Clock(), SimpleNamespace(steps=1, steps_done=0)
    limit, plans = TimeLimit(60.0, reserve_s=lambda: 20 * limit.typical_step_s, clock=clock), []
    while trainer.steps_done < trainer.steps:
        seconds = 0.1 if trainer.steps_done else first_s
        clock.now_s += seconds
        trainer.steps_done += 1
        limit.observe(seconds)
        limit.plan(trainer)
        plans.append(trainer.steps)
    assert limit.left_s == pytest.approx(2.0, abs=0.2)
    assert max(plans[2:]) - min(plans[2:]) <= 2, "the plan holds from the second step on"


def test_steps_that_are_all_slow_exceed_the_time_by_half_a_step_at_most():
    for first_s in (39.0, 45.0, 59.0):
        clock, trainer = Clock(), SimpleNamespace(steps=1, steps_done=0)
        limit = TimeLimit(60.0, clock=clock)
        while trainer.steps_done < trainer.steps:
            clock.now_s += first_s
            trainer.steps_done += 1
            limit.observe(first_s)
            limit.plan(trainer)
        assert limit.left_s >= -first_s / 2 and trainer.steps_done <= 2


def test_a_time_limit_makes_one_step_and_never_more_than_the_maximum():
    clock, trainer = Clock(), SimpleNamespace(steps=1, steps_done=0)
    limit = TimeLimit(-5.0, clock=clock)
    limit.plan(trainer)
    assert trainer.steps >= 1
    limit.observe(1.0)
    trainer.steps_done = 1
    limit.plan(trainer)
    assert trainer.steps == 1
    limit = TimeLimit(1e6, max_steps=20, clock=clock)
    limit.plan(trainer)
    limit.observe(1.0)
    limit.plan(trainer)
    assert trainer.steps == 20


@pytest.mark.parametrize("step_s", [0.001, 0.1, 3.0, 100.0])
@pytest.mark.parametrize("budget_s", [20.0, 250.0])
def test_the_comparison_with_eager_takes_its_share_of_the_budget(step_s, budget_s):
    """Fails if turns have a fixed number of steps: on a slow machine they took several budgets."""
    plan = Plan.of(budget_s, step_s, 2 * step_s)
    comparison_s = plan.rounds * plan.stretch * 3 * step_s
    assert comparison_s <= max(COMPARISON_SHARE * budget_s, ROUNDS * 3 * step_s) and plan.rounds >= ROUNDS
    assert comparison_s >= 0.5 * min(COMPARISON_SHARE * budget_s, 1e9) or plan.stretch == 1


def test_shares_are_in_order():
    assert list(ENDS.values()) == sorted(ENDS.values()) and ENDS["ops"] < 1.0
