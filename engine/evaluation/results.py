"""The results of an evaluation: rows of a table, and the files of its folder.

    results.json        the settings, and the scores of every task
    samples_TASK.jsonl  one line for each example: prompt, answer, and the values of the metrics
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peakgpt.engine.data.json_lines import new_json_lines
from peakgpt.engine.evaluation.corpus_overlap import Overlap
from peakgpt.engine.evaluation.intervals import Estimate
from peakgpt.engine.evaluation.metrics import Answer, Metric
from peakgpt.engine.evaluation.task import Task
from peakgpt.kernels.files import write_atomically
from peakgpt.kernels.strict_json import dumps

RESULTS = "results.json"
OTHER_CHARS = re.compile(r"[^\w.-]+")  # are replaced in names of files
COLUMNS = ("task", "metric", "score", "95 % interval", "examples", "shots", "chance", "human", "dirty", "not dirty")
NEEDED = 6  # the first columns are always shown, the others where a task has a value


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """The score of a task by one metric.

    Args:
        name: of the metric.
        estimate: of all examples.
        chance: score of random choices; None without choices.
        human: score of people, if the file has one.
        clean: of the examples that are not dirty; None without a corpus, or if all are dirty.
    """

    name: str
    estimate: Estimate
    chance: float | None = None
    human: float | None = None
    clean: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The results of a task.

    Args:
        name, source: of the task; its source is a file, or "lm-eval".
        count: examples.
        shots: of each prompt.
        metrics: the preferred one first.
        samples: a row for each example.
        overlap: with the corpus, if there is one.
        notes: what the reader of the table must know.
    """

    name: str
    source: str
    count: int
    shots: int
    metrics: tuple[MetricResult, ...]
    samples: Sequence[Mapping[str, Any]]
    overlap: Overlap | None = None
    notes: tuple[str, ...] = ()

    @property
    def samples_file(self) -> str:
        """The name of the file of the samples."""
        return f"samples_{OTHER_CHARS.sub('_', self.name)}.jsonl"


def score_task(
    task: Task, source: str, metrics: Mapping[str, Metric], answers: Sequence[Answer], *, shots: int, seed: int,
    overlap: Overlap | None = None,
) -> TaskResult:  # fmt: skip
    """Score the answers to a task.

    Args:
        metrics: of `metrics_of`.
        answers: one for each example.
        seed: of bootstraps.
    """
    clean = [a for a, s in zip(answers, overlap.statuses, strict=True) if s != "dirty"] if overlap else []
    examples = [answer.example for answer in answers]
    results = tuple(
        MetricResult(
            name=name, estimate=metrics[name].estimate(answers, seed), chance=metrics[name].chance(examples),
            human=task.human_baseline.get(name), clean=metrics[name].estimate(clean, seed) if clean else None,
        )
        for name in metrics
    )  # fmt: skip
    values = {name: found for name, metric in metrics.items() if (found := metric.values(answers)) is not None}
    samples = [
        {**_sample(answer), **{name: found[i] for name, found in values.items()},
         **({"contamination": overlap.statuses[i]} if overlap else {})}
        for i, answer in enumerate(answers)
    ]  # fmt: skip
    notes = (f"not computed: {', '.join(task.not_computed)}",) if task.not_computed else ()
    return TaskResult(name=task.name, source=source, count=len(answers), shots=shots, metrics=results, samples=samples,
                      overlap=overlap, notes=notes)  # fmt: skip


def _sample(answer: Answer) -> dict[str, Any]:
    row = {"example": answer.example.name, "prompt": answer.prompt, "targets": answer.example.targets}
    if answer.logprobs:
        row |= {"logprobs": dict(answer.logprobs), "choice": answer.choice}
    if answer.outputs:
        row |= {"outputs": answer.outputs, "answers": answer.answers, "answer": answer.text}
    return row


# ---- the table


def table(results: Sequence[TaskResult]) -> str:
    """Return the scores as a table for a terminal, and the notes below it."""
    rows = [_cells(result, metric) for result in results for metric in result.metrics]
    shown = [i for i, _ in enumerate(COLUMNS) if i < NEEDED or any(row[i] for row in rows)]
    rows = [[row[i] for i in shown] for row in (list(COLUMNS), *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"{result.name}: {note}" for result in results for note in result.notes)])


def _cells(result: TaskResult, metric: MetricResult) -> list[str]:
    overlap, estimate = result.overlap, metric.estimate
    interval = "" if estimate.low is None else f"{_number(estimate.low)} to {_number(estimate.high)}"
    dirty = f"{overlap.counts['dirty']} of {len(overlap.statuses)}" if overlap else ""
    clean = metric.clean and metric.clean.value
    return [result.name, metric.name, _number(estimate.value), interval, str(result.count), str(result.shots),
            _number(metric.chance), _number(metric.human), dirty, _number(clean)]  # fmt: skip


def _number(value: float | None) -> str:
    """Return four digits of a number; "" for none."""
    return "" if value is None else f"{value:.4g}"


# ---- the folder


def write_results(folder: Path, settings: Mapping[str, Any], results: Sequence[TaskResult]) -> dict[str, Any]:
    """Write the files of an evaluation.

    Args:
        folder: exists, and has no files.
        settings: of the command; values that JSON does not have are written as text.
    Returns:
        The content of results.json.
    Raises:
        ValueError: a file cannot be written.
    """
    for result in results:
        with new_json_lines(folder / result.samples_file) as file:
            for sample in result.samples:
                file.write(sample)
    plain = {name: str(value) if isinstance(value, (Path, torch.device)) else value for name, value in settings.items()}
    content = {"settings": plain, "tasks": [as_json(result) for result in results]}
    try:
        write_atomically(folder / RESULTS, f"{dumps(content, indent=2)}\n".encode())
    except OSError as error:
        raise ValueError(f"{folder / RESULTS}: got {error.strerror}, expected a file that can be written") from None
    return content


def as_json(result: TaskResult) -> dict[str, Any]:
    """Return a result without its samples, as results.json has it."""
    content = {"name": result.name, "source": result.source, "examples": result.count, "shots": result.shots,
               "samples": result.samples_file, "notes": list(result.notes)}  # fmt: skip
    if result.overlap:
        content["contamination"] = {**result.overlap.counts, "ngram": result.overlap.ngram}
    return {**content, "metrics": {metric.name: _metric(metric) for metric in result.metrics}}


def _metric(metric: MetricResult) -> dict[str, Any]:
    optional = {"chance": metric.chance, "human_baseline": metric.human,
                "not_dirty": metric.clean and asdict(metric.clean)}  # fmt: skip
    return {**asdict(metric.estimate), **{name: value for name, value in optional.items() if value is not None}}
