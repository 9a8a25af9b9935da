"""Read a task: the JSON format of BIG-bench, or the same as JSON lines.

    task.json     one object; "examples" is the list of its examples
    task.jsonl    one example a line. A first line with "metrics" has all other fields of the object

An example is {"input": ..., "target": ...}, whose target is a text or a list of accepted texts, or {"input": ...,
"target_scores": {choice: score}}. "choices" of the task are the choices of every example that has a target. Examples
may have more fields, such as a number or a comment. Fields that BIG-bench does not have: "choices", "rationale",
"shots", "human_baseline", "max_tokens". BIG-bench, docs/doc.md, "Creating a JSON task".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peakgpt.engine.data.documents import json_records
from peakgpt.engine.data.json_lines import parse_json
from peakgpt.engine.data.text_file import read_text
from peakgpt.engine.evaluation.metrics import METRICS
from peakgpt.engine.evaluation.task import Example, Task
from peakgpt.kernels.command_line import MAX_COUNT

SUFFIXES = (".json", ".jsonl", ".ndjson")
# Fields that describe a task and change nothing.
DESCRIPTIVE = {"authors", "canary", "comment", "contact", "description", "keywords", "license"}
# Metrics that BIG-bench has and peakgpt does not have; they are named in the results.
NOT_COMPUTED = {"bleurt", "custom_score", "expected_calibration_error", "log_likelihood", "multiple_choice_brier_score",
                "numeric_match_with_0_1_relative_error", "sequence_f1"}  # fmt: skip
FAMILIES = {"rouge": ("rouge1", "rouge2", "rougeLsum")}  # one name of BIG-bench for several metrics
TEXTS = ("name", "task_prefix", "example_input_prefix", "example_output_prefix", "choice_prefix",
         "few_shot_example_separator", "output_regex")  # fmt: skip
KNOWN = {"choices", *(f.name for f in fields(Task))} - {"not_computed"}

Rows = list[tuple[str, dict[str, Any]]]  # (place, object)


def read_task(path: Path | str) -> Task:
    """Read a task.

    Raises:
        ValueError: the file cannot be read, or a field is missing, unknown or wrong; the message names the place.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"task {path}: got a suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    place, settings, rows = _read(path)
    if unknown := sorted(settings.keys() - KNOWN - DESCRIPTIVE):
        raise ValueError(f"{place}: got the field {unknown[0]!r}, expected only {', '.join(sorted(KNOWN))}")
    choices = _texts(place, "choices", settings.pop("choices", []))
    examples = _examples(rows, choices)
    if not examples:
        raise ValueError(f"{place}: got no examples, expected at least one")
    shown = settings.pop("shots", [])
    shots = _examples(_objects(f"{place} shots", shown), choices)
    settings = {name: value for name, value in settings.items() if name not in DESCRIPTIVE}
    return Task(examples=examples, shots=shots, **_settings(place, path.stem, settings, examples))


def _read(path: Path) -> tuple[str, dict[str, Any], Rows]:
    """Return the place of the settings, the settings, and the rows of a file."""
    if path.suffix == ".json":
        value = _object(str(path), parse_json(str(path), read_text(path)))
        if not isinstance(value.get("examples"), list):
            raise ValueError(f"{path}: got fields {', '.join(value):.200}, expected a list in 'examples'")
        return str(path), value, _objects(f"{path} examples", value.pop("examples"))
    rows = [(f"{path}:{number}", row) for number, row in json_records(path)]
    if rows and is_header(rows[0][1]):
        (place, settings), *rows = rows
        return place, settings, rows
    return str(path), {}, rows


def is_header(row: dict[str, Any]) -> bool:
    """Return whether the first line of a .jsonl file holds the settings of a task."""
    return "metrics" in row and "input" not in row


def _objects(place: str, values: Any) -> Rows:
    if not isinstance(values, list):
        raise ValueError(f"{place}: got {values!r:.60}, expected a list of examples")
    places = [f"{place}[{index}]" for index in range(len(values))]
    return [(place, _object(place, value)) for place, value in zip(places, values, strict=True)]


def _object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: got {value!r:.60}, expected an object")
    return value


# ---- examples


def _examples(rows: Rows, choices: Sequence[str]) -> tuple[Example, ...]:
    return tuple(_example(place, row, choices) for place, row in rows)


