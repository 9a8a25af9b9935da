"""A contender in a process of its own: allocator settings, page faults and peak memory belong to a process.

Protocol: a JSON request in argv[1], whose "make" names the function ("module:function") that turns it into a step; then
for each line on standard input one step and one JSON line, the fields of `Answer`, on standard output. The process ends
with its input.

A step's peak is VmHWM after it, reset before it by writing 5 to /proc/self/clear_refs (proc(5)), and what setting up
has freed is returned to the system first: the peak is what steps need, not what building took. Where there is no such
file, it is the most that the process ever held (ru_maxrss), and the note says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLOSE_S = 20.0  # for a process to end by itself
WHOLE_LIFE = "memory is the most since the process began"


@dataclass(frozen=True)
class Answer:
    """What a process says of one step.

    Args:
        value: what the step returned.
        faults: pages that it had to be given.
        peak_bytes: the most that the process held during the step; `base_bytes` is what it held once everything was
            imported, before anything was built.
        whole_life: the peak is not the step's but the process'.
    """

    value: float
    faults: int
    peak_bytes: int
    base_bytes: int
    whole_life: bool


class Worker:
    """The parent's side: starts the process, makes it step, and stops it."""

    def __init__(self, name: str, request: dict[str, Any], environment: dict[str, str]):
        """
        Args:
            name: for error messages.
            request: "make", "threads", and what `make` reads.
            environment: variables beside this process's own.
        """
        self.name: str = name
        self.last: Answer | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peakgpt.bench.worker", json.dumps(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        self.pid = self.process.pid

    def step(self) -> float:
        """One step; waits for it and returns its value.

        Raises:
            RuntimeError: the process has ended; what it said is on standard error.
        """
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"benchmark worker {self.name!r} ended with exit code {code}; its message is above")
        self.last = Answer(**json.loads(line))
        return self.last.value

    def memory_bytes(self) -> int | None:
        """The most that the process held during the last step."""
        return self.last and self.last.peak_bytes

    @property
    def base_bytes(self) -> int | None:
        """What the process held once everything was imported."""
        return self.last and self.last.base_bytes

    @property
    def note(self) -> str:
        if not self.last:
            return ""
        whole_life = f"; {self.name}: {WHOLE_LIFE}" if self.last.whole_life else ""
        return f"{self.name}: {self.last.faults} page faults in the last step{whole_life}"

    def close(self) -> None:
        """End the process and wait for it; one that does not end is killed."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


# ---- the child's side


def reset_peak() -> bool:
    """Make the process' peak what it holds now; False where the system can not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """The most that this process held since `reset_peak`, or ever where that does nothing."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def give_back() -> None:
    """Return freed memory to the system, where its C library can (glibc)."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _answers(step: Callable[[], float], base_bytes: int) -> Callable[[], Answer]:
    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def answer() -> Answer:
        whole_life, before = not reset_peak(), faults()
        value = step()
        return Answer(value, faults() - before, peak_bytes(), base_bytes, whole_life)

    return answer


def main() -> None:
    request = json.loads(sys.argv[1])
    module, function = request["make"].split(":")
    make = getattr(importlib.import_module(module), function)

    import torch

    torch.set_num_threads(request["threads"])
    reset_peak()
    base_bytes = peak_bytes()
    answer = _answers(make(request), base_bytes)
    give_back()
    for _ in sys.stdin:
        print(json.dumps(dataclasses.asdict(answer())), flush=True)


if __name__ == "__main__":
    main()
