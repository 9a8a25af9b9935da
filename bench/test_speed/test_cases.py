"""The cases of `peakgpt bench suite` as tests of pytest-benchmark: `pytest bench/ --benchmark-only`.

The first test of a case measures all its selected contenders in turns. Every test then reports the stored seconds of
its contender: the timer of pytest-benchmark is a clock that moves by one stored sample a round.
"""

import itertools

import pytest

from peakgpt.bench.cases import suite_cases, tags
from peakgpt.bench.run_results import OURS, Unsupported
from peakgpt.kernels.hardware.device import choose_device

DEVICE = choose_device(None)
CASES = {case.name: case for case in suite_cases(DEVICE)}


class SampleClock:
    """A timer that shows stored samples."""

    def __init__(self):
        self.now_s = 0.0

    def seconds(self) -> float:
        """Return the time of this clock in seconds."""
        return self.now_s

    def play(self, benchmark, samples_s) -> None:
        """Let pytest-benchmark time one round for each sample."""
        left = itertools.cycle(samples_s)  # a profiler calls once more

        def reset() -> None:
            self.now_s = 0.0  # so that each difference is a sample without rounding

        def advance() -> None:
            self.now_s += next(left)

        benchmark.pedantic(advance, setup=reset, rounds=len(samples_s))


CLOCK = SampleClock()


def parameters():
    """Yield (name of a case, contender), with the words by which `-m` selects."""
    for case in CASES.values():
        for contender in case.contenders(DEVICE):
            marks = [getattr(pytest.mark, tag) for tag in tags(case)]
            yield pytest.param(case.name, contender, marks=marks, id=f"{case.name}/{contender.replace(', ', '-')}")


@pytest.mark.benchmark(timer=CLOCK.seconds)
@pytest.mark.parametrize(("case", "contender"), list(parameters()))
def test_speed(benchmark, measured, case, contender):
    benchmark.group = case
    group = measured(CASES[case], DEVICE)
    if (error := group.errors.get(contender)) is not None:
        give_up(contender, error)
    CLOCK.play(benchmark, group.results[contender].samples_s)
    benchmark.extra_info.update(group.figures(contender))


def give_up(contender: str, error: Exception) -> None:
    """End the test of a contender that was not timed: ours fails, a peer is skipped or an expected failure."""
    if isinstance(error, (Unsupported, ModuleNotFoundError)):
        pytest.skip(str(error))
    if contender.startswith(OURS):
        raise error
    pytest.xfail(f"{type(error).__name__}: {error}")
