"""A torch.profiler trace of some steps of a run, as Chrome and Perfetto show it. Other steps are not slowed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from peakgpt.engine.data.run_layout import TRACES


def parse_window(text: str) -> tuple[int, int]:
    """Read the steps to profile.

    Args:
        text: "START:END", both counted from 1 and included, such as "10:12".
    Raises:
        ValueError: not of this form, or an empty window.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    start, end = (int(part) for part in match.groups()) if match else (0, 0)
    if not 0 < start <= end:
        raise ValueError(f"profile is {text!r}, expected START:END, such as 10:12 for steps 10 to 12")
    return start, end


def check_window(window: str | None, done: int, steps: int | None) -> None:
    """Check that a run makes a step of the window.

    Args:
        window: see `parse_window`; None: nothing is profiled.
        done: updates that are made already.
        steps: planned updates of the run; None if a time budget decides.
    Raises:
        ValueError: nothing would be profiled.
    """
    if window is None:
        return
    start, end = parse_window(window)
    if end <= done or (steps is not None and start > steps):
        last = "" if steps is None else f" to {steps}"
        raise ValueError(f"profile is {window}, expected steps that the run makes: {done + 1}{last}")


class StepProfile:
    """Profiles the steps of a window. A context: a run that ends inside the window writes what it has."""

    def __init__(self, window: str, folder: Path, device: torch.device):
        """
        Args:
            window: see `parse_window`.
            folder: of the run.
            device: of the model.
        """
        (self.start, self.end), self.device = parse_window(window), device
        self.path = folder / TRACES / f"steps-{self.start}-{self.end}.json.gz"
        self._profiler: Any = None

    def before_step(self, step: int) -> None:
        """Start or end the trace; called before each step with the step's number, from 1."""
        if self._profiler is None and self.start <= step <= self.end:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()
        elif self._profiler is not None and step > self.end:
            self.finish()

    def finish(self) -> None:
        """End the trace and write it, if one is running."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        profiler.stop()
        self.path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.path))

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
