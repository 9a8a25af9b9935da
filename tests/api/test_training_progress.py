"""What a training run prints: lines at most every few seconds and at least every 10, and an MFU that fits its speed."""

import io
import re
import sys

import pytest
from rich.console import Console

from peakgpt.bench.report import _percent
from peakgpt.engine.model.flops import mfu
from peakgpt.engine.training.figures import bytes_text, duration_text, percent_text, rate_text, significant, speed_text
from peakgpt.engine.training.loop import StepMetrics
from peakgpt.engine.training.run_report import key_figures
from peakgpt.engine.training.validation import Sample, SetMetrics, ValidationMetrics
from peakgpt.heartbeat import Heartbeat
from peakgpt.progress import LINE_S, TrainingProgress


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.mark.parametrize("step_s", [0.001, 0.9, 3.0, 9.0, 40.0])
def test_lines_of_any_step_are_at_most_10_seconds_apart_and_do_not_flood(step_s, monkeypatch):
    """The heartbeat beats each second of a long step. Fails if a slow step is silent, or a fast one prints a line."""
    clock, stream, steps = Clock(), io.StringIO(), max(4, int(15 / step_s))
    watched = Heartbeat(stream, "training", clock)
    monkeypatch.setattr("peakgpt.progress.enter_phase", watched.enter)
    times, seen = [], 0
    with TrainingProgress(Console(file=watched, width=200), clock=clock) as progress:
        for step in range(1, steps + 1):
            whole_s, rest_s = divmod(step_s, 1.0)
            for second_s in [1.0] * int(whole_s) + [rest_s]:
                clock.now_s += second_s
                watched.beat()
                if stream.tell() != seen:
                    times.append(clock())
                    seen = stream.tell()
            progress.step(StepMetrics(step, 2.0, 100.0, step_s, mfu=0.1), steps)
            if stream.tell() != seen:
                times.append(clock())
                seen = stream.tell()
    gaps = [b - a for a, b in zip([100.0, *times], [*times, clock()], strict=True)]
    assert max(gaps) <= 10.0
    assert len(times) <= 3 + (clock() - 100.0) / min(LINE_S, max(step_s, 1.0))
    text = stream.getvalue()
    assert f"step {steps}/{steps}" in text and (step_s < 10 or re.search(r"after step 1/\d+: 8 s", text))


def test_a_line_has_loss_speed_mfu_and_the_time_left():
    clock, stream = Clock(), io.StringIO()
    progress = TrainingProgress(Console(file=stream, width=40), clock=clock)
    with progress:
        progress.show(StepMetrics(10, 3.21, 1234.5, 2.0, mfu=0.1234), 100)
        progress.show(
            ValidationMetrics(10, {"validation": SetMetrics(3.0, 5000, 1.2), "wiki": SetMetrics(4.0, 9, None)}, True,
                              [Sample("[b]def", " f(x):\n")]), 100
        )  # fmt: skip
    assert stream.getvalue().splitlines() == [
        "step 10/100  loss 3.2100  1,234 tok/s  MFU 12.3 %  ETA 3 min 0 s",
        "step 10  validation loss 3.0000, perplexity 20.09, 1.2000 bits per byte, 5,000 tokens  (best so far)",
        "step 10  wiki loss 4.0000, perplexity 54.6, 9 tokens",
        "  sample: '[b]def f(x):\\n'",
    ]


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with TrainingProgress(Console(file=stream, width=120, force_terminal=True), done=5) as progress:
        progress.step(StepMetrics(6, 3.21, 1234.5, 2.0, mfu=0.1234), 100)
    text = stream.getvalue()
    assert "6/100" in text and "loss 3.2100  1,234 tok/s  MFU 12.3 %" in text and "\x1b[" in text


PEAK = 0.5e12  # FLOP/s


@pytest.mark.parametrize("flops_per_token", [1.3e4, 2.7e6, 8.6e8])
@pytest.mark.parametrize("speed", [0.0123, 9.996, 10.05, 99.51, 999.6, 1000.4, 12345.6, 987654.3])
def test_every_printed_mfu_agrees_with_its_tokens_per_second(speed, flops_per_token):
    """Recomputed from the printed tokens/s within 1 %. Fails if a small MFU is rounded to a fixed digit."""
    value = mfu(speed, flops_per_token, PEAK)
    event = StepMetrics(1, 2.0, speed, 1.0, mfu=value)
    stream = io.StringIO()
    with TrainingProgress(Console(file=stream, width=200)) as progress:
        progress.step(event, 1)
    row = event.row()
    figures = dict(key_figures([row]))
    printed = [
        re.search(r"([\d.,e-]+) tok/s  MFU ([\d.e-]+) %", stream.getvalue()).groups(),
        (figures["median throughput"].split()[0], figures["median MFU"].split()[0]),
        (rate_text(speed), _percent(value).split()[0]),
        (row["tokens_per_s"], 100 * row["mfu"]),
    ]
    for shown_speed, shown_percent in printed:
        recomputed = 100 * mfu(float(str(shown_speed).replace(",", "")), flops_per_token, PEAK)
        assert float(shown_percent) == pytest.approx(recomputed, rel=0.01)


def test_figures_are_readable():
    shares = (0.2, 0.00123, 0.999, 1.0, 1.234)
    assert [percent_text(x) for x in shares] == ["20.0 %", "0.123 %", "99.9 %", "100 %", "123 %"]
    assert [speed_text(x) for x in (12.345, 1234567.0)] == ["12.35 tok/s", "1,234,567 tok/s"]
    assert [duration_text(x) for x in (4.21, 185, 7625)] == ["4.2 s", "3 min 5 s", "2 h 7 min"]
    assert [bytes_text(x) for x in (5 << 20, 1.25 * 2**30)] == ["5 MiB", "1.25 GiB"]
    assert significant(0.000123456789) == 0.000123457


def test_a_bar_ends_when_the_output_is_closed(monkeypatch):
    """Regression: `peakgpt train | head` must save; a closed output raises nothing."""
    from peakgpt.closed_output import Output

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    output = Output()
    with TrainingProgress(Console(file=output)) as progress:
        progress.step(StepMetrics(1, 3.0, 10.0, 2.0), 10)
    assert output.lost
