"""The files of a checkpoint folder: their names, and how they are replaced.

New files are written into a hidden folder, flushed to the disk and renamed, the weights last: an interrupted write
leaves the old checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peakgpt.engine.data.text_file import read_text
from peakgpt.kernels.files import flush, make_folders, remove_empty_folders, staging_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # lists the shards
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
QUANTIZED = "quantised.safetensors"  # British: a file format, so the name stays
QUANTIZATION = "quantization_config"  # field of config.json that says how the weights are quantized
TRAINING_STATE = "training_state.safetensors"
ENTRIES = (WEIGHTS, INDEX, QUANTIZED)  # a reader opens the weights of a folder by one of these files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(read_text(path))
    except RecursionError:
        raise ValueError(f"{path}: got JSON nested too deeply, expected a JSON object") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}, expected a JSON object") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def replace_files(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace files of a folder atomically, one by one; the weights file or index (ENTRIES) comes last.

    New shards may have the names of old ones. So before new shards are moved, the old weights file or index is deleted.
    A reader that comes during the move finds no weights instead of shards of two models.

    Args:
        folder: created if missing.
        fill: called with a hidden folder, into which it writes the new files.
    Raises:
        OSError: the folder cannot be written; the old files are still there.
    """
    try:
        made = make_folders(folder)
        try:
            with staging_folder(folder) as stage:
                _fill_and_move(folder, stage, fill)
        finally:
            remove_empty_folders(made)
    except OSError as error:
        raise OSError(f"checkpoint {folder}: {error.strerror or error}, expected a folder to write into") from None


def _fill_and_move(folder: Path, stage: Path, fill: Callable[[Path], None]) -> None:
    fill(stage)
    files = sorted(filter(Path.is_file, stage.rglob("*")), key=lambda file: file.name in ENTRIES)
    names = {file.name for file in files}
    for file in files:
        flush(file)
    if INDEX in names:
        _remove(folder / name for name in ENTRIES)
    for file in files:
        target = folder / file.relative_to(stage)
        if target.parent != folder:  # such as the folder of more chat templates
            target.parent.mkdir(exist_ok=True)
        os.replace(file, target)
        if target.parent != folder:
            flush(target.parent)
    if names.intersection(ENTRIES):
        _remove(path for path in folder.iterdir() if _is_weights(path.name) and path.name not in names)
    flush(folder)


def _is_weights(name: str) -> bool:
    return name in ENTRIES or SHARD.fullmatch(name) is not None


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)