def _example(place: str, row: dict[str, Any], choices: Sequence[str]) -> Example:
    if not isinstance(row.get("input"), str) or not row["input"].strip():
        raise ValueError(f"{place}: got {_shown(row, 'input')}, expected text in the field 'input'")
    if "target" not in row and "target_scores" not in row:
        raise ValueError(f"{place}: got fields {', '.join(row):.200}, expected 'target' or 'target_scores'")
    targets: tuple[str, ...] = ()
    scores: dict[str, float] = {}
    if "target" in row:
        value = row["target"]
        targets = _texts(place, "target", [value] if isinstance(value, str) else value)
        scores = {choice: float(choice in targets) for choice in choices}
    if "target_scores" in row:
        scores = _target_scores(place, row["target_scores"])
    if scores and not any(target in scores for target in targets or scores):
        raise ValueError(f"{place}: got target {targets[0]!r}, expected one of the choices {', '.join(scores):.200}")
    best = max(scores.values(), default=0.0)
    targets = targets or tuple(choice for choice, score in scores.items() if score == best)
    if not targets:
        raise ValueError(f"{place}: got an empty list in 'target', expected at least one text")
    rationale = row.get("rationale", "")
    if not isinstance(rationale, str):
        raise ValueError(f"{place}: got {_shown(row, 'rationale')}, expected text in the field 'rationale'")
    return Example(place, row["input"], targets, scores, rationale)


def _target_scores(place: str, value: Any) -> dict[str, float]:
    is_scores = isinstance(value, dict) and all(value) and all(map(_is_number, value.values()))
    if not is_scores or len(value) < 2 or max(value.values()) <= 0:
        raise ValueError(f"{place}: got target_scores {value!r:.80}, expected at least two choices with their scores, "
                         "one of them above 0")  # fmt: skip
    return {choice: float(score) for choice, score in value.items()}


# ---- settings


def _settings(place: str, stem: str, given: dict[str, Any], examples: Sequence[Example]) -> dict[str, Any]:
    """Check the settings of a task; return them as arguments of Task."""
    settings = {"name": stem, **given}
    for name in TEXTS:
        if not isinstance(settings.get(name, ""), str):
            raise ValueError(f"{place}: got {_shown(settings, name)}, expected text")
    if not isinstance(settings.get("append_choices_to_input", True), bool):
        raise ValueError(f"{place}: got {_shown(settings, 'append_choices_to_input')}, expected true or false")
    count = settings.get("max_tokens", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_COUNT:
        raise ValueError(f"{place}: got {_shown(settings, 'max_tokens')}, expected an integer of at least 1")
    stop = settings.get("stop_string") or []
    settings["stop_string"] = _texts(place, "stop_string", [stop] if isinstance(stop, str) else stop)
    _check_regex(place, settings.get("output_regex", ""))
    default = ["acc"] if all(example.choices for example in examples) else ["exact_match"]
    names = _texts(place, "metrics", settings.get("metrics", default))
    settings["not_computed"] = tuple(name for name in names if name in NOT_COMPUTED)
    settings["metrics"] = tuple(dict.fromkeys(metric for name in names for metric in _metrics(place, name)))
    return {**settings, **_scores(place, settings)}


def _scores(place: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Check the preferred score and the human baseline, which name metrics."""
    metrics = settings["metrics"]
    if not metrics:
        raise ValueError(f"{place}: got metrics {', '.join(settings['not_computed']) or 'without names'}, expected one "
                         f"of {', '.join(METRICS)}")  # fmt: skip
    preferred = settings.get("preferred_score", metrics[0])
    preferred = FAMILIES.get(preferred, (preferred,))[-1] if isinstance(preferred, str) else preferred
    if preferred not in metrics:
        raise ValueError(f"{place}: got preferred_score {preferred!r}, expected one of {', '.join(metrics)}")
    human = settings.get("human_baseline", {})
    human = {preferred: human} if _is_number(human) else human
    if not isinstance(human, dict) or not human.keys() <= set(metrics) or not all(map(_is_number, human.values())):
        raise ValueError(f"{place}: got human_baseline {human!r:.80}, expected a number, or numbers by metric")
    return {"preferred_score": preferred, "human_baseline": human}


def _metrics(place: str, name: str) -> Iterable[str]:
    """Return the metrics that a name means."""
    if name in NOT_COMPUTED:
        return ()
    if name not in METRICS and name not in FAMILIES:
        raise ValueError(f"{place}: got metric {name!r}, expected one of {', '.join((*METRICS, *FAMILIES))}")
    return FAMILIES.get(name, (name,))


def _check_regex(place: str, regex: str) -> None:
    try:
        groups = re.compile(regex).groups
    except re.error as error:
        raise ValueError(f"{place}: got output_regex {regex!r}: {error}, expected a regular expression") from None
    if groups > 1:
        raise ValueError(f"{place}: got output_regex {regex!r} with {groups} groups, expected at most one; (?:...) "
                         "is not counted")  # fmt: skip


def _texts(place: str, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{place}: got {name} {value!r:.80}, expected texts, none of them empty")
    return tuple(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(row: dict[str, Any], name: str) -> str:
    return f"{name}={row[name]!r:.60}" if name in row else f"fields {', '.join(row):.200}"
