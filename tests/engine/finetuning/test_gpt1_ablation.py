"""The example with the paper's ablation table: its rows, its table, and (slow) a run at tiny size."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "gpt1_ablation.py"


@pytest.fixture(scope="module")
def ablation():
    spec = importlib.util.spec_from_file_location("gpt1_ablation", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpt1_ablation"] = module  # of dataclasses
    spec.loader.exec_module(module)
    return module


FILES = {name: [(f"{name}/{i}.py", [f"{name} {i} {line}" for line in range(30)]) for i in range(4)] for name in "ab"}


def test_rows_have_the_labels_of_their_lines(ablation):
    rows = list(ablation.module_rows(FILES, 20, random.Random(0)))
    assert all({line[0] for line in row["text"].split("\n")} == {row["label"]} for row in rows)
    pairs = list(ablation.is_next_rows(FILES, 40, random.Random(0)))
    for row in pairs:
        before, after = row["premise"].split("\n")[-1].split(), row["hypothesis"].split("\n")[0].split()
        assert (before[:2] == after[:2]) is row["label"] and before[0] == after[0]
        assert not row["label"] or int(after[2]) == int(before[2]) + 1
    assert sum(row["label"] for row in pairs) == 20


def test_files_of_the_library_are_in_both_parts(ablation):
    files = ablation.read_files(9)
    assert len(files) >= 5
    assert all({ablation.is_held_out(name) for name, _ in found} == {True, False} for found in files.values())


def test_the_table_has_means_intervals_and_differences_of_seeds(ablation):
    values = {variant: [0.5 + 0.1 * i, 0.6 + 0.1 * i] for i, variant in enumerate(reversed(ablation.VARIANTS))}
    text = ablation.table({"module": values})
    assert ablation.interval([0.5, 0.6]) == pytest.approx((0.55, 12.7062 * 0.05), rel=1e-4)
    assert "95.0 ± 63.5" in text and "20.0 ±  0.0" in text  # full; full without pre-training


@pytest.mark.slow
def test_the_example_prints_its_table():
    done = subprocess.run([sys.executable, str(EXAMPLE), "--tiny"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "full: pre-trained, auxiliary loss" in done.stdout and "pre-training   " in done.stdout
