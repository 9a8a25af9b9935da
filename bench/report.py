"""Results as plain-text tables for the terminal, and as sections for the page of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from peakgpt.bench.check import Check
from peakgpt.bench.quiet_share import BUSY, MACHINE, is_quiet, quiet_share, share_text
from peakgpt.bench.run_results import OURS, Failure, Row, RunResults
from peakgpt.bench.schema import Result, comparable
from peakgpt.bench.timing import Ratio, ratio
from peakgpt.engine.training.figures import percent_text, rate_text
from peakgpt.engine.training.html_page import Section, table
from peakgpt.engine.training.html_page import note as remark


def groups(results: Iterable[Result], across: Sequence[str] = ()) -> list[list[Result]]:
    """Group the results of one case, in the order of measurement.

    Args:
        results: in any order.
        across: keys of the case that do not separate groups.
    """
    found: dict[tuple, list[Result]] = {}
    for r in results:
        case = sorted((key, value) for key, value in r.case.items() if key not in across)
        found.setdefault((r.bench, r.dtype, r.device, *case), []).append(r)
    return list(found.values())


def table_groups(results: Iterable[Result], bench: str) -> list[list[Result]]:
    """Return the groups of one kind of benchmark as its table has them: a quiet and a busy machine are one case."""
    return groups((r for r in results if r.bench == bench), across=(MACHINE,))


AGAINST_EAGER, AGAINST_COMPILE = "against eager (95 % interval)", "against compile (95 % interval)"
EAGER = ("eager", "torch fused", "transformers")  # the plain PyTorch of each kind


def speedup(result: Result, others: Sequence[Result], baselines: Sequence[str] = EAGER) -> Ratio | None:
    """Return the time of the first of the baselines over this result's, by round; None without a baseline."""
    baseline = next((o for name in baselines for o in others if o.contender == name), None)
    if baseline is None or baseline is result or not comparable(baseline, result):
        return None
    return ratio(baseline.timing(), result.timing())


# ---- formatting; a missing figure is an empty cell


def _percent(value: float | None) -> str:
    return "" if value is None else percent_text(value)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"


def _ratio(value: Ratio | None) -> str:
    return "" if value is None else value.text


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f}"


