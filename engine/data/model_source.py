"""What a user names a model by: a folder, a .gguf file, or a name of the Hugging Face hub. Decided here, once.

    runs/mine, ./gpt2, /data/model.gguf     a folder of a model or of a run, or a file; if it exists, it wins
    gpt2, org/name                          a model of the hub
    org/name@v1.0                           its branch, tag or commit
    org/name/model-q8_0.gguf                one of its .gguf files
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from peakgpt.engine.data.gguf_header import SUFFIX as GGUF
from peakgpt.engine.data.hub import HubFiles, HubModel, download
from peakgpt.engine.data.run_layout import model_folder

NAMES = f"a name of the hub (gpt2, org/name, org/name@revision), a folder of a model or a run, or a {GGUF} file"
_PART = r"[A-Za-z0-9][\w.-]*"
HUB_NAME = re.compile(rf"(?P<name>{_PART}(?:/{_PART})?)(?:/(?P<file>[^@]+\{GGUF}))?(?:@(?P<revision>\S+))?")


def locate(source: Path | str, files: HubFiles, revision: str | None = None) -> Path:
    """Return the folder or the .gguf file of a model; the files of a model of the hub are downloaded.

    Args:
        source: what the user wrote. A Path is never a name of the hub.
        files: wanted of a model of the hub.
        revision: of a model of the hub, instead of one behind "@".
    Returns:
        A .gguf file, or a folder; of a run, that of its newest checkpoint.
    Raises:
        ValueError: there is no such model; a revision of a folder.
        OSError: the files cannot be written.
    """
    found = parse_source(source, revision)
    if isinstance(found, HubModel):
        try:
            return download(found, files)
        except ValueError as error:
            raise ValueError(f"{error}{_nearest(Path(source))}") from None
    if not found.exists():
        raise ValueError(f"{source}: got no such folder or {GGUF} file, expected the path of a model, or a name of "
                         f"the hub{_nearest(found)}")  # fmt: skip
    return found if found.is_file() else model_folder(found)


def parse_source(source: Path | str, revision: str | None = None) -> Path | HubModel:
    """Return the path or the model of the hub that a user means; neither needs to exist.

    Raises:
        ValueError: a revision of a path, or two revisions.
    """
    path = Path(os.path.expanduser(source))
    match = None if path.exists() or not isinstance(source, str) else HUB_NAME.fullmatch(source)
    if match is None or match["name"].endswith(GGUF):
        if revision is not None:
            raise ValueError(f"revision is {revision!r} for the path {source}, expected none: only models of the hub "
                             "have revisions")  # fmt: skip
        return path
    if revision is not None and match["revision"] is not None:
        raise ValueError(f"revision is {revision!r} for {source}, expected one of the two")
    return HubModel(match["name"], revision or match["revision"], match["file"])


def name_and_revision(source: Path | str, revision: str | None, folder: Path) -> tuple[str, str | None]:
    """Return what another process can find the same model by: its name and revision on the hub, or an absolute path.

    Args:
        source, revision: of `locate`.
        folder: its result.
    """
    found = parse_source(source, revision)
    if not isinstance(found, HubModel):
        return str(folder.resolve()), None
    return found.name if found.file is None else f"{found.name}/{found.file}", found.revision


def is_path(source: str) -> bool:
    """Return whether a text is a path rather than a name of the hub."""
    return not isinstance(parse_source(source), HubModel)


def _nearest(path: Path) -> str:
    """Name the folder or .gguf file here that a missing one may mean."""
    parent = path.parent
    try:
        names = [entry.name for entry in os.scandir(parent) if entry.is_dir() or entry.name.endswith(GGUF)]
    except OSError:
        return ""
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f"; nearest here: {parent / nearest[0]}" if nearest else ""
