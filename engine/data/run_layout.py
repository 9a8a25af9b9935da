"""The names in a run folder, and the model folder that a path given by a user means."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = "checkpoint"  # the model in its family's Hugging Face layout
STATE = "state"  # the training state that a resumed run reads
TOKENS = "tokens"  # token shards and tokenizer
METRICS = "metrics.jsonl"  # one JSON object a line
REPORT = "report.html"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"  # event files, if the run writes them
WANDB = "wandb"  # what Weights & Biases writes, if the run does
TRACES = "profile"  # traces of torch.profiler, if the run makes them
SETTINGS = "settings.json"  # the flags of `peakgpt train`


def model_folder(path: Path | str) -> Path:
    """Return the folder of a model: `path` itself, or the checkpoint of the run folder `path`."""
    path = Path(path)
    is_run = (path / CHECKPOINT).is_dir() and not (path / "config.json").exists()
    return path / CHECKPOINT if is_run else path
