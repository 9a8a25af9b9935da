"""The folder of one training run. One process at a time writes it; a lock that ends with the process says which."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peakgpt.engine.checkpoint.manifest import MANIFEST, expect_files, read_manifest, write_manifest
from peakgpt.engine.checkpoint.run_checkpoints import is_prepared
from peakgpt.engine.data.run_layout import CHECKPOINT, CHECKPOINTS, METRICS, RUN_CONFIG, STATE, TOKENS
from peakgpt.engine.training.metrics_log import MetricsLog
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

PREPARED = (TOKENS, RUN_CONFIG)  # what a run moves into its folder when it is prepared


class Taken(ValueError):
    """Another run has the folder, or it contains files."""


class RunFolder:
    """One run's settings, tokens, metrics, checkpoints, results and report.

    Attributes:
        path: of the folder.
        metrics: its metrics.jsonl, which is locked while the folder is open.
    """

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
            ValueError: there is no such folder, no run in it, a running process writes it, a file of it is damaged, or
                a version wrote it that had other checkpoints.
        """
        run = cls.__new__(cls)
        run.path, run._stage, run._made = Path(path), None, []
        if not (run.path / METRICS).is_file():
            missing = f"{METRICS} in it" if run.path.is_dir() else "such folder"
            raise ValueError(f"run folder {path}: got no {missing}, expected the folder of a run")
        if (run.path / STATE).is_dir() and not (run.path / CHECKPOINTS).is_dir():
            raise ValueError(
                f"run folder {path}: got {STATE}/ of an older version, expected {CHECKPOINTS}/; `peakgpt generate` "
                "takes its model, but the run cannot go on"
            )
        run._open(new=False)
        return run

    def _check_files(self) -> None:
        """Compare the files of a prepared run with its manifest."""
        if self._is_unprepared() or (is_prepared(self.path) and not (self.path / MANIFEST).exists()):
            raise ValueError(
                f"run folder {self.path}: got no {MANIFEST}, expected one; a run that was killed before its first step "
                f"is started again with --out {self.path}"
            )
        if is_prepared(self.path):
            expect_files(self.path, read_manifest(self.path))

    def _open(self, *, new: bool) -> None:
        """Open metrics.jsonl and lock it. Of several processes that try, one succeeds."""
        has_files = Taken(f"run folder {self.path}: got a folder with files, expected a new or empty one")
        path, restarted = self.path / METRICS, new and self._is_unprepared()
        if new and not restarted and any(self.path.iterdir()):
            raise has_files
        try:
            metrics = MetricsLog(path, new=new and not restarted)
        except FileExistsError:
            raise has_files from None
        try:
            lock(metrics.fileno())
            if not is_open_at(metrics.fileno(), path):
                raise BlockingIOError
            if restarted and self._is_unprepared():
                self._remove_prepared_part()
            if not new:
                self._check_files()
            sweep(self.path)
            if restarted and any(entry != path or entry.stat().st_size for entry in self.path.iterdir()):
                raise has_files
            metrics.read()
        except BlockingIOError:
            metrics.close()
            raise Taken(
                f"run folder {self.path}: a running process writes it, expected a free one"
            ) from None
        except BaseException:
            metrics.close()
            raise
        self.metrics, self.start = metrics, time.time()

    def _is_unprepared(self) -> bool:
        """Return whether the folder has only what a run writes before it is prepared."""
        entries = {entry.name for entry in self.path.iterdir()}
        stages = {name for name in entries if STAGE.fullmatch(name)}
        own = entries - stages - set(PREPARED)
        return bool(stages) and own == {METRICS} and not (self.path / METRICS).stat().st_size

    def _remove_prepared_part(self) -> None:
        """Delete what a run moved into the folder before it was killed; the manifest would have come last."""
        for name in PREPARED:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
            else:
                (self.path / name).unlink(missing_ok=True)

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
                write_manifest(stage, {}, sealed=[RUN_CONFIG])
                for entry in stage.rglob("*"):
                    flush(entry)
                # The manifest comes last: it says that the run is prepared.
                for entry in sorted(stage.iterdir(), key=lambda entry: entry.name == MANIFEST):
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
        """The folder of a model alone, which a run without checkpoints writes."""
        return self.path / CHECKPOINT

    @property
    def tokens(self) -> Path:
        """The folder of the token shards and the tokenizer."""
        return self.root / TOKENS

    def log(self, **row: Any) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            OSError: it cannot be written.
        """
        self.metrics.append({"elapsed_s": round(time.time() - self.start, 3), **row})

    def continue_clock(self) -> None:
        """Count `elapsed_s` of the next lines from the last line on, so that it is the time of all processes."""
        if rows := self.metrics.rows():
            self.start -= rows[-1].get("elapsed_s", 0.0)

    def rows(self) -> list[dict[str, Any]]:
        """Return all lines of metrics.jsonl."""
        return self.metrics.rows()


def default_run_folder(command: str) -> Path:
    """Return runs/<command>-<date>-<time>, relative to the current folder."""
    return Path("runs", f"{command}-{time.strftime('%Y%m%d-%H%M%S')}")

