"""Predictions of a model with a head: one JSON object for each example, metrics, and a confusion matrix.

    {"prediction": "good", "probabilities": {"bad": 0.1, "good": 0.9}, "label": "good"}     classes
    {"prediction": 3.4, "label": 4.0}                                                       numbers
    {"prediction": 1, "probabilities": [0.2, 0.8], "label": 1}                              choices
    {"prediction": ["O", "PER"], "label": ["O", "PER"]}                                     words that are not cut off
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from peakgpt.kernels.files import write_atomically

PREDICTIONS, CONFUSION_MATRIX = "predictions.jsonl", "confusion_matrix.png"  # in the folder of a run
MAX_NUMBERED = 20  # classes of a matrix whose cells show their counts


@dataclass(frozen=True)
class Predictions:
    """The predictions for examples.

    Args:
        rows: one object for each example, in their order.
        predicted, truth: one entry for each label: ids of classes or choices, or numbers.
    """

    rows: list[dict[str, Any]]
    predicted: list[Any]
    truth: list[Any]


def write_confusion_matrix(path: Path, predictions: Predictions, names: Sequence[str]) -> None:
    """Draw how many labels of each class were predicted as which class.

    Args:
        path: of the PNG.
        predictions: of classes.
        names: of the classes, by id.
    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib  # takes 0.3 s
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(predictions.truth, predictions.predicted, labels=range(len(names)))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg"}):
        size = min(3.0 + 0.5 * len(names), 20.0)  # inches
        figure = Figure(figsize=(size + 1.0, size), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="predicted", ylabel="label")
        figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0), label="share of the label")
        axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90)
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        for (row, column), count in np.ndenumerate(counts if len(names) <= MAX_NUMBERED else np.empty((0, 0))):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())


def _short(name: str) -> str:
    return (name if len(name) <= 24 else f"{name[:23]}…").replace("$", r"\$")  # $ begins a formula


def probabilities(logits: Tensor) -> list[float]:
    """Return the softmax of one row of logits, rounded."""
    return [round(value, 6) for value in logits.double().softmax(-1).tolist()]
