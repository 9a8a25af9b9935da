"""The folder of one training run."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHECKPOINT = "checkpoint"  # the model in its family's Hugging Face layout
STATE = "state"  # the training state that a resumed run reads
TOKENS = "tokens"  # token shards and tokenizer
METRICS = "metrics.jsonl"  # one JSON object a line


class RunFolder:
    """One run's metrics, checkpoint, training state, tokens, results and report."""

    def __init__(self, path: Path | str):
        """Make the folder.

        Raises:
            ValueError: it contains files already, or cannot be written.
        """
        self.path = Path(path)
        self._topmost_created = next((p for p in (*reversed(self.path.parents), self.path) if not p.exists()), None)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise ValueError(f"run folder {self.path}: got a folder with files, expected a new or empty one")
            self._open_metrics()
        except OSError as error:
            raise ValueError(f"run folder {self.path}: {error.strerror}, expected a folder to write into") from None

    @classmethod
    def reopen(cls, path: Path | str) -> RunFolder:
        """Open the folder of an earlier run, to resume it.

        Raises:
            ValueError: there is no such folder, or no run in it.
        """
        run = cls.__new__(cls)
        run.path, run._topmost_created = Path(path), None
        if not (run.path / METRICS).is_file():
            missing = f"{METRICS} in it" if run.path.is_dir() else "such folder"
            raise ValueError(f"run folder {path}: got no {missing}, expected the folder of a run")
        run._open_metrics()
        return run

    def _open_metrics(self) -> None:
        self.metrics = open(self.path / METRICS, "a", encoding="utf-8")  # noqa: SIM115  open for the whole run
        self.start = time.time()

    @contextlib.contextmanager
    def discarded_on_bad_input(self) -> Iterator[None]:
        """Delete the new folder and everything in it if the block raises ValueError.

        Put the work before the first step into the block, so that a wrong flag leaves nothing behind.
        """
        try:
            yield
        except ValueError:
            self.metrics.close()
            for path in (self._topmost_created,) if self._topmost_created else tuple(self.path.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise

    @property
    def checkpoint(self) -> Path:
        """The folder of the model."""
        return self.path / CHECKPOINT

    @property
    def tokens(self) -> Path:
        """The folder of the token shards and the tokenizer."""
        return self.path / TOKENS

    def log(self, **row: Any) -> None:
        """Append one line to metrics.jsonl and hand it to the operating system, so that Ctrl-C loses nothing."""
        self.metrics.write(json.dumps({"elapsed_s": round(time.time() - self.start, 3), **row}) + "\n")
        self.metrics.flush()

    def rows(self) -> list[dict[str, Any]]:
        """Return all lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / METRICS).read_text(encoding="utf-8").splitlines()]


def default_run_folder(command: str) -> Path:
    """Return runs/<command>-<date>-<time>, relative to the current folder."""
    return Path("runs", f"{command}-{time.strftime('%Y%m%d-%H%M%S')}")


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request to stop; the second one raises KeyboardInterrupt as usual.

    A run resumes bit for bit only from a state between two steps, so the training loop checks for the request there.
    Main thread only.

    Yields:
        A function that returns whether Ctrl-C was pressed.
    """
    stop_requested = False

    def request_stop(*_: Any) -> None:
        nonlocal stop_requested
        stop_requested = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, request_stop)
    try:
        yield lambda: stop_requested
    finally:
        signal.signal(signal.SIGINT, previous)
