"""The report of a suite's run: one page with a chart and a table for each case, and the same tables as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from peakgpt.bench.quiet_share import is_quiet
from peakgpt.bench.report import (
    COMPARISONS,
    TABLES,
    case_text,
    comparison_table,
    filled_table,
    ms_text,
    notes,
    table_groups,
    verdicts,
)
from peakgpt.bench.results_file import ResultsFile
from peakgpt.bench.run_results import OURS
from peakgpt.bench.schema import Result
from peakgpt.engine.training.html_page import bars, figure_boxes, heading, note, page, table, text_block
from peakgpt.kernels.files import write_atomically


def write_suite_report(file: ResultsFile) -> Path:
    """Write the page and the text beside the JSON; return the path of the page.

    Raises:
        OSError: the folder cannot be written to.
    """
    write_atomically(file.path.with_suffix(".txt"), f"{file.text()}\n".encode())
    path = file.path.with_suffix(".html")
    write_atomically(path, page("peakgpt benchmarks", _parts(file)).encode())
    return path


def _parts(file: ResultsFile) -> Iterator[str]:
    env, results = file.env, file.rows.results
    yield figure_boxes(_figures(file))
    yield note("A bar is the median time of a call, its line reaches from quartile to quartile. Shorter is faster.")
    for bench, (title, _) in TABLES.items():
        cases = table_groups(results, bench)
        if cases:
            yield heading(title)
        for rows in cases:
            yield heading(case_text(rows[0]), 3) + _chart(list(filter(is_quiet, rows))) + table(*filled_table(rows))
    headings, pairs = comparison_table(results)
    if pairs:
        yield heading(COMPARISONS) + table(headings, pairs)
    if said := notes(results):
        yield heading("Notes") + "".join(map(note, said))
    if failed := verdicts(file.rows):
        yield heading("Not measured") + text_block("\n".join(failed))
    yield heading("Environment") + table(["", ""], [[key, str(value)] for key, value in env.items() if key != "suite"])


def _figures(file: ResultsFile) -> list[tuple[str, str]]:
    device, progress = file.env["device"], file.env.get("suite", {})
    figures = [("device", str(device["name"])), ("threads", str(file.env["threads"])),
               ("commit", (file.env["commit"] or "unknown")[:12]), ("date", file.env["date"][:10])]  # fmt: skip
    if progress:
        figures.append(("cases finished", f"{len(progress['finished'])} of {len(progress['cases'])}"))
        figures.append(("time", f"{sum(progress['seconds'].values()) / 60:.0f} min"))
    return figures


def _chart(rows: Sequence[Result]) -> str:
    """Return bars of the median times with their quartiles, ours first, then from fast to slow."""
    ours = [r for r in rows if r.contender == OURS]
    others = sorted((r for r in rows if r.contender != OURS), key=lambda r: r.median_s)
    return bars([(r.contender, r.median_s, r.q25_s, r.q75_s, f"{ms_text(r.median_s)} ms") for r in (*ours, *others)])
