"""The checkpoints of a run: complete folders that appear by one rename, and how damage in them is found."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from peakgpt.engine.checkpoint.manifest import MANIFEST, expect_files, faults, hash_start, read_manifest, write_manifest
from peakgpt.engine.data.run_layout import BEST, CHECKPOINTS, METRICS, RUN_CONFIG, TOKENS, saved_steps, step_folder
from peakgpt.kernels.files import flush, publish, staging_folder


def write_checkpoint(run: Path, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    """Write the checkpoint of a step. After a crash at any moment it is there, whole and on the disk, or not at all.

    Args:
        run: folder of the run.
        fill: writes the files of the checkpoint into an empty folder.
        facts: of the manifest: "best", a step or None, and "metrics", of the rows before this checkpoint.
    Raises:
        OSError: a file cannot be written; all older checkpoints are still there.
    """
    flush(run / METRICS)  # the rows that the checkpoint refers to
    folder = run / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    flush(run)
    with staging_folder(folder) as stage:
        target = step_folder(run, step)
        new = stage / target.name
        new.mkdir()
        fill(new)
        write_manifest(new, {"step": step, **facts})
        publish(new, target)


def remove_checkpoints(run: Path, kept: Collection[int]) -> None:
    """Delete the checkpoints of all other steps; each is hidden first, so that none is ever incomplete.

    Raises:
        OSError: a folder cannot be moved.
    """
    folder = run / CHECKPOINTS
    if old := [step for step in saved_steps(run) if step not in kept]:
        with staging_folder(folder) as stage:
            for step in old:
                os.rename(step_folder(run, step), stage / str(step))
            flush(folder)


def link_best(run: Path, step: int | None) -> None:
    """Point the link `best` at the checkpoint of a step, atomically; without such a checkpoint remove the link.

    Raises:
        OSError: the link cannot be written.
        ValueError: a folder is in its place that is no copy of a checkpoint of the run.
    """
    link, target = run / CHECKPOINTS / BEST, None if step is None else step_folder(run, step)
    if link.is_dir() and not link.is_symlink():
        _remove_copy(run, link)
    if target is None or not target.is_dir():
        link.unlink(missing_ok=True)
        return
    if link.is_symlink() and os.readlink(link) == target.name:
        return
    with staging_folder(link.parent) as stage:
        os.symlink(target.name, stage / BEST)
        os.replace(stage / BEST, link)
        flush(link.parent)


def _remove_copy(run: Path, best: Path) -> None:
    """Delete the folder `best` of a run that was copied without links: a second copy of a checkpoint.

    Raises:
        ValueError: the run does not have that checkpoint.
    """
    manifests = [folder / MANIFEST for folder in (best, *(step_folder(run, step) for step in saved_steps(run)))]
    own, *others = (path.read_bytes() if path.is_file() else None for path in manifests)
    if own is None or own not in others:
        raise ValueError(f"{best}: got a folder, expected a link to a checkpoint or a copy of one: move it away")
    with staging_folder(best.parent) as stage:
        os.rename(best, stage / BEST)
        flush(best.parent)


def read_checkpoint(run: Path, step: int) -> dict[str, Any]:
    """Return the manifest of a checkpoint, and check everything that it lists except the tensors.

    Reading a safetensors file checks its tensors.

    Raises:
        ValueError: a file is missing or damaged, or the rows of metrics.jsonl before the checkpoint have changed.
    """
    folder = step_folder(run, step)
    manifest = read_manifest(folder)
    expect_files(folder, manifest)
    for fault in _fact_faults(run, step, manifest):
        raise ValueError(fault)
    return manifest


def run_faults(run: Path) -> Iterator[str]:
    """Read everything that a resumed run or a load of a checkpoint reads. Yield one sentence per fault."""
    if is_prepared(run):
        yield from faults(run)
    for step in saved_steps(run):
        found = list(checkpoint_faults(run, step))
        yield from found if step in saved_steps(run) else ()  # a running process may have deleted it meanwhile
    link = run / CHECKPOINTS / BEST
    if link.is_symlink() and not link.exists():
        yield f"{link}: got a link to {os.readlink(link)}, expected one to a checkpoint"


def is_prepared(run: Path) -> bool:
    """Whether a command has prepared the run, so that it has a manifest."""
    return any((run / name).exists() for name in (MANIFEST, RUN_CONFIG, TOKENS))


def checkpoint_faults(run: Path, step: int) -> Iterator[str]:
    """Read all of a checkpoint, and the rows of metrics.jsonl before it. Yield one sentence per fault."""
    folder = step_folder(run, step)
    yield from faults(folder)
    with contextlib.suppress(ValueError):  # that the manifest is damaged is said already
        yield from _fact_faults(run, step, read_manifest(folder))


def _fact_faults(run: Path, step: int, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Compare what a manifest says of other files than its own."""
    if step != manifest["step"]:
        yield f"{step_folder(run, step)}: got the checkpoint of step {manifest['step']}, expected that of step {step}"
    expected, path = manifest["metrics"], run / METRICS
    try:
        size = path.stat().st_size
        if size < expected["bytes"]:
            yield f"{path}: got {size} bytes, expected at least the {expected['bytes']} before step {step} ended"
        elif hash_start(path, expected["bytes"]).hexdigest() != expected["sha256"]:
            yield f"{path}: got another digest of the rows up to step {step} than at its end: the file is damaged"
    except OSError as error:
        yield f"{path}: {error.strerror}, expected the rows up to step {step}"
