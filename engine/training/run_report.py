"""The report of a run: one page that loads no other file, and one picture, both from metrics.jsonl alone."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from peakgpt.engine.data.run_layout import CURVES, METRICS, REPORT, RUN_CONFIG
from peakgpt.engine.training.figures import duration_text, percent_text, speed_text
from peakgpt.engine.training.run_charts import Row, png_charts, svg_charts
from peakgpt.kernels.files import write_atomically

STYLE = """
:root{color-scheme:light dark;--text:#1c2128;--page:#fff;--soft:#57606a;--line:#d8dee4;--box:#f6f8fa;
--curve-0:#0969da;--curve-1:#d1570c;--curve-2:#1a7f37;--curve-3:#8250df;--curve-4:#bf3989;--curve-5:#7d6a00}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--page:#0d1117;--soft:#9da7b3;--line:#30363d;--box:#161b22;
--curve-0:#58a6ff;--curve-1:#f0883e;--curve-2:#3fb950;--curve-3:#bc8cff;--curve-4:#f778ba;--curve-5:#d4b72c}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:var(--text);
background:var(--page)}
h1{margin-bottom:0}h2{font-size:1.15rem;margin:2rem 0 .5rem}.note{color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:1.2rem 0}
.figures div{background:var(--box);border-radius:.4rem;padding:.5rem .8rem}
.figures b{display:block;font-size:1.15rem;font-variant-numeric:tabular-nums}.figures span{color:var(--soft);
font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem 1.5rem}
figure{margin:0}figcaption{font-weight:600;font-size:.9rem}svg{width:100%;height:auto;display:block}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{border-bottom:2px solid var(--soft)}td:first-child,th:first-child{text-align:left}
pre{background:var(--box);padding:1rem;border-radius:.4rem;overflow-x:auto;white-space:pre-wrap;
overflow-wrap:anywhere}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page after the curves.

    Args:
        title: as plain text.
        body: as HTML, see `table`, `text_block` and `note`.
    """

    title: str
    body: str


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as HTML; without headings if all of them are empty."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings) if any(headings) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table>{f'<tr>{head}</tr>' if head else ''}{body}</table></div>"


def text_block(text: str) -> str:
    """Return text with its line ends as HTML."""
    return f"<pre>{html.escape(text)}</pre>"


def note(text: str) -> str:
    """Return a remark as HTML."""
    return f"<p class=note>{html.escape(text)}</p>"


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
    page = folder / REPORT
    write_atomically(page, _page(folder.resolve().name, rows, sections, summary).encode())
    return page


def _page(name: str, rows: Sequence[Row], sections: Sequence[Section], summary: str) -> str:
    e = html.escape
    charts = "".join(
        f"<figure><figcaption>{e(title)}</figcaption>{svg}</figure>" for title, svg in svg_charts(rows)
    )
    figures = "".join(f"<div><b>{e(value)}</b><span>{e(label)}</span></div>" for label, value in key_figures(rows))
    parts = [f"<h1>{e(name)}</h1>", note(summary or "a peakgpt run"), f"<div class=figures>{figures}</div>",
             f"<div class=charts>{charts}</div>" if charts else note("no step was made yet")]  # fmt: skip
    parts += [f"<h2>{e(section.title)}</h2>{section.body}" for section in (*_samples(rows), *sections)]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{e(name)}: peakgpt run</title><style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


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