def ms_text(seconds: float) -> str:
    """Return milliseconds with three digits, and all digits before the point."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _ms(r: Result) -> str:
    return f"{ms_text(r.median_s)} ({ms_text(r.q25_s)} to {ms_text(r.q75_s)})"


def _tokens_per_s(r: Result) -> str:
    return "" if r.tokens_per_s is None else rate_text(r.tokens_per_s)


def _kl(r: Result) -> str:
    f = r.fidelity
    return f"{f.kl:.1e} ({f.kl_q25:.1e} to {f.kl_q75:.1e})" if f else ""


def _rounds(r: Result) -> str:
    return f"{r.rounds} of {r.rounds + r.dropped}"


def case_text(r: Result) -> str:
    """Return the op, the dtype and the sizes of a case in one line."""
    head = [r.case[k] for k in ("op", "pass") if k in r.case]
    twice = ("n_head",) if "heads" in r.case else ()  # a parameter that repeats a size
    rest = [f"{k} {v}" for k, v in r.case.items() if k not in ("op", "pass", *twice)]
    return ", ".join(filter(None, [" ".join([*head, r.dtype]), *rest]))


Read = Callable[[Result, Sequence[Result]], str]


def _share_column(machine: str) -> Read:
    return lambda r, rs: share_text(quiet_share(r, rs, machine))


COLUMNS: dict[str, Read] = {
    "case": lambda r, rs: case_text(r) if r is rs[0] else "",
    "contender": lambda r, _: r.contender,
    "tokens/s": lambda r, _: _tokens_per_s(r),
    "MFU": lambda r, _: _percent(r.flops_fraction),
    "MBU": lambda r, _: _percent(r.bytes_fraction),
    "ms (quartiles)": lambda r, _: _ms(r),
    "GFLOP/s": lambda r, _: f"{1e3 * r.tflops:,.0f}" if r.tflops else "",
    "GB/s": lambda r, _: f"{r.gbs:,.1f}" if r.gbs else "",
    "streams, GB/s": lambda r, _: f"{r.peak_bytes_s / 1e9:,.1f}",
    "of peak FLOP/s": lambda r, _: _percent(r.flops_fraction),
    "of read peak": lambda r, _: _percent(r.bytes_fraction),
    "of streams": lambda r, _: _percent(r.bytes_fraction),
    "GiB": lambda r, _: _gib(r.memory_bytes),
    "KL from float32 (quartiles)": lambda r, _: _kl(r),
    "same top token": lambda r, _: _percent(r.fidelity and r.fidelity.top1),
    "rounds": lambda r, _: _rounds(r),
    AGAINST_EAGER: lambda r, rs: _ratio(speedup(r, rs)),
    AGAINST_COMPILE: lambda r, rs: _ratio(speedup(r, rs, ("compile",))),
    **{machine: _share_column(machine) for machine in BUSY},
}


def _columns(*headings: str) -> dict[str, Read]:
    return {heading: COLUMNS[heading] for heading in headings}


# One table for each kind of benchmark: title, and for each column a heading and a formatter.
TABLES: dict[str, tuple[str, dict[str, Read]]] = {
    "train": (
        "Training, model FLOPs (6N + 12 L H Q T a token)",
        _columns("case", "contender", "tokens/s", "MFU", "ms (quartiles)", "GiB", "rounds", AGAINST_EAGER,
                 AGAINST_COMPILE),
    ),
    "prefill": (
        "Prefill, work FLOPs (causal attention is half, the head at one position)",
        _columns("case", "contender", "tokens/s", "of peak FLOP/s", "ms (quartiles)", "GiB", "rounds", AGAINST_EAGER,
                 AGAINST_COMPILE),
    ),
    "products": (
        "The linear layers of one pass, work FLOPs; bytes are those of the weights",
        _columns("case", "contender", "GB/s", "of read peak", "GFLOP/s", "of peak FLOP/s", "ms (quartiles)", "rounds"),
    ),
    "decode": (
        "Greedy decoding with a KV cache",
        _columns("case", "contender", "tokens/s", "MBU", "ms (quartiles)", "GiB", "KL from float32 (quartiles)",
                 "same top token", "rounds", AGAINST_EAGER, AGAINST_COMPILE),
    ),
    "neighbours": (
        "Share of its quiet speed that a contender keeps: median (quartiles), 95 % interval; of copies the sum",
        {"case": COLUMNS["case"], "contender": COLUMNS["contender"], "quiet tokens/s": COLUMNS["tokens/s"]}
        | _columns(*BUSY, "rounds"),
    ),
    "patch": (
        "Models of transformers, patched versus unpatched",
        _columns("case", "contender", "tokens/s", "ms (quartiles)", "GiB", "rounds", AGAINST_EAGER),
    ),
    "serve": (
        "Server with many streams versus the engine alone",
        _columns("case", "contender", "tokens/s", "ms (quartiles)", "rounds"),
    ),
    "op": (
        "Ops, work FLOPs (what must be computed; causal is half); bytes versus streams of the same reads and writes",
        _columns("case", "contender", "ms (quartiles)", "GFLOP/s", "GB/s", "of peak FLOP/s", "of streams", "GiB",
                 "rounds", AGAINST_EAGER, AGAINST_COMPILE)
        | {"contender": lambda r, _: f"{r.contender} ({r.backend})"},
    ),
    "pass": (
        "Memory-bound kernels versus streams of the same reads and writes",
        _columns("case", "ms (quartiles)", "GB/s", "streams, GB/s", "of streams"),
    ),
}  # fmt: skip


def _filled(results: Sequence[Result]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, headings, rows) of each kind of benchmark with results, without empty columns."""
    found = []
    for bench, (title, columns) in TABLES.items():
        rows = [
            [read(r, rs) for read in columns.values()]
            for rs in table_groups(results, bench)
            for r in filter(is_quiet, rs)
        ]
        if rows:
            found.append((title, *_used(list(columns), rows)))
    return found


