"""A run's folder: checkpoint, metrics, report, and nothing of another run's."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class RunFolder:
    """`metrics.jsonl` grows a line at a time; `checkpoint/`, `tokens/`, `results.json` and `report.html` lie beside."""

    def __init__(self, path: Path | str):
        """Make the folder.

        Raises:
            ValueError: it holds files already, or can not be written.
        """
        self.path = Path(path)
        self._made = next((p for p in (*reversed(self.path.parents), self.path) if not p.exists()), None)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise ValueError(f"run folder {self.path}: got one with files in it, expected a new or empty one")
            self.metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  open for the run
        except OSError as error:
            raise ValueError(f"run folder {self.path}: {error.strerror}, expected a folder to write into") from None
        self.start = time.time()

    @classmethod
    def reopen(cls, path: Path | str) -> RunFolder:
        """Open the folder of a run that is to go on.

        Raises:
            ValueError: there is none.
        """
        run = cls.__new__(cls)
        run.path, run.start = Path(path), time.time()
        if not (run.path / "metrics.jsonl").is_file():
            lacking = "metrics.jsonl in it" if run.path.is_dir() else "such folder"
            raise ValueError(f"run folder {path}: got no {lacking}, expected the folder of a run")
        run.metrics = open(run.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  open for the run
        return run

    @contextlib.contextmanager
    def discarded_on_bad_input(self) -> Iterator[None]:
        """Around what comes before the first step: a ValueError takes what was written with it, and the folder."""
        try:
            yield
        except ValueError:
            self.metrics.close()
            for path in (self._made,) if self._made else tuple(self.path.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    def log(self, **row: Any) -> None:
        """Append one line to metrics.jsonl; it is on disk when this returns, so Ctrl-C loses nothing."""
        self.metrics.write(json.dumps({"elapsed_s": round(time.time() - self.start, 3), **row}) + "\n")
        self.metrics.flush()

    def rows(self) -> list[dict[str, Any]]:
        """Everything logged so far."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def default_folder(name: str) -> Path:
    """runs/<name>-<date>-<time>, below the current folder."""
    return Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request: yields a function that tells whether it came; a second one interrupts.

    A step that is cut in two can not be resumed bit for bit, so a loop asks between steps. Main thread only.
    """
    asked = False

    def request(*_) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
