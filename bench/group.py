"""The measurement of one case for the suite under pytest: what each contender reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peakgpt.bench.case import Case
from peakgpt.bench.report import EAGER, speedup
from peakgpt.bench.schema import Result


@dataclass(frozen=True)
class Figure:
    """A figure of a result versus the results of its case.

    Args:
        read: returns its value, None if the result has none.
        text: formats it with its unit.
    """

    read: Callable[[Result, Sequence[Result]], float | None]
    text: Callable[[float], str]


def _percent(unit: str) -> Callable[[float], str]:
    return lambda value: f"{100 * value:.1f} % {unit}"


FIGURES = {
    "mfu": Figure(lambda r, _: r.flops_fraction if r.flops_kind == "model" else None, _percent("MFU")),
    "peak_flops_share": Figure(lambda r, _: r.flops_fraction if r.flops_kind == "work" else None, _percent("FLOP/s")),
    "bandwidth_share": Figure(lambda r, _: r.bytes_fraction, _percent("bytes/s")),
    "times_as_fast_as_eager": Figure(lambda r, rs: speedup(r, rs, EAGER), "{:.2f} x eager".format),
    "times_as_fast_as_compile": Figure(lambda r, rs: speedup(r, rs, ("compile",)), "{:.2f} x compile".format),
    "memory_bytes": Figure(lambda r, _: r.memory_bytes, lambda value: f"{value / 2**30:.2f} GiB"),
}


@dataclass(frozen=True)
class Group:
    """Results and exceptions of a case's contenders; each contender has one of them."""

    results: dict[str, Result]
    errors: dict[str, Exception]

    @classmethod
    def measure(cls, case: Case, device: torch.device) -> Group:
        """Measure a case. An exception of the whole case is that of every contender."""
        results: dict[str, Result] = {}
        errors: dict[str, Exception] = {}
        try:
            for result in case.measure(device, errors.setdefault):
                results.setdefault(result.contender, result)
        except Exception as error:
            errors = dict.fromkeys(case.contenders(device), error)
        return cls(results, errors)

    def figures(self, contender: str) -> dict[str, Any]:
        """Return FIGURES and the conditions of a contender as JSON values."""
        result, rows = self.results[contender], list(self.results.values())
        values = {name: figure.read(result, rows) for name, figure in FIGURES.items()}
        return {"backend": result.backend, "dtype": result.dtype, "median_s": result.median_s,
                "samples_s": result.samples_s, "dropped_rounds": result.dropped, "note": result.note,
                "peak_source": result.peak_source, **values}  # fmt: skip


def figure_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a column of cells for each figure that one of the rows has.

    Args:
        rows: extra_info of the rows of a table; empty where a row has no figures.
    """
    columns = []
    for name, figure in FIGURES.items():
        cells = ["" if row.get(name) is None else figure.text(row[name]) for row in rows]
        if any(cells):
            columns.append(cells)
    return columns
