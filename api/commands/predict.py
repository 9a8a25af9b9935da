"""peakgpt predict: the labels of examples, by a checkpoint of peakgpt finetune."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from peakgpt.engine.data.json_lines import new_json_lines
from peakgpt.engine.data.model_source import NAMES
from peakgpt.engine.finetuning.loaded import load_task
from peakgpt.engine.finetuning.predictions import write_confusion_matrix
from peakgpt.engine.finetuning.rows import Row, read_rows
from peakgpt.engine.training.train_config import best_dtype
from peakgpt.kernels.command_line import integer
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.kernels.strict_json import dumps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=f"model that peakgpt finetune adapted to labels: {NAMES}")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE",
                        help="files of JSON lines, with labels or without")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="new file of the predictions (default: print them)")
    parser.add_argument("--confusion-matrix", type=Path, metavar="FILE",
                        help="PNG of labels against predictions; needs data with labels")  # fmt: skip
    parser.add_argument("--truncate", action="store_true", help="cut examples that are too long for the model")
    parser.add_argument("--batch", type=integer(), default=32, help="examples of a forward pass (default 32)")
    parser.add_argument("--dtype", choices=("float32", "best"), default="float32",
                        help="best: bfloat16 if the device multiplies it (default float32)")  # fmt: skip
    parser.add_argument("--device", help='"cpu" or "cuda" (default: "cuda" if available)')


def run(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    dtype = best_dtype(device) if args.dtype == "best" else torch.float32
    task, model = load_task(args.checkpoint, args.data, truncate=args.truncate, dtype=dtype)
    rows = read_rows(args.data)
    labelled = _have_labels(rows, task.config.labels.label_field)
    if args.confusion_matrix is not None and not (labelled and task.labels.names):
        raise ValueError("--confusion-matrix: got data without classes, expected rows with labels that are classes")
    examples = task.encode(rows, labelled=labelled)
    with _writer(args.out) as write:  # raises before the model runs
        found = task.predict(model.to(device), examples, args.batch)
        for row, prediction in zip(rows, found.rows, strict=True):
            write({**row.values, **prediction})
    if args.confusion_matrix is not None:
        write_confusion_matrix(args.confusion_matrix, found, task.labels.names)
    if labelled:
        scores = task.scores(found.predicted, found.truth)
        print(", ".join(f"{name} {value:.4f}" for name, value in scores.items()), file=sys.stderr)
    return 0


def _have_labels(rows: list[Row], field: str) -> bool:
    """Return whether all rows have a label.

    Raises:
        ValueError: only some have one.
    """
    without = [row for row in rows if field not in row.values]
    if without and len(without) < len(rows):
        raise without[0].error(f"got no label in {field!r}, expected one in all rows or in none")
    return not without


@contextlib.contextmanager
def _writer(path: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes an object as a line of a new file, or prints it."""
    if path is None:
        yield lambda row: print(dumps(row))
        return
    with new_json_lines(path) as lines:
        yield lines.write
