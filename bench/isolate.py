"""Jobs in a process of their own: one that raises, hangs, crashes or loses the device costs itself, not the run.

A module names parts in a table PARTS; a part is a row of jobs with a budget. The child runs the jobs in order and
appends to a file, a JSON line each: {"jobs": names}, {"start": number}, and rows as findings.encode gives them. When it
dies, the parent starts another one at the next job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peakgpt.bench.findings import Failure, Row, decode, encode

Emit = Callable[[Row], None]
Job = Callable[[float, Emit], None]  # seconds that it should take, where its rows go

DEVICE_LOST = 3  # exit code: the failure is told, but nothing more can run in this process
GRACE_S = 10.0  # from the end of the budget to the end of the process
START_S = 5.0  # about what a process needs before its first job
TAIL = 6000  # characters of what a dead process said last


@dataclass(frozen=True)
class Part:
    """Args:
    jobs: device -> name -> job.
    budget_s: of the part, the starts of its processes included; jobs that it leaves no time for are told as not run.
    patience_s: a job that takes longer is stopped, with its traceback.
    """

    jobs: Callable[[torch.device], dict[str, Job]]
    budget_s: float
    patience_s: float


def run_part(module: str, name: str, device: torch.device) -> list[Row]:
    """Run a part to the end of its jobs or of its budget.

    Args:
        module: that has PARTS.
        name: of the part.
        device: passed to the part's `jobs`.
    Returns:
        Rows of all jobs; a failure for each that died, and one that names the jobs for which no time was left.
    """
    part: Part = importlib.import_module(module).PARTS[name]
    end = time.time() + part.budget_s
    rows: list[Row] = []
    start, jobs = 0, [""]
    while start < len(jobs) and time.time() + START_S < end:
        child = _run_child({"module": module, "part": name, "device": str(device), "start": start, "end": end})
        rows += child.rows
        jobs, start = child.jobs or jobs, child.started + 1
        if child.code == 0:
            break
        if child.code != DEVICE_LOST:
            job = jobs[child.started] if child.started >= 0 else ""
            rows.append(Failure(part=name, job=job, message=child.verdict(part.patience_s), traceback=child.tail))
        if child.started < 0:  # it did not come as far as a job
            return rows
    if start < len(jobs):
        message = f"not run: the part's {part.budget_s:g} s are over"
        rows.append(Failure(part=name, job="; ".join(jobs[start:]), message=message))
    return rows


@dataclass
class _Child:
    """What is left of one process."""

    code: int
    tail: str
    jobs: list[str] = field(default_factory=list)
    started: int = -1
    rows: list[Row] = field(default_factory=list)

    def verdict(self, patience_s: float) -> str:
        if "Timeout (" in self.tail:  # faulthandler's word
            return f"stopped: no end after {patience_s:g} s or at the end of the budget"
        return f"the process ended with exit code {self.code}"


def _run_child(request: dict) -> _Child:
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder, "rows"), Path(folder, "log")
        rows.touch()
        command = [sys.executable, "-m", "peakgpt.bench.isolate", json.dumps({**request, "rows": str(rows)})]
        with open(log, "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(max(0.0, request["end"] - time.time()) + 2 * GRACE_S)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        finally:  # also after Ctrl-C; the group holds the compiler's workers too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        child = _Child(code, log.read_text(errors="replace")[-TAIL:])
        for line in rows.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else it died while writing
                _take(child, json.loads(line))
    return child


def _take(child: _Child, line: dict) -> None:
    if "jobs" in line:
        child.jobs = line["jobs"]
    elif "start" in line:
        child.started = line["start"]
    else:
        child.rows.append(decode(line))


def main() -> None:
    """The child's side."""
    request = json.loads(sys.argv[1])
    part: Part = importlib.import_module(request["module"]).PARTS[request["part"]]
    device = torch.device(request["device"])
    jobs = part.jobs(device)
    with open(request["rows"], "a", buffering=1, encoding="utf-8") as file:
        tell = lambda line: file.write(json.dumps(line) + "\n")  # noqa: E731
        tell({"jobs": list(jobs)})
        for number, (name, job) in list(enumerate(jobs.items()))[request["start"] :]:
            left_s = request["end"] - time.time()
            if left_s <= 0:
                break
            tell({"start": number})
            # It ends the process even while the main thread waits for a kernel that never ends.
            faulthandler.dump_traceback_later(min(part.patience_s, left_s + GRACE_S), exit=True)

            def emit(row: Row, name: str = name) -> None:
                told = isinstance(row, Failure)
                tell(encode(dataclasses.replace(row, part=request["part"], job=name) if told else row))

            try:
                job(left_s / (len(jobs) - number), emit)
            except Exception as error:  # whatever it is, the next job may still run
                emit(Failure.of(error))
            faulthandler.cancel_dump_traceback_later()
            _settle(device)


def _settle(device: torch.device) -> None:
    """Give memory back; leave the process if the device is lost to it, as after an illegal address."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            os._exit(DEVICE_LOST)


if __name__ == "__main__":
    main()
