"""One HTML page that loads no other file, follows the reader's light or dark setting, and fits a phone."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STYLE = """
:root{color-scheme:light dark;--text:#1c2128;--page:#fff;--soft:#57606a;--line:#d8dee4;--box:#f6f8fa;
--curve-0:#0969da;--curve-1:#d1570c;--curve-2:#1a7f37;--curve-3:#8250df;--curve-4:#bf3989;--curve-5:#7d6a00}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--page:#0d1117;--soft:#9da7b3;--line:#30363d;--box:#161b22;
--curve-0:#58a6ff;--curve-1:#f0883e;--curve-2:#3fb950;--curve-3:#bc8cff;--curve-4:#f778ba;--curve-5:#d4b72c}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:var(--text);
background:var(--page)}
h1{margin-bottom:0}h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1.5rem 0 .4rem;
overflow-wrap:anywhere}.note{color:var(--soft);overflow-wrap:anywhere}
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
.bars{display:grid;grid-template-columns:max-content 1fr max-content;grid-auto-flow:dense;gap:.15rem .8rem;
align-items:center;margin:.3rem 0 .8rem}
.bars span{grid-column:1}.bars i{grid-column:2}.bars em{grid-column:3;text-align:right}
.bars i{position:relative;height:.9rem;background:var(--box);border-radius:.2rem;overflow:hidden}
.bars i>*{position:absolute;top:0;bottom:0;left:0}
.bars b{background:var(--soft);opacity:.55;border-radius:.2rem}.bars .first b{background:var(--curve-0);opacity:1}
.bars i>u{top:calc(50% - 1px);height:2px;background:var(--text)}
.bars em{font-style:normal;font-variant-numeric:tabular-nums;font-size:.9rem}
@media(max-width:38rem){.bars{grid-template-columns:1fr max-content;gap:0 .8rem}.bars em{grid-column:2}
.bars i{grid-column:1/-1;margin-bottom:.4rem;height:.6rem}}
"""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        title: as plain text.
        body: as HTML, see `table`, `text_block` and `note`.
    """

    title: str
    body: str


def page(title: str, parts: Iterable[str], *, window_title: str | None = None) -> str:
    """Return the page.

    Args:
        title: as plain text, the first heading.
        parts: HTML in the order of the page.
        window_title: as plain text; the default is the title.
    """
    e = html.escape
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{e(window_title or title)}</title><style>{STYLE}</style><h1>{e(title)}</h1>"
        f"{''.join(parts)}</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """Return a heading."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table that scrolls on a narrow screen; without headings if all of them are empty."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings) if any(headings) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table>{f'<tr>{head}</tr>' if head else ''}{body}</table></div>"


def text_block(text: str) -> str:
    """Return text with its line ends."""
    return f"<pre>{html.escape(text)}</pre>"


def note(text: str) -> str:
    """Return a remark."""
    return f"<p class=note>{html.escape(text)}</p>"


def figure_boxes(figures: Iterable[tuple[str, str]]) -> str:
    """Return boxes with (label, value)."""
    e = html.escape
    boxes = "".join(f"<div><b>{e(value)}</b><span>{e(label)}</span></div>" for label, value in figures)
    return f"<div class=figures>{boxes}</div>"


def charts_grid(charts: Iterable[tuple[str, str]]) -> str:
    """Return (caption, inline SVG) side by side where the screen is wide enough; empty without charts."""
    figures = "".join(f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>" for title, svg in charts)
    return f"<div class=charts>{figures}</div>" if figures else ""


def bars(rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """Return a bar chart with one bar for each row; the first one is highlighted.

    Args:
        rows: (label, value, low, high, text); a line marks low to high. All lengths are relative to the largest high.
    """
    scale = 100 / max(high for _, _, _, high, _ in rows)
    parts = []
    for number, (label, value, low, high, text) in enumerate(rows):
        whisker = f"<u style='left:{scale * low:.2f}%;width:{max(scale * (high - low), 0.3):.2f}%'></u>"
        bar = f"<i{' class=first' if number == 0 else ''}><b style='width:{scale * value:.2f}%'></b>{whisker}</i>"
        parts.append(f"<span>{html.escape(label)}</span><em>{html.escape(text)}</em>{bar}")
    return f"<div class=bars>{''.join(parts)}</div>"
