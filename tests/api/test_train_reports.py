"""`peakgpt train` as a whole: what a run leaves behind, early stopping, a time budget, refusals before it begins."""

import json
import re
import time

import pytest

from peakgpt import run_reporter
from peakgpt.cli import main
from peakgpt.engine.data.run_layout import BEST, CHECKPOINTS, saved_steps
from peakgpt.engine.training import loop, memory_estimate, metric_sinks
from peakgpt.engine.training.validation import Validator

SIZES = "--preset gpt2-tiny --n-layer 1 --n-embd 48 --batch 2 --tokens 16 --vocab 280 --device cpu --dtype float32"


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Return a function that runs `peakgpt train` with further flags; it returns the exit code and what was printed."""
    (tmp_path / "text").mkdir()
    for name in "abcdef":
        (tmp_path / "text" / f"{name}.txt").write_text(f"the {name} sat on the mat and saw the hat of a dog\n" * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "peak_flops_s", lambda device, dtype, again=False: 1e9)

    def run(flags, *, new=True):
        code = main(["train", *(f"--text text {SIZES}".split() if new else ()), *flags.split()])
        return code, capsys.readouterr()

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_report_its_best_checkpoint_and_its_traces(train, tmp_path, capsys):
    flags = ("--steps 9 --validate-every 3 --save-every 4 --prompts the --sample-tokens 5 --validation-sets "
             "more=text/a.txt --profile 2:2 --out run")  # fmt: skip
    code, printed = train(flags)
    run = tmp_path / "run"
    assert code == 0 and "memory: about" in printed.out and "of them before the first step" in printed.out
    speed, mfu = (float(rows(run)[-2][key]) for key in ("tokens_per_s", "mfu"))
    mflops, peak = map(float, re.search(r"([\d.]+) MFLOPs.*peak ([\d.e+-]+) TFLOP/s", printed.out).groups())
    assert mfu == pytest.approx(speed * mflops * 1e6 / (peak * 1e12), rel=0.01)
    for text in ("step 9/9  loss", "step 9  validation loss", "step 9  more loss", "sample: 'the"):
        assert text in printed.out
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 7 and "Samples after step 9" in page and "validate_every = 3" in page
    assert (run / "curves.png").stat().st_size and (run / "profile" / "steps-2-2.json.gz").is_file()
    found = rows(run)
    validations = {row["step"]: row for row in found if "validation_loss" in row}
    assert list(validations) == [3, 6, 9] and all("more/perplexity" in row for row in validations.values())
    best = min(validations, key=lambda step: validations[step]["validation_loss"])
    assert (run / CHECKPOINTS / BEST).resolve().name == f"step-{best:08d}"
    assert {best, 9} <= set(saved_steps(run))
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0 and (run / "report.html").read_text() == page


def test_a_run_without_progress_stops_early_and_goes_on_with_more_patience(train, tmp_path, monkeypatch):
    monkeypatch.setattr(run_reporter, "write_report", lambda *_: "no report")
    losses = iter([3.0, 2.0, 2.5, 2.5, 2.5, 1.0])
    monkeypatch.setattr(Validator, "_observe", lambda self, step, _, observe=Validator._observe: observe(
        self, step, next(losses)))  # fmt: skip
    code, printed = train("--steps 6 --validate-every 1 --save-every 1 --patience 2 --out run")
    assert code == 0 and "stopped early after step 4: the best validation was after step 2" in printed.out
    assert rows(tmp_path / "run")[-1]["step"] == 4
    code, printed = train("--resume run", new=False)
    assert code == 0 and rows(tmp_path / "run")[-1]["step"] == 4, "nothing is left to do"
    code, printed = train("--resume run --patience 5", new=False)
    steps = [row["step"] for row in rows(tmp_path / "run") if "loss" in row]
    assert code == 0 and steps == list(range(1, 7)) and "stopped early" not in printed.out


def test_a_resumed_run_has_the_rest_of_its_minutes(train, tmp_path, monkeypatch):
    """On a clock on which only steps take time. Fails if a resume gets the whole budget again."""
    monkeypatch.setattr(run_reporter, "write_report", lambda *_: "no report")
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    step = loop.Trainer.step

    def slow_step(*args):
        now[0] += 10.0
        return step(*args)

    monkeypatch.setattr(loop.Trainer, "step", slow_step)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    code, _ = train("--minutes 1.5 --save-every 2 --validate-every 100 --validation-batches 1 --out run")
    found = rows(tmp_path / "run")
    last = max(row["step"] for row in found)
    assert code == 0 and 7 <= last <= 8 and found[-1]["elapsed_s"] <= 90.0
    code, _ = train("--resume run --minutes 2.5", new=False)
    found = rows(tmp_path / "run")
    assert code == 0 and max(row["step"] for row in found) == last + 6 and 120.0 < found[-1]["elapsed_s"] <= 150.0


@pytest.mark.parametrize("length", ["--steps 3", "--max-tokens 96", "--epochs 0.02"])
def test_a_time_budget_makes_no_run_longer(train, tmp_path, monkeypatch, length):
    """Regression: with minutes, max_tokens and epochs were ignored."""
    monkeypatch.setattr(run_reporter, "write_report", lambda *_: "no report")
    for run, budget in (("plain", ""), ("timed", "--minutes 60")):
        assert train(f"{length} {budget} --validation-batches 1 --out {run}")[0] == 0
    plain, timed = ([row["step"] for row in rows(tmp_path / run)] for run in ("plain", "timed"))
    assert plain == timed and len(plain) < 40


@pytest.mark.parametrize("case", ["memory", "package", "profile"])
def test_what_cannot_work_is_refused_before_anything_is_made(train, tmp_path, monkeypatch, case):
    flags, text = {
        "memory": ("", "memory: this run needs about"),
        "package": ("--enable-wandb", "pip install 'peakgpt[wandb]'"),
        "profile": ("--profile 3", "expected START:END"),
    }[case]
    if case == "memory":
        monkeypatch.setattr(memory_estimate, "available_bytes", lambda device, with_swap: 1 << 20)
    if case == "package":
        monkeypatch.setattr(metric_sinks.importlib.util, "find_spec", lambda name: None)
    before = sorted(tmp_path.rglob("*"))
    code, printed = train(f"--out run {flags}")
    assert code == 2 and text in printed.err and printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and "corpus" not in printed.out
