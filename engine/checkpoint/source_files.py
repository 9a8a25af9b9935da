"""The JSON files of a model folder, and what stays in them when a loaded model is saved again.

A folder says more than peakgpt uses: which token ends a text, how transformers generates, fields of other libraries.
Saving keeps what it does not change; otherwise transformers would not stop at the end of a text any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from peakgpt.engine.checkpoint.families.family import SECTION, Family
from peakgpt.engine.checkpoint.folder import CONFIG, read_json
from peakgpt.engine.model.config import GPTConfig

GENERATION_CONFIG = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_FILES: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


class TokenizerFiles(Protocol):
    """A tokenizer that can be saved with a model, such as `peakgpt.engine.data.tokenizer.Tokenizer`."""

    @property
    def begin_id(self) -> int | None:
        """The id of the token that begins a text; None if there is none."""

    @property
    def end_id(self) -> int | None:
        """The end-of-text id; None if there is none."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""


def read_source_files(folder: Path | str) -> dict[str, dict[str, Any]]:
    """Return the content of config.json and generation_config.json by file name, if they exist.

    Raises:
        ValueError: a file is not a JSON object.
    """
    return {**_read(Path(folder, CONFIG)), **read_generation_config(folder)}


def read_generation_config(folder: Path | str) -> dict[str, dict[str, Any]]:
    """Return the content of generation_config.json alone, as `read_source_files` does."""
    return _read(Path(folder, GENERATION_CONFIG))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return {path.name: read_json(path)} if path.exists() else {}


def json_files(
    family: Family,
    config: GPTConfig,
    dtype: torch.dtype,
    tokenizer: TokenizerFiles | None,
    source_files: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return the content of config.json, and of generation_config.json if the source has one.

    Args:
        family, config: of the model.
        dtype: of the weights.
        tokenizer: its end-of-text id replaces the source's, unless it is one of them.
        source_files: from `read_source_files`.
    """
    source = source_files.get(CONFIG, {})
    ids = _token_ids(tokenizer, source)
    content = _with_source(family, config, source, family.config_json(config))
    content.pop("dtype", None)  # the name of torch_dtype in newer releases
    files = {CONFIG: {**content, **ids, "torch_dtype": str(dtype).removeprefix("torch.")}}
    if generation := source_files.get(GENERATION_CONFIG):
        replaced = {name: value for name, value in ids.items() if value != source.get(name)}
        files[GENERATION_CONFIG] = {**generation, **replaced}
    return files


def _token_ids(tokenizer: TokenizerFiles | None, source: Mapping[str, Any]) -> dict[str, Any]:
    # A field that the source lacks has transformers' default for the family. A new model has no ids.
    ids = {name: source[name] for name in TOKEN_IDS if name in source} if source else dict.fromkeys(TOKEN_IDS[:2])
    end = ids.get("eos_token_id")
    if tokenizer is not None and tokenizer.end_id not in (None, *(end if isinstance(end, list) else [end])):
        begin = tokenizer.end_id if tokenizer.begin_id is None else tokenizer.begin_id
        ids |= {"bos_token_id": begin, "eos_token_id": tokenizer.end_id}
    return ids


def _with_source(
    family: Family, config: GPTConfig, source: Mapping[str, Any], written: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the written fields with as many of the source's as describe the same model."""
    if source.get("model_type") == family.model_type:
        unaliased = {name: value for name, value in source.items() if name not in (*family.aliases, SECTION)}
        for content in ({**written, **source}, {**unaliased, **written}):  # an unchanged model, a changed one
            if family.config(content) == config:
                return content
    return dict(written)
