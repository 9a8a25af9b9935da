"""The names in a run folder, and the model folder that a path given by a user means.

    config.toml          every setting of the run
    tokens/              token shards and tokenizer
    manifest.json        digests of these, written when the run is prepared
    metrics.jsonl        one JSON object a line; locked by the process that writes it
    checkpoints/
        step-00000250/   a model in its family's Hugging Face layout, the training state, and a manifest of both
        best             a link to the checkpoint with the best validation loss
    report.html, curves.png   made from metrics.jsonl
    tensorboard/, wandb/, profile/   if the run writes them
"""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
BEST = "best"
CHECKPOINT = "checkpoint"  # a model alone: `peakgpt quickstart` writes it, and every run of version 0.1.0
STATE = "state"  # the training state of a run of version 0.1.0
TOKENS = "tokens"
METRICS = "metrics.jsonl"
REPORT = "report.html"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
TRACES = "profile"  # of torch.profiler
RUN_CONFIG = "config.toml"
STEP = re.compile(r"step-(\d{8,})")


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Return the steps that a run has checkpoints of, in order."""
    folder = run / CHECKPOINTS
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(match[1]) for entry in entries if (match := STEP.fullmatch(entry.name)) and entry.is_dir())


def model_folder(path: Path | str) -> Path:
    """Return the folder of a model: `path` itself, or the newest checkpoint of the run folder `path`.

    Raises:
        ValueError: the run has no checkpoint yet.
    """
    path = Path(path)
    if (path / "config.json").exists():
        return path
    if steps := saved_steps(path):
        return step_folder(path, steps[-1])
    if (path / CHECKPOINT).is_dir():
        return path / CHECKPOINT
    if (path / METRICS).exists():
        raise ValueError(f"run folder {path}: got no checkpoint in it yet, expected one in {CHECKPOINTS}/")
    return path
