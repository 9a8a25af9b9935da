"""Models in .gguf files, the format of llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peakgpt.engine.checkpoint.families.catalogue import family_of
from peakgpt.engine.checkpoint.folder import CONFIG
from peakgpt.engine.checkpoint.gguf.architecture import Architecture
from peakgpt.engine.checkpoint.gguf.architectures import ARCHITECTURES
from peakgpt.engine.checkpoint.source_files import GENERATION_CONFIG
from peakgpt.engine.data.gguf_header import TOKENIZER, GGUFHeader, read_files
from peakgpt.engine.model.config import GPTConfig

TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # llama.cpp stops at each of them


@dataclass(frozen=True)
class GGUFModel:
    """The model of a .gguf file; its tensors are read by `load_gguf`."""

    header: GGUFHeader
    architecture: Architecture
    config: GPTConfig

    @property
    def source_files(self) -> dict[str, dict[str, Any]]:
        """The JSON files of a model folder with this model, as `read_source_files` returns them."""
        ids = {name: self.header.get(f"{TOKENIZER}{key}", int) for name, key in TOKEN_IDS.items()}
        ends = [self.header.get(f"{TOKENIZER}{key}", int) for key in ENDS]
        stops = list(dict.fromkeys(token for token in ends if token is not None))
        generation = {GENERATION_CONFIG: {"eos_token_id": stops}} if len(stops) > 1 else {}
        known = {name: token for name, token in ids.items() if token is not None}
        return {CONFIG: {**family_of(self.config).config_json(self.config), **known}, **generation}


def read_gguf(path: Path | str, *, dropout: float | None = None) -> GGUFModel:
    """Read the config of a .gguf file.

    Args:
        path: the file; of a model in several files the first one.
        dropout: replaces the dropout rates, which are 0.
    Raises:
        ValueError: the file is missing or damaged, or has a model that we do not support.
    """
    header = read_files(path)
    try:
        name = header.get("general.architecture", str)
        if name not in ARCHITECTURES:
            raise ValueError(f"general.architecture is {name!r}, expected one of {', '.join(ARCHITECTURES)}")
        architecture = ARCHITECTURES[name]
        return GGUFModel(header, architecture, architecture.config(header, dropout=dropout))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
