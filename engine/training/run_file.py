"""The TOML file of a run: a user's file or a recipe begins a run; config.toml in the run folder resumes it.

config.toml has every setting with its resolved value, so that `--config RUN/config.toml` begins the same run again. Its
first line names the command. Its last line is a digest of the others: a resumed run takes changes by flags, and refuses
an edited file.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import torch

from peakgpt.engine.checkpoint.manifest import seal, sealed_fault
from peakgpt.engine.data.run_layout import RUN_CONFIG
from peakgpt.engine.data.text_file import read_text
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.settings.toml_file import read_toml, write_toml
from peakgpt.engine.settings.values import show
from peakgpt.engine.training.run_config import RunConfig, without_preset_fields
from peakgpt.engine.training.run_settings import RunSettings
from peakgpt.kernels.files import write_atomically

SOURCES = ("preset", "init", "tokenizer")
HEAD = "# A run of `peakgpt {command}`. `peakgpt {command} --config THIS_FILE` begins the same run again."
WIDTH = 110  # of the listing


def recipe_names(kind: type[RunSettings] = RunConfig) -> list[str]:
    """Return the names of the recipes of a kind of run, which are TOML files in one folder."""
    return sorted(path.stem for path in kind.RECIPES.glob("*.toml"))


def read_config_file(name_or_file: str, kind: type[RunSettings] = RunConfig) -> dict[str, Any]:
    """Read a recipe, or a TOML file: a path with a slash or with the suffix .toml.

    Returns:
        The values by name.
    Raises:
        ValueError: no such recipe, or a bad file.
    """
    is_file = "/" in name_or_file or name_or_file.endswith(".toml")
    path = Path(name_or_file) if is_file else kind.RECIPES / f"{name_or_file}.toml"
    if not is_file and not path.is_file():
        names = ", ".join(recipe_names(kind))
        raise ValueError(f"--config: got {name_or_file!r}, expected a TOML file or one of the recipes {names}")
    return without_preset_fields(read_toml(path, read_text(path), kind.settings(), kind.other_name))


def read_run_file(run: Path, kind: type[RunSettings] = RunConfig) -> dict[str, Any]:
    """Read config.toml of a run folder.

    Raises:
        ValueError: it is missing, damaged, edited, or of a run of another kind.
    """
    path, command = run / RUN_CONFIG, f"`peakgpt {kind.COMMAND}`"
    try:
        text = read_text(path)
    except ValueError:
        raise ValueError(
            f"run folder {run}: got no readable {RUN_CONFIG}, expected one of {command}; a run that was killed "
            f"before its first step is started again with --out {run}"
        ) from None
    if fault := sealed_fault(path):
        raise ValueError(f"{fault}; --config {path} begins another run")
    if (other := run_command(text)) not in (None, kind.COMMAND):
        raise ValueError(f"run folder {run}: got a run of `peakgpt {other}`, expected one of {command}")
    return read_toml(path, text, kind.settings(), kind.other_name)


def run_command(text: str) -> str | None:
    """Return the command that wrote a config.toml; None if its first line does not say so."""
    match = re.match(r"# A run of `peakgpt (\w+)`", text)
    return None if match is None else match[1]


def write_run_file(folder: Path, config: RunSettings, model: GPTConfig) -> None:
    """Write config.toml into a run folder.

    Args:
        folder: of the run.
        config: of the run.
        model: of the run's model, with all values derived.
    Raises:
        OSError: the folder cannot be written.
    """
    values = {**config.values(), **config.model_fields()}
    if "vocab_size" not in config.fields:
        del values["vocab_size"]  # another tokenizer would have another size
    derived = {name: show(value) for name, value in model.to_dict().items() if values.get(name, value) != value}
    text = write_toml(values, config.settings().values(), derived)
    write_atomically(folder / RUN_CONFIG, seal(f"{HEAD.format(command=config.COMMAND)}\n\n{text}\n").encode())


def listing(config: RunSettings, model: GPTConfig, device: torch.device) -> str:
    """Return all resolved settings as text, section by section; the default follows a value that differs from it."""
    settings = config.settings()
    values = {**config.values(), **_derived(config, model)}
    defaults = {**values, **config.default_values(model, device)}
    resolved = dict(values)
    for name, setting in settings.items():
        if setting.automatic and setting.obstacle(resolved) is None and name not in SOURCES:
            for shown in (values, defaults):
                shown[name] = setting.automatic if shown[name] is None else shown[name]
    sections: dict[str, list[str]] = {}
    for name, setting in settings.items():
        value, default = (show(v, quoted=False) for v in (values[name], defaults[name]))
        changed = "" if value == default else f" (default {default})"
        # No line break inside of an entry.
        sections.setdefault(setting.section, []).append(f"{name} {value}{changed}".replace(" ", "\0"))
    return "\n".join(
        textwrap.fill(
            ", ".join(entries), WIDTH, initial_indent=f"[{section}] ", subsequent_indent="    ", break_long_words=False,
            break_on_hyphens=False,
        ).replace("\0", " ")
        for section, entries in sections.items()
    )  # fmt: skip


def _derived(config: RunSettings, model: GPTConfig) -> dict[str, Any]:
    """Return the fields of GPTConfig, with what it derives in place of None."""
    fields = {**config.model_fields(), "vocab_size": model.vocab_size}
    return {name: getattr(model, name) if value is None else value for name, value in fields.items()}
