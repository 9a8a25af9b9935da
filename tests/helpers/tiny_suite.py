"""A plugin of pytest that puts tiny cases in place of those of the suite: `pytest bench/ -p tiny_suite`."""

import dataclasses

import fixed_peaks

from peakgpt.bench import cases
from peakgpt.bench.contenders import op_peers
from peakgpt.bench.ops import OpCase
from peakgpt.bench.run_results import Unsupported

SIZES = {"rows": 8, "width": 16}


def broken(x, w, b):
    raise RuntimeError("no such kernel")


def declines(x, w, b):
    raise Unsupported("another day")


def absent(x, w, b):
    raise ModuleNotFoundError("not measured, rocket is not installed: pip install rocket")


PEERS = {"broken": broken, "declines": declines, "absent": absent}
README_CASE = "ops/layernorm/rows=8,width=16/forward/float32"


def plain_cases():
    plain = OpCase("layernorm", "forward", "float32", SIZES, rounds=4, only=("peakgpt", "eager"))
    return [plain, dataclasses.replace(plain, dtype="bfloat16")]


def suite_cases(device):
    first, second = plain_cases()
    return [dataclasses.replace(first, only=(*first.only, *PEERS)), second]


def pytest_configure():
    """Use the cases in the process that loads this file as a plugin."""
    cases.suite_cases = suite_cases
    cases.README = {README_CASE: (60, ())}
    op_peers.OTHERS["layernorm"] = lambda device: PEERS
    fixed_peaks.use()
