"""Fixtures and hooks of the suite under pytest: measured groups, markers, and our figures in the table."""

import dataclasses

import pytest

from peakgpt.bench.cases import KINDS
from peakgpt.bench.environment import environment
from peakgpt.bench.group import Group, figure_cells

COLUMNS = ["median", "iqr", "rounds"]  # never the minimum: it belongs to the round with the most luck
# Options of pytest-benchmark that choose rounds or a timer. The cases have their own.
REFUSED = tuple(f"--benchmark-{name}" for name in ("min-", "max-time", "timer", "calibration", "precision", "warmup"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    for tag in (*KINDS, "readme"):
        config.addinivalue_line("markers", f"{tag}: benchmarks, see docs/benchmarks.md")
    for argument in map(str, config.invocation_params.args):
        if argument.startswith(REFUSED):
            raise pytest.UsageError(f"{argument}: got it for bench/, whose cases have their own rounds and timer")
    if config.getoption("benchmark_columns", None) is None:
        config.option.benchmark_columns = COLUMNS


@pytest.fixture(scope="session")
def measured(request):
    """Return measure(case, device) -> Group; each case is measured once, with its selected contenders in turns."""
    groups = {}

    def measure(case, device):
        if case.name not in groups:
            changes = {"only": tuple(selected_contenders(request.session.items, case.name))}
            if request.config.getoption("benchmark_disable"):  # as a test: check every contender and time it once
                changes |= {"rounds": 1, "seconds": 0.0}
            groups[case.name] = Group.measure(dataclasses.replace(case, **changes), device)
        return groups[case.name]

    return measure


def selected_contenders(items, case_name):
    """Yield the contenders of a case that pytest runs."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("case") == case_name:
            yield params["contender"]


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats(benchmarks):
    """Write the contender and its figures in place of the name of the test."""
    groups = yield
    for title, rows in groups:
        names = [row["params"]["contender"] if title == row["group"] else row["param"] for row in rows]
        measured_now = [row["extra_info"] if row["source"] in (None, False, "NOW") else {} for row in rows]
        columns = [[cell.rjust(max(map(len, cells))) for cell in cells] for cells in figure_cells(measured_now)]
        width = max(map(len, names))
        for row, name, *cells in zip(rows, names, *columns, strict=True):
            row["name"] = "  ".join([name.ljust(width), *cells])
    return groups


def pytest_benchmark_update_machine_info(machine_info):
    """Add what the figures depend on, and what stays the same from run to run."""
    ours = environment()
    machine_info["peakgpt"] = {key: ours[key] for key in ("device", "threads", "isa", "malloc")}
