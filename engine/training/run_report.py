"""The report of a run: one page that loads no other file, and one picture, both from metrics.jsonl alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from peakgpt.engine.data.run_layout import CURVES, METRICS, REPORT, RUN_CONFIG
from peakgpt.engine.training.figures import duration_text, percent_text, speed_text
from peakgpt.engine.training.html_page import (
    Section,
    charts_grid,
    figure_boxes,
    heading,
    note,
    page,
    text_block,
)
from peakgpt.engine.training.run_charts import Row, png_charts, svg_charts
from peakgpt.kernels.files import write_atomically


def settings_section(folder: Path | str) -> list[Section]:
    """Return the settings of a run as a section; none if the folder has no file of settings."""
    path = Path(folder, RUN_CONFIG)
    return [Section("Settings", text_block(path.read_text(encoding="utf-8")))] if path.is_file() else []


def read_rows(folder: Path | str) -> list[Row]:
    """Read the complete lines of a run's metrics.jsonl.

    Raises:
        ValueError: there is none, or a line is not a JSON object.
    """
    path = Path(folder, METRICS)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"run folder {folder}: {METRICS}: {reason}, expected the folder of a run") from None
    rows = []
    for number, line in enumerate((line for line in lines if line.endswith("\n")), 1):  # one may be half written
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is {line.strip()[:40]!r}, expected a JSON object")
        rows.append(row)
    return rows


def write_report(folder: Path | str, sections: Sequence[Section] = (), *, summary: str = "") -> Path:
    """Write report.html and curves.png of a run; return the path of the page.

    Args:
        folder: of the run, with metrics.jsonl.
        sections: further parts of the page.
        summary: one line below the title.
    Raises:
        ValueError: metrics.jsonl is missing or damaged.
        OSError: the folder cannot be written.
    """
    folder, rows = Path(folder), read_rows(folder)
    write_atomically(folder / CURVES, png_charts(rows))
    path = folder / REPORT
    write_atomically(path, _page(folder.resolve().name, rows, sections, summary).encode())
    return path


def _page(name: str, rows: Sequence[Row], sections: Sequence[Section], summary: str) -> str:
    charts = charts_grid(svg_charts(rows))
    parts = [note(summary or "a peakgpt run"), figure_boxes(key_figures(rows)),
             charts or note("no step was made yet")]  # fmt: skip
    parts += [heading(section.title) + section.body for section in (*_samples(rows), *sections)]
    return page(name, parts, window_title=f"{name}: peakgpt run")


def key_figures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (label, value) of the figures that describe a run in a glance."""
    steps = [r for r in rows if "loss" in r and r.get("contender", "peakgpt") == "peakgpt"]
    validations = [r for r in rows if r.get("validation_loss") is not None]
    found: list[tuple[str, str]] = []
    if steps:
        found.append(("steps", f"{steps[-1]['step']:,}"))
        if steps[-1]["loss"] is not None:  # a number that is not finite
            found.append(("training loss, last step", f"{steps[-1]['loss']:.4f}"))
    if validations:
        best = min(validations, key=lambda r: r["validation_loss"])
        found.append((f"lowest validation loss, step {best['step']:,}", f"{best['validation_loss']:.4f}"))
        if best.get("perplexity") is not None:
            found.append(("its perplexity", f"{best['perplexity']:.4g}"))
        if best.get("bits_per_byte") is not None:
            found.append(("its bits per byte", f"{best['bits_per_byte']:.4f}"))
    for key, label, text in (("tokens_per_s", "median throughput", speed_text), ("mfu", "median MFU", percent_text)):
        if values := [r[key] for r in steps if r.get(key) is not None]:
            found.append((label, text(median(values))))
    if rows and "elapsed_s" in rows[-1]:
        found.append(("time", duration_text(rows[-1]["elapsed_s"])))
    return found


def _samples(rows: Sequence[Row]) -> list[Section]:
    """Return the samples of the last validation."""
    row: dict[str, Any] = next((r for r in reversed(rows) if r.get("samples")), {})
    texts = [f"{sample['prompt']}{sample['text']}" for sample in row.get("samples", ())]
    return [Section(f"Samples after step {row['step']:,}", "".join(map(text_block, texts)))] if texts else []
