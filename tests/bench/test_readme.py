"""The tables of the documents: cells, sources, comments around them, formats that are not compared."""

import pytest

from peakgpt.bench import readme
from peakgpt.bench.chosen_runs import ANY, Group, History, Run
from peakgpt.bench.document_tables import (
    TABLES,
    Table,
    against,
    against_fastest,
    fastest,
    memory_ratio,
    milliseconds,
    share_of_peak,
    tokens_per_s,
)
from peakgpt.bench.schema import Result, write_results
from peakgpt.bench.timing import Timing

COMMIT = "c" * 40
GROUP = Group(bench="decode", dtype="int4", case={"tokens": ANY},
              contenders=("peakgpt", "peakgpt by 32", "llama.cpp", "openvino"))  # fmt: skip


def row(contender, seconds, bits, **changes):
    fields = {"bench": "decode", "case": {"tokens": 64}, "contender": contender, "backend": "", "device": "cpu",
              "dtype": "int4", "weight_bits": bits, **changes}  # fmt: skip
    return Result.of(Timing((seconds,) * 7, dropped=1), **fields)


@pytest.fixture
def runs(tmp_path):
    results = [row("peakgpt", 0.1, 4.25, memory_bytes=100, flops=5e9, flops_kind="work", peak_flops_s=1e11),
               row("peakgpt by 32", 0.2, 4.5), row("llama.cpp", 0.3, 4.5), row("openvino", 0.25, 4.0)]  # fmt: skip
    results[2] = row("llama.cpp", 0.3, 4.5, memory_bytes=200)
    environment = {"commit": COMMIT, "date": "2026-11-28T10:00", "device": {"name": "Zen 4"}, "threads": 2}
    write_results(tmp_path / "decode-cpu-20261128-100000.json", results, environment)
    return [Run.load(tmp_path / "decode-cpu-20261128-100000.json")]


def table(*rows, document="README.md"):
    return Table(name="t", document=document, headings=("a", "b"), rows=rows)


def test_cells_and_sources(runs):
    others = ("llama.cpp", "openvino")
    text = readme.render(
        table(
            ("speed", tokens_per_s(GROUP)),
            (milliseconds(GROUP), share_of_peak(GROUP)),
            (fastest(GROUP, others, "peakgpt by 32"), against_fastest(GROUP, others, "peakgpt by 32")),
            (against(GROUP, "llama.cpp", "peakgpt by 32"), memory_ratio(GROUP, "llama.cpp")),
            (share_of_peak(GROUP, "llama.cpp"), memory_ratio(GROUP, "openvino")),
        ),
        runs, History([COMMIT]),
    )  # fmt: skip
    assert text == """\
| a | b |
| --- | --- |
| speed | 640 |
| 100 | 50.0 % |
| llama.cpp 213 | 1.50 x (1.47 to 1.53) |
| 1.50 x (1.47 to 1.53) | 0.50 |
|  |  |

- decode-cpu-20261128-100000.json (commit cccccccccccc, 2026-11-28, Zen 4, 2 threads): 7 of 8 rounds, tokens 64, \
peak 0.100 TFLOP/s in int4"""


def test_unlike_weight_formats_never_share_a_row(runs):
    """openvino is the fastest, but has 4.0 bits per weight, and llama.cpp's 4.5 are not the 4.25 of ours by 64."""
    with pytest.raises(ValueError, match="unlike weight formats"):
        readme.render(table(("", against(GROUP, "llama.cpp"))), runs, History([COMMIT]))


def test_table_is_written_between_its_comments_and_nowhere_else():
    text = "before\n<!-- results: t -->\nold | row\n<!-- end -->\nafter\n"
    written = readme._with_table(text, table(), "new\\1 | row")
    assert written == "before\n<!-- results: t -->\nnew\\1 | row\n<!-- end -->\nafter\n"
    assert readme._with_table(written, table(), "new\\1 | row") == written
    for bad in ("no comments", text + text):
        with pytest.raises(ValueError, match=r"README\.md: expected <!-- results: t --> and <!-- end --> once"):
            readme._with_table(bad, table(), "new")


def test_both_allocators_are_in_the_table_of_training():
    (training,) = [t for t in TABLES if t.name == "training"]
    names = [row[0] for row in training.rows]
    assert {"PyTorch eager", "PyTorch eager, allocator tuned by hand"} < set(names)
    assert "torch.compile, allocator tuned by hand" in names
    assert len({(t.document, t.name) for t in TABLES}) == len(TABLES)
