"""The result schema: one row for each measured case of each contender, and its JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peakgpt.bench.fidelity import Fidelity
from peakgpt.bench.timing import Spread, Timing, Turns
from peakgpt.engine.model.flops import mfu
from peakgpt.kernels.files import write_atomically
from peakgpt.kernels.strict_json import dumps


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured case of one contender. All benchmarks write this schema.

    `flops_kind` is "model" (6N + 12 L H Q T, for MFU) or "work" (what the op must compute, causal attention is half,
    for rooflines). A table never mixes the two in one column.
    """

    bench: str
    case: dict[str, Any]  # shape and options, JSON values
    contender: str
    backend: str
    device: str
    dtype: str
    median_s: float
    q25_s: float
    q75_s: float
    rounds: int  # kept rounds
    dropped: int  # dropped rounds
    # Times of the kept rounds. Sample i of every contender of a case comes from the same round.
    samples_s: list[float] = field(default_factory=list)
    calls: int | None = None  # calls that fill a turn
    first_call: str = "timed"  # "timed", or "apart": memory went cold between turns, samples are of the calls after it
    turns: Turns = field(default_factory=Turns)  # what was recorded in the kept rounds
    above_peak: int = 0  # of the dropped rounds: those with a figure above 100 % of its peak
    weight_bits: float | None = None  # per quantized weight, with its scales
    flops: float | None = None  # per call
    flops_kind: str | None = None  # "model" or "work"
    bytes: float | None = None  # per call: the minimum of bytes read and written
    memory_bytes: int | None = None  # peak of one call: allocated on a GPU, or resident in a worker process
    base_bytes: int | None = None  # resident in a worker process after its imports; part of memory_bytes
    peak_flops_s: float | None = None
    peak_bytes_s: float | None = None
    peak_source: str = ""
    peak_before: dict[str, float] = field(default_factory=dict)  # measured before the rounds: dtype, "bytes" -> per s
    peak_after: dict[str, float] = field(default_factory=dict)
    fresh_page_s: float | None = None  # cost of the first write to a page, measured after the rounds
    fidelity: Fidelity | None = None  # of the logits, versus float32
    note: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.q25_s <= self.median_s <= self.q75_s < math.inf:
            raise ValueError(
                f"expected 0 < q25_s <= median_s <= q75_s, got {self.q25_s}, {self.median_s}, {self.q75_s}"
            )
        if self.flops_kind not in ("model", "work", None) or (self.flops is None) != (self.flops_kind is None):
            raise ValueError(
                f"expected flops with flops_kind 'model' or 'work', or neither, got {self.flops}, {self.flops_kind!r}"
            )
        for name, values in self.turns.items().items():
            if values and len(values) != len(self.samples_s):
                raise ValueError(f"expected turns.{name} of {len(self.samples_s)} samples, got {len(values)}")

    @classmethod
    def of(cls, timing: Timing, *, peak_dtype: str | None = None, **fields: Any) -> Result:
        """Make a result from a timing and the remaining fields.

        Args:
            timing: its peaks, if they were measured, become those of the row.
            peak_dtype: dtype whose FLOP/s are the peak, if it is not the dtype of the row.
            fields: the other fields.
        """
        if timing.peaks:
            flops, moved = fields.get("flops") is not None, fields.get("bytes") is not None
            fields |= timing.peaks.fields(peak_dtype or fields["dtype"], flops=flops, moved=moved)
        return cls(
            median_s=timing.median_s, q25_s=timing.q25_s, q75_s=timing.q75_s, samples_s=list(timing.samples_s),
            rounds=timing.kept, dropped=timing.dropped, note=timing.note, calls=timing.calls, turns=timing.turns,
            first_call=timing.first_call, **fields,
        )  # fmt: skip

    def timing(self) -> Timing:
        """Return the timing of this row, for `ratio`."""
        return Timing(tuple(self.samples_s), dropped=self.dropped, turns=self.turns)

    def without_rounds_above_peak(self, kept: Sequence[int]) -> Result:
        """Return this result with the samples at some indices; the others were above the peak."""
        above, samples_s = len(self.samples_s) - len(kept), [self.samples_s[i] for i in kept]
        spread = Spread.of(samples_s)
        return dataclasses.replace(
            self, samples_s=samples_s, turns=self.turns.keep(kept), median_s=spread.median, q25_s=spread.q25,
            q75_s=spread.q75, rounds=len(kept), dropped=self.dropped + above, above_peak=self.above_peak + above,
        )  # fmt: skip

    def noted(self, note: str) -> Result:
        """Return this result with one more note, unless it is empty."""
        return dataclasses.replace(self, note="; ".join(filter(None, (self.note, note))))

    @property
    def tflops(self) -> float | None:
        """TFLOP/s at the median."""
        return None if self.flops is None else self.flops / self.median_s / 1e12

    @property
    def gbs(self) -> float | None:
        """GB/s at the median, 1 GB = 1e9 bytes."""
        return None if self.bytes is None else self.bytes / self.median_s / 1e9

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of all streams at the median; None if the case has no tokens."""
        if "tokens" not in self.case:
            return None
        return self.case["tokens"] * self.case.get("batch", 1) * self.case.get("steps", 1) / self.median_s

    @property
    def flops_fraction(self) -> float | None:
        """Achieved over peak FLOP/s, 0..1: MFU when flops_kind is "model"."""
        if self.flops is None or not self.peak_flops_s:
            return None
        return mfu(1 / self.median_s, self.flops, self.peak_flops_s)

    @property
    def bytes_fraction(self) -> float | None:
        """Achieved over peak bytes/s, 0..1: MBU in decoding."""
        return self.gbs * 1e9 / self.peak_bytes_s if self.gbs is not None and self.peak_bytes_s else None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values. Derived figures are left out."""
        return dataclasses.asdict(self)


