"""Where the metrics of a run go besides metrics.jsonl: TensorBoard, and Weights & Biases. A sink gets the same rows.

A resumed run continues the curves, and no step is there twice. TensorBoard hides what a killed process wrote after the
checkpoint. Weights & Biases keeps it: a resumed run has the same losses, so the same run id gets the later steps only.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from peakgpt.engine.data.run_layout import TENSORBOARD, WANDB
from peakgpt.engine.training.validation_config import MetricsConfig

NOT_METRICS = ("step", "contender")  # keys of a row that are no curves


class MetricSink(Protocol):
    """Takes the rows of metrics.jsonl."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Take a row; a value that is no number is left out."""

    def close(self) -> None:
        """Write what is buffered."""


def require_packages(config: MetricsConfig) -> None:
    """Check that the packages of the chosen sinks are installed, without importing them.

    Raises:
        ValueError: one is missing; the message says how to install it.
    """
    for name in SINKS:
        if getattr(config, f"enable_{name}") and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--enable-{name}: got no package {name}, expected it installed: pip install 'peakgpt[{name}]'"
            )


def open_sinks(
    config: MetricsConfig, folder: Path, values: Mapping[str, Any], *, steps_done: int = 0
) -> list[MetricSink]:
    """Open the sinks that a config chooses.

    Args:
        config: which ones.
        folder: of the run.
        values: the resolved settings of the run.
        steps_done: steps of the checkpoint that a resumed run starts from.
    """
    chosen = (sink for name, sink in SINKS.items() if getattr(config, f"enable_{name}"))
    return [sink(config, folder, values, steps_done) for sink in chosen]


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a row that are curves over steps."""
    return {
        key: value
        for key, value in row.items()
        if key not in NOT_METRICS and isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoardSink:
    """Writes event files into the run folder."""

    def __init__(self, config: MetricsConfig, folder: Path, values: Mapping[str, Any], steps_done: int):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        # Steps from purge_step on, which a killed process has already written, are hidden.
        purge_step = steps_done + 1 if steps_done else None
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge_step)
        if not steps_done:
            self._writer.add_text("settings", "\n".join(f"    {name} = {value}" for name, value in values.items()))

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Logs to Weights & Biases; WANDB_MODE=offline and its other variables act as usual."""

    def __init__(self, config: MetricsConfig, folder: Path, values: Mapping[str, Any], steps_done: int):
        import wandb  # takes seconds

        (folder / WANDB).mkdir(exist_ok=True)
        path = folder / WANDB / "run.txt"  # the id, and the last step that was logged
        run_id, logged = path.read_text().split() if path.exists() else (os.urandom(6).hex(), "0")
        self._logged_before, self._id = int(logged), run_id
        self._state = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._run = wandb.init(
            project=config.wandb_project or os.environ.get("WANDB_PROJECT", "peakgpt"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name), dir=str(folder), id=run_id, resume="allow",
            config=dict(values), settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def log(self, row: Mapping[str, Any]) -> None:
        if row["step"] > self._logged_before:
            os.pwrite(self._state, f"{self._id} {row['step']}\n".encode(), 0)  # steps grow, and so does the text
            self._run.log(numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()
        os.close(self._state)


SINKS = {"tensorboard": TensorBoardSink, "wandb": WandbSink}  # the key is the name of the package and of its flag