def filled_table(rows: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return (headings, cells) of the results of one case, without the case and without empty columns."""
    columns = {name: read for name, read in TABLES[rows[0].bench][1].items() if name != "case"}
    return _used(list(columns), [[read(r, rows) for read in columns.values()] for r in filter(is_quiet, rows)])


def _used(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows without empty columns."""
    used = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    return [headings[i] for i in used], [[row[i] for i in used] for row in rows]


def tables(results: Sequence[Result]) -> list[str]:
    """Return the results as plain text, one table for each kind of benchmark."""
    return [f"\n{title}\n{_text_table(headings, rows)}" for title, headings, rows in _filled(results)]


COMPARISONS = "peakgpt against each contender"


def comparisons(results: Sequence[Result]) -> list[str]:
    """Return the comparison table as plain text; empty without pairs."""
    headings, rows = comparison_table(results)
    return [f"\n{COMPARISONS}\n{_text_table(headings, rows)}"] if rows else []


def comparison_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) of peakgpt's speed and memory relative to each contender of a case.

    Times are paired by round. Rows of unlike weight formats are not compared.
    """
    rows = []
    for rs in groups(results):
        ours = next((r for r in rs if r.contender == OURS), None)
        pairs = [(ours, r) for r in rs if ours and r is not ours and comparable(ours, r)]
        rows += [[case_text(ours) if i == 0 else "", *_comparison(*pair)] for i, pair in enumerate(pairs)]
    headings = ["case", "of peak FLOP/s", "against", "times as fast (95 % interval)", "of its memory", "beyond imports",
                "rounds"]  # fmt: skip
    return _used(headings, rows)


def _comparison(ours: Result, other: Result) -> list[str]:
    by = ratio(other.timing(), ours.timing())
    memory = built = None
    if ours.memory_bytes and other.memory_bytes:
        memory = ours.memory_bytes / other.memory_bytes
    if memory and ours.base_bytes and other.base_bytes:
        built = (ours.memory_bytes - ours.base_bytes) / (other.memory_bytes - other.base_bytes)
    return [_percent(ours.flops_fraction), other.contender, by.text, _times(memory), _times(built), _rounds(ours)]


def _text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * w for w in widths], *rows]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def notes(results: Iterable[Result]) -> list[str]:
    """Return notes on the figures: dropped rounds, page faults, sources of the peaks; each kind of note once."""
    results, kinds = list(results), {}
    said = [f"{r.bench}: {r.dropped} of {r.rounds + r.dropped} rounds dropped"
            for r in results if r.dropped]  # fmt: skip
    said += [note for r in results for note in r.note.split("; ") if note]
    said += [f"peak: {r.peak_source}" for r in results if r.peak_source]
    for note in dict.fromkeys(said):
        kinds.setdefault(re.sub(r"[\d.]+", "#", note), []).append(note)
    return [first + (f" ({len(more)} more like it)" if more else "") for first, *more in kinds.values()]


def row_line(row: Row) -> str:
    """Return one line for a finished row."""
    if isinstance(row, Check):
        verdict = "right" if row.passed else "wrong"
        return f"{verdict}: {row.op} {row.case} {row.dtype} on {row.backend}: {row.message}".rstrip(": ")
    if isinstance(row, Failure):
        return f"failed: {', '.join(filter(None, (row.part, row.job, row.contender)))}: {row.message}"
    return f"{row.bench}: {case_text(row)}, {row.contender}: {_ms(row)} ms"


def verdicts(found: RunResults) -> list[str]:
    """Return one line for the checks, and one for each failure."""
    lines = []
    if found.checks:
        good = sum(c.passed for c in found.checks)
        lines.append(f"\nchecked against float64: {good} of {len(found.checks)} cases within the limit")
    wrong = [check for check in found.checks if not check.passed]
    return lines + [f"  {row_line(row)}" for row in (*wrong, *found.failures)]


# ---- parts of the page of a run


def result_sections(results: Sequence[Result]) -> list[Section]:
    """Return the tables of all kinds of benchmarks, and the notes, for the page of a run."""
    sections = [Section(title, table(headings, cells)) for title, headings, cells in _filled(results)]
    said = "".join(map(remark, notes(results)))
    return [*sections, Section("Notes", said)] if said else sections
