"""Run a contender in its own process, because allocator settings, page faults and peak memory belong to a process.

Protocol: argv[1] is a JSON request. Its "make" names a function, "module:function", that takes the request and returns
a step. For each line on standard input the process makes one step and writes one JSON line, the fields of `StepReport`,
to a pipe of its own, because packages print to standard output. If it raises, the line has "type" and "error", and the
process ends. It also ends when standard input ends.

The peak memory of a step is VmHWM after it. VmHWM is reset before the step by writing 5 to /proc/self/clear_refs
(proc(5)), and memory that the setup freed is returned to the system first, so the peak excludes the setup. Without that
file the peak is that of the whole process (ru_maxrss), and the note says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import itertools
import json
import os
import re
import resource
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLOSE_S = 20.0  # kill a process that does not end within this time
STEP_S = 1200.0  # a step that takes longer, with building or compiling before the first one, counts as hanging
WHOLE_LIFE = "memory is the peak since the start of the process"


@dataclass(frozen=True)
class StepReport:
    """One step of a process.

    Args:
        value: return value of the step.
        peak_bytes: peak resident memory during the step.
        base_bytes: resident memory after the imports, before anything is built.
        whole_life: peak_bytes is the peak of the whole process.
    """

    value: float
    peak_bytes: int
    base_bytes: int
    whole_life: bool


class WorkerProcess:
    """The parent side: start the process, run its steps, end it."""

    def __init__(self, name: str, request: dict[str, Any], environment: dict[str, str]):
        """
        Args:
            name: for error messages.
            request: "make", "threads", and the arguments of `make`.
            environment: variables added to those of this process.
        """
        self.name: str = name
        self.environment = environment
        self.last: StepReport | None = None
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peakgpt.bench.contenders.worker_process", json.dumps(request), str(writing)],
            stdin=subprocess.PIPE, stdout=2, text=True, env={**os.environ, **environment}, pass_fds=[writing],
        )  # fmt: skip
        os.close(writing)  # so that the reader sees the end of the process
        self.reports = os.fdopen(reading, encoding="utf-8")
        self.pid = self.process.pid

    def step(self) -> float:
        """Make one step and return its value.

        Raises:
            RuntimeError, ModuleNotFoundError: see `finish`.
        """
        self.begin()
        return self.finish()

    def begin(self) -> None:
        """Let the process begin a step, which `finish` waits for."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; its last line says why
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def finish(self) -> float:
        """Wait for the step that has begun and return its value.

        Raises:
            RuntimeError: the contender raised, or its process has ended or hangs. A traceback is on standard error.
            ModuleNotFoundError: the contender needs a package that is missing.
        """
        if not select.select([self.reports], [], [], STEP_S)[0]:
            self.process.kill()
            raise RuntimeError(f"benchmark worker {self.name!r} made no step in {STEP_S:g} s")
        line = self.reports.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"benchmark worker {self.name!r} ended with exit code {code}; its message is above")
        report = json.loads(line)
        if (error := report.get("error")) is not None:
            missing = report["type"] == ModuleNotFoundError.__name__  # a package that the contender's package needs
            raise (ModuleNotFoundError if missing else RuntimeError)(f"benchmark worker {self.name!r}: {error}")
        self.last = StepReport(**report)
        return self.last.value

    def memory_bytes(self) -> int | None:
        """Return the peak resident memory of the last step."""
        return self.last and self.last.peak_bytes

    @property
    def base_bytes(self) -> int | None:
        """Resident memory after the imports."""
        return self.last and self.last.base_bytes

    @property
    def note(self) -> str:
        parts = [f"{name}={value}" for name, value in self.environment.items()]
        if self.last and self.last.whole_life:
            parts.append(WHOLE_LIFE)
        return f"{self.name}: {', '.join(parts)}" if parts else ""

    def step_once(self) -> None:
        """Make one step and end the process, for a value that is needed before the contenders fill the memory."""
        try:
            self.step()
        finally:
            self.close()

    def close(self) -> None:
        """End the process; kill it if it does not end within CLOSE_S."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reports.close()


# ---- child side


def reset_peak() -> bool:
    """Reset the peak of this process to its current memory; return False if the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the peak resident memory since `reset_peak`, or of the whole process if that has no effect."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def return_freed_memory() -> None:
    """Return freed memory to the system if the C library can (glibc)."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def saving_first(run: Callable[[], Any], path: str, value_of: Callable[[Any], float]) -> Callable[[], float]:
    """Return a step that returns value_of(run()); the first one also saves the tensor of `run`, to be checked."""
    import torch

    calls = itertools.count()

    def step() -> float:
        output = run()
        if next(calls) == 0:
            torch.save(output.clone(), path)
        return value_of(output)

    return step


def _reporting(step: Callable[[], float], base_bytes: int) -> Callable[[], StepReport]:
    def report() -> StepReport:
        whole_life = not reset_peak()
        value = step()
        return StepReport(value, peak_bytes(), base_bytes, whole_life)

    return report


def main() -> None:
    request = json.loads(sys.argv[1])
    module, function = request["make"].split(":")
    make = getattr(importlib.import_module(module), function)

    import torch

    torch.set_num_threads(request["threads"])
    reset_peak()
    base_bytes = peak_bytes()
    with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8") as reports:
        try:
            report = _reporting(make(request), base_bytes)
            return_freed_memory()
            for _ in sys.stdin:
                print(json.dumps(dataclasses.asdict(report())), file=reports, flush=True)
        except Exception as error:
            reason = {"type": type(error).__name__, "error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reason), file=reports, flush=True)
            raise


if __name__ == "__main__":
    main()
