"""Time budgets and progress of long commands, on a clock of the test."""

import io
import sys
from types import SimpleNamespace

import pytest

from peakgpt.cli import COMMANDS, HEARTBEATS
from peakgpt.commands.quickstart import ENDS
from peakgpt.heartbeat import INTERVAL_S, Heartbeat, enter_phase, heartbeat
from peakgpt.quickstart_session import cut_steps
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
        raise KeyError
    assert sys.stdout is stream
    enter_phase("three")  # without effect


def test_commands_with_a_heartbeat_exist():
    assert set(HEARTBEATS) <= set(COMMANDS) and "generate" not in HEARTBEATS, "it streams text itself"


@pytest.mark.parametrize("slowness", [0.1, 1.0, 3.0, 30.0])
def test_a_phase_takes_items_within_its_share_and_leaves_the_rest(slowness):
    clock = Clock()
    budget = TimeBudget(300.0, ENDS, clock)
    taken = 0
    for _ in budget.take("tokenizer", range(1000), at_least=20.0):
        clock.now_s += slowness
        taken += 1
    assert taken == 1000 if slowness == 0.1 and taken * slowness < 30 else taken * slowness <= 30.0 + slowness
    left_s = budget.left_s("training")
    assert left_s == pytest.approx(ENDS["training"] * 300 - taken * slowness)
    clock.now_s += 1000
    assert budget.left_s("training") == 0.0 and budget.left_s("training", at_least=5.0) == 5.0


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("at", [0.0, 0.5, 0.9])
def test_training_ends_in_time_when_the_machine_gets_slower(slower, at):
    """Another process takes a core after a part of the steps. Fails if the plan is kept."""
    clock, step_s, budget_s = Clock(), 0.1, 100.0
    trainer = SimpleNamespace(steps=int(budget_s / step_s), steps_done=0)
    planned, end_s = trainer.steps, clock() + budget_s
    while trainer.steps_done < trainer.steps:
        start_s, stretch = clock(), min(10, trainer.steps - trainer.steps_done)
        clock.now_s += stretch * step_s * (slower if trainer.steps_done >= at * planned else 1.0)
        trainer.steps_done += stretch
        cut_steps(trainer, (clock() - start_s) / stretch, end_s - clock())
    assert clock() <= end_s + 10 * step_s * slower
    assert trainer.steps_done == planned or slower > 1


def test_shares_are_in_order():
    assert list(ENDS.values()) == sorted(ENDS.values()) and ENDS["ops"] < 1.0
