"""Jobs in child processes: a job that raises, hangs, crashes or loses the device does not stop the others.

A module has parts in a table PARTS. A part is a list of jobs with a time budget. The child runs the jobs in order and
appends JSON lines to a file: {"jobs": names}, {"start": index}, and rows of run_results.encode. If it dies, the parent
starts another child at the next job.
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

from peakgpt.bench.run_results import Emit, Failure, Row, decode, encode

Job = Callable[[float, Emit], None]  # (budget in seconds, emit)

DEVICE_LOST = 3  # exit code: the failure is reported, and this process cannot run more jobs
GRACE_S = 10.0  # from the end of the budget to the end of the process
START_S = 5.0  # typical start of a process before its first job
TAIL = 6000  # last characters of a dead process's output


@dataclass(frozen=True)
class Part:
    """Jobs that share a time budget.

    Args:
        jobs: device -> name -> job.
        budget_s: seconds for the part, including the starts of its processes. Jobs that do not fit are reported as
            not run.
        patience_s: a job that takes longer is stopped, and its traceback is reported.
    """

    jobs: Callable[[torch.device], dict[str, Job]]
    budget_s: float
    patience_s: float


def run_part(module: str, name: str, device: torch.device) -> list[Row]:
    """Run the jobs of a part until they or the budget end.

    Args:
        module: name of the module with PARTS.
        name: key of PARTS.
        device: argument of `Part.jobs`.
    Returns:
        Rows of all jobs, a failure for each job that died, and one failure that names the jobs not run.
    """
    part: Part = importlib.import_module(module).PARTS[name]
    end = time.time() + part.budget_s
    rows: list[Row] = []
    start, jobs = 0, [""]
    while start < len(jobs) and time.time() + START_S < end:
        request = {"module": module, "part": name, "device": str(device), "start": start, "end": end}
        child = _run_child({**request, "patience_s": part.patience_s})
        rows += child.rows
        jobs, start = child.jobs or jobs, child.started + 1
        if child.code == 0:
            break
        if child.code != DEVICE_LOST:
            job = jobs[child.started] if child.started >= 0 else ""
            rows.append(Failure(part=name, job=job, message=child.verdict(part.patience_s), traceback=child.tail))
        if child.started < 0:  # the child died before its first job
            return rows
    if start < len(jobs):
        message = f"not run: the budget of the part, {part.budget_s:g} s, is spent"
        rows.append(Failure(part=name, job="; ".join(jobs[start:]), message=message))
    return rows


@dataclass
class _Child:
    """Outcome of one child process."""

    code: int
    tail: str
    jobs: list[str] = field(default_factory=list)
    started: int = -1
    rows: list[Row] = field(default_factory=list)

    def verdict(self, patience_s: float) -> str:
        if "Timeout (" in self.tail:  # printed by faulthandler
            return f"stopped: no end after {patience_s:g} s or at the end of the budget"
        return f"the process ended with exit code {self.code}"


def _run_child(request: dict) -> _Child:
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder, "rows"), Path(folder, "log")
        rows.touch()
        command = [sys.executable, "-m", "peakgpt.bench.isolated_jobs", json.dumps({**request, "rows": str(rows)})]
        with open(log, "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(max(0.0, request["end"] - time.time()) + 2 * GRACE_S)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        finally:  # also after Ctrl-C; the process group includes the workers of compilers
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        child = _Child(code, log.read_text(errors="replace")[-TAIL:])
        for line in rows.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # otherwise the child died while writing it
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
    """Run the jobs of the request in argv[1]: the child side."""
    request = json.loads(sys.argv[1])
    part: Part = importlib.import_module(request["module"]).PARTS[request["part"]]
    device = torch.device(request["device"])
    jobs = part.jobs(device)
    with open(request["rows"], "a", buffering=1, encoding="utf-8") as file:
        write = lambda line: file.write(json.dumps(line) + "\n")  # noqa: E731
        write({"jobs": list(jobs)})
        for number, (name, job) in list(enumerate(jobs.items()))[request["start"] :]:
            left_s = request["end"] - time.time()
            if left_s <= 0:
                break
            write({"start": number})
            # Ends the process even if the main thread waits for a kernel that never ends.
            faulthandler.dump_traceback_later(min(request["patience_s"], left_s + GRACE_S), exit=True)

            def emit(row: Row, name: str = name) -> None:
                if isinstance(row, Failure):
                    row = dataclasses.replace(row, part=request["part"], job=name)
                write(encode(row))

            try:
                job(left_s / (len(jobs) - number), emit)
            except Exception as error:  # a failing job must not stop the next one
                emit(Failure.of(error))
            faulthandler.cancel_dump_traceback_later()
            _settle(device)


def _settle(device: torch.device) -> None:
    """Free memory; exit if this process has lost the device, for example after an illegal address."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            os._exit(DEVICE_LOST)


if __name__ == "__main__":
    main()
