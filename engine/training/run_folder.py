"""The folder of one training run. One process at a time writes it; a lock that ends with the process says which."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from peakgpt.engine.data.run_layout import CHECKPOINT, METRICS, TOKENS
from peakgpt.kernels.files import (
    STAGE,
    flush,
    is_open_at,
    lock,
    make_folders,
    remove_empty_folders,
    staging_folder,
    sweep,
)
from peakgpt.kernels.strict_json import dumps


class Taken(ValueError):
    """Another run has the folder, or it contains files."""


class RunFolder:
    """One run's metrics, checkpoint, training state, tokens, results and report."""

    def __init__(self, path: Path | str):
        """Make the folder. A folder whose run was killed before it was prepared counts as empty.

        Raises:
            ValueError: it contains files already, belongs to another process, or cannot be written, or its name is not
                UTF-8, which safetensors needs.
        """
        if os.fsencode(path).decode(errors="ignore") != str(path):
            raise ValueError(f"run folder {str(path)!r}: got a name that is not UTF-8, expected UTF-8")
        self.path, self._stage = Path(path), None
        made: list[Path] = []
        try:
            made = make_folders(self.path)
            self._open(new=True)
        except OSError as error:
            remove_empty_folders(made)
            raise ValueError(f"run folder {self.path}: {error.strerror}, expected a folder to write into") from None
        except ValueError:
            remove_empty_folders(made)
            raise
        self._made = made

    @classmethod
    def with_default_name(cls, command: str) -> RunFolder:
        """Make runs/<command>-<date>-<time>, relative to the current folder, with a suffix if that name is taken."""
        path = default_run_folder(command)
        for number in itertools.count(2):
            try:
                return cls(path)
            except Taken:
                path = path.with_name(f"{default_run_folder(command).name}-{number}")
        raise AssertionError

    @classmethod
    def reopen(cls, path: Path | str) -> RunFolder:
        """Open the folder of an earlier run, to resume it.

        Raises:
            ValueError: there is no such folder, no run in it, or its run has not ended.
        """
        run = cls.__new__(cls)
        run.path, run._stage, run._made = Path(path), None, []
        if not (run.path / METRICS).is_file():
            missing = f"{METRICS} in it" if run.path.is_dir() else "such folder"
            raise ValueError(f"run folder {path}: got no {missing}, expected the folder of a run")
        run._open(new=False)
        return run

    def _open(self, *, new: bool) -> None:
        """Open metrics.jsonl and lock it. Of several processes that try, one succeeds."""
        has_files = Taken(f"run folder {self.path}: got a folder with files, expected a new or empty one")
        path, restarted = self.path / METRICS, new and self._is_unprepared()
        if new and not restarted and any(self.path.iterdir()):
            raise has_files
        try:
            # Open for the whole run. Mode "x" fails if another process has made the file.
            metrics: TextIO = open(path, "x" if new and not restarted else "a", encoding="utf-8")  # noqa: SIM115
        except FileExistsError:
            raise has_files from None
        try:
            lock(metrics.fileno())
            if not is_open_at(metrics.fileno(), path):
                raise BlockingIOError
            sweep(self.path)
            if restarted and any(entry != path or entry.stat().st_size for entry in self.path.iterdir()):
                raise has_files
        except BlockingIOError:
            metrics.close()
            raise Taken(
                f"run folder {self.path}: a running process writes it, expected a free one"
            ) from None
        except Taken:
            metrics.close()
            raise
        self.metrics, self.start = metrics, time.time()

    def _is_unprepared(self) -> bool:
        """Return whether the folder has only what a run writes before its first line of metrics."""
        entries = {entry.name for entry in self.path.iterdir()}
        stages = {name for name in entries if STAGE.fullmatch(name)}
        return bool(stages) and entries - stages == {METRICS} and not (self.path / METRICS).stat().st_size

    def close(self) -> None:
        """Close metrics.jsonl, which frees the lock."""
        self.metrics.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def discarded_on_bad_input(self) -> Iterator[None]:
        """Prepare a new run: in the block `root` is a hidden folder, whose content is moved into the run at its end.

        If the block raises, only what this process has made is deleted: the hidden folder, metrics.jsonl, and the
        folders that it made and that are empty. Put the work before the first step into the block, so that a wrong flag
        leaves nothing behind.
        """
        try:
            with staging_folder(self.path) as stage:
                self._stage = stage
                yield
                # Files come after folders: config.toml says that the run is prepared.
                for entry in sorted(stage.iterdir(), key=lambda entry: entry.is_file()):
                    if entry.is_file():
                        flush(entry)
                    os.rename(entry, self.path / entry.name)
                flush(self.path)
        except BaseException:
            (self.path / METRICS).unlink(missing_ok=True)
            self.close()
            remove_empty_folders(self._made)
            raise
        finally:
            self._stage = None

    @property
    def root(self) -> Path:
        """The folder to write into: the hidden one while the run is prepared, then the run folder."""
        return self._stage or self.path

    @property
    def checkpoint(self) -> Path:
        """The folder of the model."""
        return self.path / CHECKPOINT

    @property
    def tokens(self) -> Path:
        """The folder of the token shards and the tokenizer."""
        return self.root / TOKENS

    def log(self, **row: Any) -> None:
        """Append one line to metrics.jsonl and hand it to the operating system, so that Ctrl-C loses nothing."""
        self.metrics.write(dumps({"elapsed_s": round(time.time() - self.start, 3), **row}) + "\n")
        self.metrics.flush()

    def drop_rows_after(self, step: int) -> None:
        """Cut metrics.jsonl back to the rows up to `step`, which a resumed run continues; drop an unfinished line."""
        kept_bytes = 0
        with open(self.path / METRICS, "rb") as file:
            for line in file:
                if not line.endswith(b"\n") or _step(line) > step:
                    break
                kept_bytes += len(line)
        self.metrics.truncate(kept_bytes)

    def rows(self) -> list[dict[str, Any]]:
        """Return all lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / METRICS).read_text(encoding="utf-8").splitlines()]


def default_run_folder(command: str) -> Path:
    """Return runs/<command>-<date>-<time>, relative to the current folder."""
    return Path("runs", f"{command}-{time.strftime('%Y%m%d-%H%M%S')}")


def _step(line: bytes) -> int:
    """Return the step of a line of metrics.jsonl; 0 if it has none."""
    try:
        step = json.loads(line).get("step")
    except (ValueError, AttributeError, RecursionError):
        return 0
    return step if isinstance(step, int) else 0
