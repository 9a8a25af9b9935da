"""The curves of a run, from the rows of metrics.jsonl: as inline SVG for a page, and as one PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD_OUT = "validation"  # the curve of the first held-out set, whose keys have no prefix
Row = dict[str, Any]  # a line of metrics.jsonl
Points = list[tuple[float, float]]

MAX_POINTS = 400  # of a curve, about one for each pixel of its width; more are averaged in bins
TEXT = "#1c2128"
COLORS = ("#0969da", "#d1570c", "#1a7f37", "#8250df", "#bf3989", "#7d6a00")  # of the curves of a chart, in order
SIZE = (5.0, 3.0)  # of a chart with its labels, inches
LEFT, RIGHT, BOTTOM, TOP = 0.7, 0.1, 0.45, 0.3  # room for the labels and the title, inches


@dataclass(frozen=True)
class Chart:
    """One chart: what it shows of each row.

    Args:
        title: with the unit.
        key: of the rows. Curves of several held-out sets have keys that end in "/key".
        scale: factor on the values.
        log: whether the axis of the values is logarithmic.
        of_sets: whether a curve belongs to a held-out set instead of a contender.
    """

    title: str
    key: str
    scale: float = 1.0
    log: bool = False
    of_sets: bool = False


CHARTS = (
    Chart("training loss, nats per token", "loss"),
    Chart("validation loss, nats per token", "validation_loss", of_sets=True),
    Chart("validation, bits per byte", "bits_per_byte", of_sets=True),
    Chart("learning rate", "lr"),
    Chart("throughput, tokens/s", "tokens_per_s"),
    Chart("MFU, %", "mfu", scale=100.0),
    Chart("gradient norm before clipping", "grad_norm", log=True),
)


def curves(chart: Chart, rows: Sequence[Row]) -> dict[str, Points]:
    """Return the finite points (step, value) of each curve of a chart: one per contender, or one per held-out set."""
    found: dict[str, Points] = {}
    for row in rows:
        for key, value in row.items():
            prefix, _, name = key.rpartition("/")
            if name == chart.key and "step" in row and isinstance(value, int | float) and math.isfinite(value):
                curve = prefix or (HELD_OUT if chart.of_sets else row.get("contender", "peakgpt"))
                found.setdefault(curve, []).append((row["step"], value * chart.scale))
    return found


def svg_charts(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield (title, inline SVG) of each chart that has points. Colors are variables of the page's style sheet."""
    for chart in CHARTS:
        series = curves(chart, rows)
        if series:
            yield chart.title, _svg(lambda axes, c=chart, s=series: _draw(axes, c, s), salt=chart.key)


def png_charts(rows: Sequence[Row]) -> bytes:
    """Return one PNG with all charts that have points."""
    filled = [(chart, series) for chart in CHARTS if (series := curves(chart, rows))]
    columns = min(2, max(1, len(filled)))
    count = max(1, math.ceil(len(filled) / columns))
    with _style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(columns * SIZE[0], count * SIZE[1]))
        FigureCanvasAgg(figure)
        for number, (chart, series) in enumerate(filled, 1):
            axes = figure.add_subplot(count, columns, number)
            axes.set_title(chart.title)
            _draw(axes, chart, series)
        _place(figure, columns, count)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, facecolor="white")
    return picture.getvalue()


def _svg(draw: Callable[[Axes], None], salt: str) -> str:
    with _style(salt):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE)
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        _place(figure)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = picture.getvalue()
    text = text[text.index("<svg") :].replace(TEXT, "currentColor")
    for number, color in enumerate(COLORS):
        text = text.replace(color, f"var(--curve-{number})")
    return re.sub(r"font: (\d+(?:\.\d+)?px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)


def _place(figure: Figure, columns: int = 1, rows: int = 1) -> None:
    """Place the charts of a grid. A layout that measures every label takes twice as long as the drawing."""
    width, height = columns * SIZE[0], rows * SIZE[1]
    figure.subplots_adjust(
        left=LEFT / width, right=1 - RIGHT / width, bottom=BOTTOM / height, top=1 - TOP / height,
        wspace=(LEFT + RIGHT) / (SIZE[0] - LEFT - RIGHT), hspace=(BOTTOM + TOP) / (SIZE[1] - BOTTOM - TOP),
    )  # fmt: skip


def _style(salt: str = "peakgpt") -> Any:
    """Return a context with the style of the charts. matplotlib's own style files do not count."""
    import matplotlib  # takes 0.3 s, and most processes draw nothing

    return matplotlib.rc_context({
        **matplotlib.rcParamsDefault, "backend": "agg", "svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9,
        "text.color": TEXT, "axes.edgecolor": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
    })  # fmt: skip


def _draw(axes: Axes, chart: Chart, series: dict[str, Points]) -> None:
    """Draw the curves of a chart. Where points were averaged, a band shows their lowest and highest value."""
    for number, (name, points) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        x, mean, low, high = zip(*binned(points), strict=True)
        if len(points) > len(x):
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        marker = {"marker": "o", "markersize": 3} if len(x) < 30 else {}
        # The first curve is thin and on top, so that both show where contenders have the same losses.
        shape = {"linewidth": 1.3, "zorder": 3} if number == 0 else {"linewidth": 2.6}
        axes.plot(x, mean, color=color, label=name, gid=f"curve-{name}", **shape, **marker)
    if chart.log and all(y > 0 for points in series.values() for _, y in points):
        axes.set_yscale("log")
        for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_formatter("{x:g}")
    axes.set_xlabel("step")
    axes.grid(visible=True, color=TEXT, alpha=0.12, linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(series) > 1:
        axes.legend()


def binned(points: Points) -> list[tuple[float, float, float, float]]:
    """Return (last step, mean, lowest, highest) of at most MAX_POINTS bins with the same number of points."""
    size = math.ceil(len(points) / MAX_POINTS)
    bins = (points[i : i + size] for i in range(0, len(points), size))
    return [
        (group[-1][0], sum(values := [y for _, y in group]) / len(values), min(values), max(values)) for group in bins
    ]
