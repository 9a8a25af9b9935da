"""The names in a run folder, and the model folder that a path given by a user means."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = "checkpoint"  # the model in its family's Hugging Face layout
STATE = "state"  # the training state that a resumed run reads
TOKENS = "tokens"  # token shards and tokenizer
METRICS = "metrics.jsonl"  # one JSON object a line
RUN_CONFIG = "config.toml"  # all settings of `peakgpt train`


def model_folder(path: Path | str) -> Path:
    """Return the folder of a model: `path` itself, or the checkpoint of the run folder `path`."""
    path = Path(path)
    is_run = (path / CHECKPOINT).is_dir() and not (path / "config.json").exists()
    return path / CHECKPOINT if is_run else path
