"""Models of the Hugging Face hub: the files of one that peakgpt reads, in the cache that its libraries share.

The client `huggingface_hub` decides the rest by its own settings: the cache (HF_HOME), the offline mode
(HF_HUB_OFFLINE), the token (HF_TOKEN, or `hf auth login`), another server (HF_ENDPOINT). It shows a progress bar on a
terminal only. With a revision, the hub is asked for its commit; files of this commit that are in the cache are not
asked for again. If the hub cannot be reached, the cache is used as it is.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peakgpt.engine.data.gguf_header import file_names

if TYPE_CHECKING:
    from huggingface_hub.utils import tqdm

TOKEN = "HF_TOKEN or `hf auth login`"
MAX_LISTED = 5  # names of an error


@dataclass(frozen=True)
class HubModel:
    """A model of the hub.

    Args:
        name: "gpt2" or "org/name".
        revision: a branch, a tag or a commit; None is the default branch.
        file: a .gguf file of the model; it and those that follow a first one, -00001-of-, are then all that is wanted.
    """

    name: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        file = "" if self.file is None else f"/{self.file}"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.name}{file}{revision}"


class HubFiles(NamedTuple):
    """The files that are wanted of a model, as patterns of their names.

    Args:
        always: wanted if they exist.
        first_of: groups of patterns; the first group that matches a file is wanted, the others are not.
    """

    always: tuple[str, ...]
    first_of: tuple[tuple[str, ...], ...] = ()


def download(model: HubModel, files: HubFiles) -> Path:
    """Bring the files of a model into the cache, unless they are there.

    Returns:
        The folder of its snapshot, or its .gguf file.
    Raises:
        ValueError: there is no such model, revision or file, or no access to it, or the hub cannot be reached and the
            cache does not have them.
        OSError: the files cannot be written.
    """
    from huggingface_hub import hf_hub_download, snapshot_download  # 0.5 s

    # A group that matches no file is no fault, and the client would print a warning with all patterns.
    logging.getLogger("huggingface_hub._snapshot_download").addFilter(_is_no_missing_match)
    with _errors_in_one_sentence(model):
        if model.file is not None:
            names = file_names(model.file)  # the first one's, and those of other files of the model
            paths = [hf_hub_download(model.name, name, revision=model.revision) for name in names]
            return Path(paths[0])
        revision = model.revision
        for group in files.first_of or ((),):
            patterns = [*files.always, *group]
            folder = Path(snapshot_download(
                model.name, revision=revision, allow_patterns=patterns, tqdm_class=_bar_of_a_terminal()
            ))  # fmt: skip
            if not group or any(path for pattern in group for path in folder.glob(pattern)):
                return folder
            revision = folder.name  # the commit: the groups are of the same one
        raise ValueError(f"{model}: got {_listing(model)}, expected one of {', '.join(sum(files.first_of, ()))}")


def _is_no_missing_match(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No files matched allow_patterns")


def _bar_of_a_terminal() -> type[tqdm]:
    """Return the client's progress bar; without a terminal it shows nothing, also where the client would show one."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, disable: bool | None = None, **options: Any):
            super().__init__(*args, disable=disable, **options)

    return Bar


def _listing(model: HubModel) -> str:
    """Return the names of a model's weights in other formats, in words."""
    from huggingface_hub import HfApi

    names = HfApi().list_repo_files(model.name, revision=model.revision)
    gguf = [f"{model.name}/{name}" for name in names if name.endswith(".gguf")]
    if gguf:
        return f"GGUF files only, of which one is to be named ({_some(gguf)})"
    return f"a model of the hub without weights that peakgpt reads ({_some(names) or 'no files'})"


def _some(names: list[str]) -> str:
    return ", ".join([*names[:MAX_LISTED], *(["..."] if len(names) > MAX_LISTED else [])])


@contextlib.contextmanager
def _errors_in_one_sentence(model: HubModel) -> Iterator[None]:
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:  # of the client, of its HTTP library, of the disk
        if isinstance(error, ValueError) and str(error).startswith(f"{model}: "):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise OSError(f"{model}: got {error.strerror!r} while its files were written to {constants.HF_HUB_CACHE}, "
                          "expected room for them; HF_HOME names another folder") from None  # fmt: skip
        places = {"hub": constants.ENDPOINT, "cache": constants.HF_HUB_CACHE}
        raise ValueError(f"{model}: {_reason(error).format(**places)}") from None


# Classes of huggingface_hub.errors and what they mean. The first class of an error's ancestors that is here counts.
REASONS = {
    "GatedRepoError": f"got a gated model of {{hub}}, expected a token of an account that has access to it: {TOKEN}",
    "DisabledRepoError": "got a model that {hub} has disabled, expected another one",
    "RepositoryNotFoundError": "got no such folder, and {hub} has no such model, expected one of the two; a private "
                               f"model needs a token: {TOKEN}",
    "RevisionNotFoundError": "got a model of {hub} without this revision, expected a branch, a tag or a commit of it",
    "RemoteEntryNotFoundError": "got a model of {hub} without this file, expected one of its files",
    "OfflineModeIsEnabled": "got no such folder, and HF_HUB_OFFLINE is set while {cache} does not have all files of "
                            "this model, expected one of the two",
    "HFValidationError": "got no such folder, and no name that a model of the hub can have, expected one of the two",
}  # fmt: skip


def _reason(error: BaseException) -> str:
    """Return what is wrong, in words, by the error or by its cause."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    names = [kind.__name__ for one in chain for kind in type(one).__mro__]
    if (found := next((name for name in names if name in REASONS), None)) is not None:
        return REASONS[found]
    status = getattr(getattr(chain[-1], "response", None), "status_code", None)
    if status in (401, 403):
        return f"got status {status} of {{hub}}, expected a token that it accepts: {TOKEN}"
    answer = f"status {status}" if status else f"{type(chain[-1]).__name__}: {_first_line(chain[-1])}"
    return f"got no such folder, and of {{hub}} {answer}, expected one of the two, or its files in {{cache}}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no reason")[:200].replace("{", "{{").replace("}", "}}")
