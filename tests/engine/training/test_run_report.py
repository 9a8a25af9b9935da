"""The report of a run: curves and key figures from metrics.jsonl alone, on a page that loads nothing."""

import json
import math
import re

import pytest

from peakgpt.engine.training.html_page import Section, note, table, text_block
from peakgpt.engine.training.run_charts import CHARTS, MAX_POINTS, binned, curves
from peakgpt.engine.training.run_report import key_figures, read_rows, write_report


def rows_of(steps):
    for step in range(1, steps + 1):
        yield {"elapsed_s": step * 2.0, "contender": "peakgpt", "step": step, "loss": 5.0 - step / steps, "lr": 1e-3,
               "tokens_per_s": 1000.0 + step, "mfu": 0.25, "grad_norm": 1.0}  # fmt: skip
    for step in (1, steps):
        yield {"elapsed_s": 99.0, "contender": "peakgpt", "step": step, "validation_loss": 4.0, "perplexity": 54.6,
               "bits_per_byte": 1.5, "wiki/validation_loss": 4.5, "wiki/bits_per_byte": 1.7, "is_best": step == 1,
               "samples": [{"prompt": "a<b", "text": "</script>"}]}  # fmt: skip


def run(folder, rows, tail=""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def test_the_page_loads_nothing_and_has_every_curve(tmp_path):
    sections = [Section("A & B", table(["", "x"], [["a<b", "1"]]) + text_block("<script>") + note("<n>"))]
    page = write_report(run(tmp_path / "my <run>", rows_of(9)), sections, summary="11 MB & more")
    text = page.read_text()
    # XML namespaces look like addresses and are only names.
    assert not re.search(r"src\s*=|href\s*=\s*[\"'](?!#)|url\((?!#)|@import|<script", text)
    for part in ("my &lt;run&gt;", "11 MB &amp; more", "a&lt;b&lt;/script&gt;", "A &amp; B", "&lt;n&gt;"):
        assert part in text
    assert ">validation<" in text, "the first set has its name"
    assert text.count("<svg") == len(CHARTS) and text.count('id="curve-') == len(CHARTS) + 2, "two sets twice"
    assert all(chart.title in text for chart in CHARTS) and "nan" not in text.lower().replace("finance", "")
    assert (tmp_path / "my <run>" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_colors_follow_the_theme_of_the_reader(tmp_path):
    """Fails if the charts have fixed colors: black text on a dark page."""
    text = write_report(run(tmp_path, rows_of(3))).read_text()
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "currentColor" in charts and "var(--curve-0)" in charts and "prefers-color-scheme:dark" in text
    assert not set(re.findall(r"(?:stroke|fill): (#\w+)", charts)) - {"#ffffff", "#cccccc"}


def test_the_same_rows_give_the_same_page(tmp_path):
    texts = [write_report(run(tmp_path, rows_of(5))).read_text() for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("count", [1, MAX_POINTS, MAX_POINTS + 1, 12345])
def test_long_curves_are_averaged_and_keep_their_extremes(count):
    points = [(step, float(step % 7)) for step in range(1, count + 1)]
    bins = binned(points)
    assert len(bins) <= MAX_POINTS and bins[-1][0] == count
    assert max(high for *_, high in bins) == max(y for _, y in points)
    assert min(low for _, _, low, _ in bins) == min(y for _, y in points)


def test_numbers_that_are_not_finite_and_rows_of_other_events_are_left_out():
    rows = [{"step": 1, "loss": None}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 2.0, "contender": "eager"},
            {"step": 4, "skipped": "the loss is nan"}, {"loss": 1.0}]  # fmt: skip
    assert curves(CHARTS[0], rows) == {"eager": [(3, 2.0)]}


def test_key_figures_name_the_best_validation():
    figures = dict(key_figures(list(rows_of(10))))
    assert figures["steps"] == "10" and figures["lowest validation loss, step 1"] == "4.0000"
    assert figures["median MFU"] == "25.0 %" and figures["its bits per byte"] == "1.5000"
    assert key_figures([]) == []


def test_a_run_without_steps_and_a_half_written_line_have_a_report(tmp_path):
    assert "no step was made yet" in write_report(run(tmp_path / "a", [])).read_text()
    assert len(read_rows(run(tmp_path / "b", rows_of(4), tail='{"step": 5, "lo'))) == 6


@pytest.mark.parametrize("text", ["no json\n", "[1]\n", "\xff\n"])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metrics.jsonl"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(ValueError, match="expected the folder of a run"):
        read_rows(tmp_path / "missing")
