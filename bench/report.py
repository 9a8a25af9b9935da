"""What a run found, for people: a table for the terminal and one self-contained HTML page."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from peakgpt.kernels.clock import Result

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2128;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}th,td{padding:.25rem .7rem;text-align:right;white-space:nowrap}
th{border-bottom:2px solid #57606a}td{border-bottom:1px solid #d8dee4}td:first-child,th:first-child{text-align:left}
pre{background:#f6f8fa;padding:1rem;overflow-x:auto}svg{max-width:100%;height:auto}.note{color:#57606a}
"""


def groups(results: Iterable[Result]) -> dict[tuple, list[Result]]:
    """Contenders of one case together, in the order measured."""
    found: dict[tuple, list[Result]] = {}
    for r in results:
        found.setdefault((r.bench, r.dtype, r.device, *sorted(r.case.items())), []).append(r)
    return found


def speedup(result: Result, others: Sequence[Result]) -> float | None:
    """Eager's median time over this one's."""
    eager = next((o for o in others if o.contender == "eager"), None)
    return None if eager is None or eager is result else eager.median_s / result.median_s


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"


def _ms(r: Result) -> str:
    return f"{1e3 * r.median_s:.3g} ({1e3 * r.q25_s:.3g} to {1e3 * r.q75_s:.3g})"


def _tokens_per_s(r: Result) -> str:
    tokens = r.case["tokens"] * r.case.get("batch", 1) * r.case.get("steps", 1)
    return f"{tokens / r.median_s:,.0f}"


# One table a kind of benchmark: its title, and per column a heading and how a row reads.
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "train": (
        "Training, model FLOPs (6N + 12 L H Q T a token)",
        {
            "contender": lambda r, _: f"{r.contender}, {r.dtype}",
            "tokens/s": lambda r, _: _tokens_per_s(r),
            "MFU": lambda r, _: _percent(r.flops_fraction),
            "ms (quartiles)": lambda r, _: _ms(r),
            "against eager": lambda r, rs: _times(speedup(r, rs)),
        },
    ),
    "decode": (
        "Greedy decoding with a KV cache, one stream",
        {
            "contender": lambda r, _: f"{r.contender}, {r.dtype}",
            "tokens/s": lambda r, _: _tokens_per_s(r),
            "MBU": lambda r, _: _percent(r.bytes_fraction),
            "against eager": lambda r, rs: _times(speedup(r, rs)),
        },
    ),
    "op": (
        "Ops, work FLOPs (what must be computed; causal is half)",
        {
            "op": lambda r, _: f"{r.case['op']}, {r.case['pass']}, {r.dtype}",
            "contender": lambda r, _: f"{r.contender} ({r.backend})",
            "ms (quartiles)": lambda r, _: _ms(r),
            "GFLOP/s": lambda r, _: f"{1e3 * r.tflops:,.0f}" if r.tflops else "",
            "GB/s": lambda r, _: f"{r.gbs:.1f}" if r.gbs else "",
            "of peak FLOP/s": lambda r, _: _percent(r.flops_fraction),
            "of bandwidth": lambda r, _: _percent(r.bytes_fraction),
            "against eager": lambda r, rs: _times(speedup(r, rs)),
        },
    ),
}


def _rows(results: Iterable[Result], bench: str) -> list[list[str]]:
    columns = TABLES[bench][1].values()
    return [
        [read(r, rs) for read in columns] for rs in groups(r for r in results if r.bench == bench).values() for r in rs
    ]


def tables(results: Sequence[Result], benches: Iterable[str] = TABLES) -> list[Table]:
    """The results as tables for rich's console, one a kind of benchmark that has any."""
    made = []
    for bench in benches:
        if rows := _rows(results, bench):
            table = Table(title=TABLES[bench][0], title_justify="left")
            for i, heading in enumerate(TABLES[bench][1]):
                table.add_column(heading, justify="right" if i else "left")
            for row in rows:
                table.add_row(*row)
            made.append(table)
    return made


def notes(results: Iterable[Result]) -> list[str]:
    """Rounds left out, and what the peaks are, said once each."""
    said = {f"{r.bench}: {r.dropped} of {r.rounds + r.dropped} rounds dropped, the machine was busy elsewhere"
            for r in results if r.dropped}  # fmt: skip
    return sorted(
        said | {r.note for r in results if r.note} | {f"peak: {r.peak_source}" for r in results if r.peak_source}
    )


def write_report(
    path: Path | str, *, rows: Sequence[dict[str, Any]], results: Sequence[Result], environment: dict[str, Any],
    corpus: str, sample: str,
) -> None:  # fmt: skip
    """Write the page of a run: curves, tables, environment; nothing is loaded from elsewhere.

    Args:
        rows: of metrics.jsonl.
        results: measured cases.
        environment: as clock.environment() gives it.
        corpus: one line about the text.
        sample: generated text.
    """
    e = html.escape
    parts = [f"<p>{e(corpus)}</p>", _curves(rows)]
    for bench, (title, columns) in TABLES.items():
        if cells := _rows(results, bench):
            parts += [f"<h2>{e(title)}</h2>", _html_table(list(columns), cells)]
    parts += [f"<p class=note>{e(note)}</p>" for note in notes(results)]
    parts += ["<h2>Sample</h2>", f"<pre>{e(sample)}</pre>", "<h2>Environment</h2>",
              _html_table(["", ""], [[str(k), str(v)] for k, v in environment.items()])]  # fmt: skip
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>peakgpt run</title><style>{STYLE}</style><h1>peakgpt run</h1>{''.join(parts)}</html>\n"
    )
    temporary = Path(f"{path}.partial")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


def _html_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    """Loss of both contenders by step, and bits per byte of the held-out text, as inline SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for contender, style in (("eager", {"lw": 2.5, "color": "#f0883e"}), ("peakgpt", {"lw": 1, "color": "#0969da"})):
        points = [(r["step"], r["loss"]) for r in rows if r["contender"] == contender and "loss" in r]
        if points:
            left.plot(*zip(*points, strict=True), label=contender, **style)
    left.set(xlabel="step", ylabel="training loss, nats per token")
    left.legend()
    points = [(r["step"], r["bits_per_byte"]) for r in rows if "bits_per_byte" in r]
    right.plot(*zip(*points, strict=True), marker="o", color="#0969da")
    right.set(xlabel="step", ylabel="held-out text, bits per byte")
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    plt.close(figure)
    text = picture.getvalue()
    return text[text.index("<svg") :]