SCHEMA = 4
# Schema -> keys that older files lack. They stay as they were written, and are read with the defaults.
NEW_KEYS = {
    3: {"calls", "first_call", "turns", "above_peak", "weight_bits", "peak_before", "peak_after", "fresh_page_s"},
    4: {"fidelity"},
}
# dtype -> contender -> bits per weight that files of schema 2 were measured with.
OLD_WEIGHT_BITS = {
    "int8": {"peakgpt": 8.125, "llama.cpp": 8.5, "openvino": 8.0, "onnxruntime": 8.0, "ctranslate2": 8.0},
    "int4": {"peakgpt": 4.25, "peakgpt by 32": 4.5, "llama.cpp": 4.5},
}
LIKE_BITS = 1.05  # weight formats whose bits per weight differ by more are not compared


def write_results(
    path: str | os.PathLike[str], results: Sequence[Result], environment: dict[str, Any], *,
    checks: Sequence[dict[str, Any]] = (), failures: Sequence[dict[str, Any]] = (),
) -> None:  # fmt: skip
    """Write results and their environment as one JSON file, atomically. Numbers that are not finite become null.

    Args:
        path: path of the file; missing folders are created.
        results: timings.
        environment: from `peakgpt.bench.environment.environment`.
        checks: comparisons with float64, fields of `peakgpt.bench.check.Check`.
        failures: contenders and jobs without a measurement, fields of `peakgpt.bench.run_results.Failure`.
    """
    path = Path(path)
    document = {"schema": SCHEMA, "environment": environment, "results": [r.to_json() for r in results],
                "checks": list(checks), "failures": list(failures)}  # fmt: skip
    text = "{\n" + ",\n".join(f"{dumps(key)}: {_json_rows(value)}" for key, value in document.items()) + "\n}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{text}\n".encode())


def _json_rows(value: Any) -> str:
    """Write one line for each item of a list, so that files can be compared by diff."""
    if not isinstance(value, list):
        return dumps(value, indent=1)
    return "[" + ",".join(f"\n{dumps(item)}" for item in value) + "]"


def read_results(path: str | os.PathLike[str]) -> tuple[list[Result], dict[str, Any]]:
    """Read a file of `write_results`.

    Returns:
        (results, environment).
    Raises:
        ValueError: the file is not JSON, has another schema, or has an unknown or missing key.
    """
    try:
        document = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"expected a JSON file of results, got {os.fspath(path)}: {error}") from error
    _expect_keys(f"{os.fspath(path)}", document, {"schema", "environment", "results", "checks", "failures"})
    if document["schema"] not in range(2, SCHEMA + 1):
        raise ValueError(f"{os.fspath(path)}: expected schema 2 to {SCHEMA}, got {document['schema']!r}")
    keys = {f.name for f in dataclasses.fields(Result)}
    for schema, new in NEW_KEYS.items():
        keys -= new if schema > document["schema"] else set()
    for i, row in enumerate(document["results"]):
        _expect_keys(f"{os.fspath(path)}, result {i}", row, keys)
    return [result_of_json(row) for row in document["results"]], document["environment"]


def result_of_json(row: dict[str, Any]) -> Result:
    """Return the result whose `to_json` is `row`; keys that older schemas lack may be missing."""
    if "turns" not in row:  # schema 2
        return Result(**row, weight_bits=OLD_WEIGHT_BITS.get(row["dtype"], {}).get(row["contender"]))
    fidelity = row.get("fidelity") and Fidelity(**row["fidelity"])
    return Result(**{**row, "turns": Turns(**row["turns"]), "fidelity": fidelity})


def comparable(a: Result, b: Result) -> bool:
    """Return whether the ratio of two rows of a case means something: the same rounds, and like weight formats."""
    if not 0 < len(a.samples_s) == len(b.samples_s):
        return False
    bits = sorted(row.weight_bits or 0.0 for row in (a, b))
    return bits[1] <= LIKE_BITS * bits[0]


def _expect_keys(source: str, got: Any, expected: set[str]) -> None:
    if not isinstance(got, dict) or set(got) != expected:
        keys = set(got) if isinstance(got, dict) else set()
        raise ValueError(
            f"{source}: expected the keys of the result schema, got unknown {sorted(keys - expected)}, "
            f"missing {sorted(expected - keys)}"
        )
