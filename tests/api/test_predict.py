"""peakgpt finetune with labels, and peakgpt predict: whole runs of a tiny model."""

import json
import shutil

import fixed_peaks
import pytest
import torch
from tiny_finetuning import rows_of, write_base, write_rows

from peakgpt.cli import main
from peakgpt.engine.finetuning.loaded import load_task
from peakgpt.engine.finetuning.rows import read_rows
from peakgpt.engine.finetuning.tasks.label_config import LABEL_TASKS
from peakgpt.engine.finetuning.tasks.labelled import LabelledTask


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


def finetune(base, task, tmp_path, *flags, steps=6):
    """Run 6 updates; return the folder of the run."""
    data, out = write_rows(tmp_path / "rows.jsonl", rows_of(task)), tmp_path / "run"
    code = main([
        "finetune", "--task", task, "--init", str(base), "--data", str(data), "--out", str(out), "--steps", str(steps),
        "--batch", "8", "--lr", "0.01", "--validation-share", "0.25", "--save-every", "3", "--keep-last", "none",
        "--dtype", "float32", "--device", "cpu", *flags,
    ])  # fmt: skip
    assert code == 0
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", LABEL_TASKS)
def test_a_run_leaves_predictions_that_predict_gives_too(task, base, tmp_path, capsys):
    run = finetune(base, task, tmp_path)
    rows = lines(run / "predictions.jsonl")
    assert len(rows) == 6 and all({"text", "prediction", "label"} <= row.keys() for row in rows)
    has_matrix = task in ("classification", "entailment", "token-classification")
    assert (run / "confusion_matrix.png").exists() == has_matrix
    assert rows[0]["text"].startswith("_start_the ")
    (validation,) = [row for row in lines(run / "metrics.jsonl") if "validation_loss" in row]
    capsys.readouterr()
    out, matrix = tmp_path / "predictions.jsonl", tmp_path / "matrix.png"
    flags = ["--confusion-matrix", str(matrix)] if has_matrix else []
    best = run / "checkpoints" / "best"
    assert main(["predict", str(best), "--data", str(tmp_path / "rows.jsonl"), "--out", str(out), *flags]) == 0
    found = lines(out)
    assert [row["label"] for row in found] == [row["label"] for row in rows_of(task)]
    assert {json.dumps(row["prediction"]) for row in rows} <= {json.dumps(row["prediction"]) for row in found}
    name = "pearson" if task == "similarity" else "accuracy"
    assert name in validation and f"{name} " in capsys.readouterr().err
    assert matrix.exists() == has_matrix


def test_predictions_without_labels_are_printed(base, tmp_path, capsys):
    run = finetune(base, "classification", tmp_path)
    data = write_rows(tmp_path / "new.jsonl", [{"text": "the film was good", "id": 7}])
    capsys.readouterr()
    assert main(["predict", str(run), "--data", str(data)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["id"] == 7 and row["prediction"] in ("good", "bad") and sum(row["probabilities"].values()) == 1.0
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"text": "a", "label": "good"}, {"text": "b"}])
    for arguments, message in (
        ([str(run), "--data", str(mixed)], "mixed.jsonl:2: got no label in 'label'"),
        ([str(run), "--data", str(data), "--confusion-matrix", "m.png"], "got data without classes"),
        ([str(base), "--data", str(data)], "got no peakgpt_task.json, expected a checkpoint of peakgpt finetune"),
    ):
        assert main(["predict", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_an_existing_file_is_refused_before_the_model_runs(base, tmp_path, monkeypatch, capsys):
    run, rows = finetune(base, "classification", tmp_path, steps=1), str(tmp_path / "rows.jsonl")
    monkeypatch.setattr(LabelledTask, "predict", None)
    assert main(["predict", str(run), "--data", rows, "--out", rows]) == 2
    assert "rows.jsonl: got an existing file, expected a new one" in capsys.readouterr().err


def test_a_resumed_run_has_the_same_bits(base, tmp_path):
    """With dropout, the loss of the language model, micro-batches, and new last layers."""
    flags = ("--micro-batch", "3", "--transfer-layers", "1")
    whole = finetune(base, "multiple-choice", tmp_path, *flags)
    begun = tmp_path / "begun"
    shutil.copytree(whole, begun, symlinks=True)
    shutil.rmtree(begun / "checkpoints" / "step-00000006")
    (begun / "checkpoints" / "best").unlink()
    for name in ("predictions.jsonl", "report.html"):
        (begun / name).unlink()
    assert main(["finetune", "--resume", str(begun), "--device", "cpu"]) == 0
    for name in ("model.safetensors", "training_state.safetensors", "peakgpt_task.json", "config.json"):
        first, second = (run / "checkpoints" / "step-00000006" / name for run in (whole, begun))
        assert first.read_bytes() == second.read_bytes(), name
    assert (whole / "predictions.jsonl").read_bytes() == (begun / "predictions.jsonl").read_bytes()


def test_a_model_in_bfloat16_predicts(base, tmp_path):
    run = finetune(base, "classification", tmp_path, steps=1)
    task, model = load_task(run, [str(tmp_path / "rows.jsonl")], dtype=torch.bfloat16)
    assert task.name == "classification" and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    examples = task.encode(read_rows([str(tmp_path / "rows.jsonl")]))
    assert len(task.predict(model, examples, 5).rows) == 24


@pytest.fixture(autouse=True)
def peaks():
    fixed_peaks.use()
