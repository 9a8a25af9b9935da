"""The result schema: derived figures, invalid rows, and the JSON file."""

import json
import math
from pathlib import Path

import pytest

from peakgpt.bench import schema
from peakgpt.bench.fidelity import Fidelity
from peakgpt.bench.schema import Result, comparable
from peakgpt.bench.timing import Timing, Turns

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def result(**changes):
    fields = {
        "bench": "op", "case": {"rows": 1024, "causal": True}, "contender": "cpu", "backend": "cpu",
        "device": "AMD EPYC", "dtype": "float32", "flops": 3e9, "flops_kind": "work", "bytes": 2e9,
        "peak_flops_s": 6e9, "peak_bytes_s": 8e9, "peak_source": "measured",
    }  # fmt: skip
    return Result.of(Timing((1.0, 2.0, 3.0), dropped=4, note="n"), **{**fields, **changes})


def test_result_derived_rates_and_fractions():
    r = result()
    assert (r.median_s, r.q25_s, r.q75_s, r.rounds, r.dropped, r.note) == (2.0, 1.5, 2.5, 3, 4, "n")
    assert r.tflops == pytest.approx(1.5e-3) and r.gbs == pytest.approx(1.0)
    assert r.flops_fraction == pytest.approx(0.25) and r.bytes_fraction == pytest.approx(0.125)
    bare = result(flops=None, flops_kind=None, bytes=None)
    assert bare.tflops is bare.gbs is bare.flops_fraction is bare.bytes_fraction is None
    assert result(peak_flops_s=None).flops_fraction is None


@pytest.mark.parametrize("bad", [{"flops_kind": "sparse"}, {"flops_kind": None}, {"flops": None}])
def test_result_requires_flops_kind(bad):
    with pytest.raises(ValueError, match="'model' or 'work'"):
        result(**bad)


@pytest.mark.parametrize("bad", [{"median_s": 0.0, "q25_s": 0.0}, {"median_s": 9.0}, {"median_s": math.nan}])
def test_result_times_are_ordered(bad):
    with pytest.raises(ValueError, match="q25_s <= median_s"):
        Result(**{**result().to_json(), **bad})


def test_results_round_trip(tmp_path):
    path = tmp_path / "new" / "results.json"
    near = Fidelity(positions=8, kl=1e-4, kl_q25=8e-5, kl_median=1e-4, kl_q75=2e-4, top1=0.875)
    results = [result(fidelity=near), result(contender="eager", flops=None, flops_kind=None)]
    environment = {"threads": 2}
    schema.write_results(path, results, environment)
    assert schema.read_results(path) == (results, environment)
    schema.write_results(path, results[:1], environment)
    assert schema.read_results(path)[0] == results[:1]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_turns_round_trip_and_have_an_item_per_sample(tmp_path):
    turns = Turns(rounds=[0, 2, 3], first_s=[1.5, 2.5, 3.5], major_faults=[0, 1, 0], foreign_cpu=[0.0, 0.1, 0.0])
    row = Result.of(Timing((1.0, 2.0, 3.0), turns=turns, calls=4), bench="op", case={}, contender="cpu", backend="",
                    device="cpu", dtype="float32", peak_before={"float32": 1e11}, fresh_page_s=2e-7)  # fmt: skip
    schema.write_results(tmp_path / "results.json", [row], {})
    assert schema.read_results(tmp_path / "results.json")[0] == [row]
    with pytest.raises(ValueError, match=r"expected turns\.rounds of 3 samples, got 2"):
        Result.of(Timing((1.0, 2.0, 3.0), turns=Turns(rounds=[0, 1])), bench="op", case={}, contender="cpu",
                  backend="", device="cpu", dtype="float32")  # fmt: skip


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_readable(path):
    results, environment = schema.read_results(path)
    assert environment["commit"] and all(row.rounds == len(row.samples_s) for row in results if row.samples_s)


def test_files_of_older_schemas_are_read_with_defaults_and_their_weight_formats(tmp_path):
    path, row = tmp_path / "results.json", result(bench="decode", dtype="int4", contender="llama.cpp")
    schema.write_results(path, [row], {})
    document = json.loads(path.read_text())
    for number in (4, 3):
        for key in schema.NEW_KEYS[number]:
            del document["results"][0][key]
        path.write_text(json.dumps({**document, "schema": number}))
        with pytest.raises(ValueError, match="missing"):
            schema.read_results(path)  # this schema needs them
        path.write_text(json.dumps({**document, "schema": number - 1}))
        (read,) = schema.read_results(path)[0]
        assert read.fidelity is None and read.samples_s == row.samples_s
    assert read.weight_bits == 4.5 and read.turns == Turns()


def test_unlike_weight_formats_are_not_comparable():
    by_64, by_32, q4_0, q8, q8_0 = (result(weight_bits=bits) for bits in (4.25, 4.5, 4.5, 8.125, 8.5))
    assert not comparable(by_64, q4_0) and comparable(by_32, q4_0) and comparable(q8, q8_0)
    assert comparable(result(), result()) and not comparable(result(), q8)
    assert not comparable(result(), Result.of(Timing((1.0,)), bench="op", case={}, contender="x", backend="",
                                              device="cpu", dtype="float32"))  # fmt: skip


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    schema.write_results(path, [result(bytes=math.inf)], {})
    assert schema.read_results(path)[0] == [result(bytes=None)]  # infinity is not a JSON number
    schema.write_results(path, [result()], {})

    def broken(fd):
        raise OSError("disk full")

    monkeypatch.setattr(schema.os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        schema.write_results(path, [], {})
    assert schema.read_results(path)[0] == [result()]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def _unknown(document):
    document["results"][0]["speed"] = 1


def _missing(document):
    del document["results"][0]["dtype"]


def _top_level(document):
    document["author"] = "me"


def _schema(document):
    document["schema"] = 99


@pytest.mark.parametrize(
    "damage, message",
    [(_unknown, "unknown \\['speed'\\]"), (_missing, "missing \\['dtype'\\]"), (_top_level, "unknown \\['author'\\]"),
     (_schema, "expected schema 2 to 4, got 99")],
)  # fmt: skip
def test_read_results_invalid_document_raises(tmp_path, damage, message):
    path = tmp_path / "results.json"
    schema.write_results(path, [result()], {})
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        schema.read_results(path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_read_results_non_json_file_raises(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="results"):
        schema.read_results(path)
