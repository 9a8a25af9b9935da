"""`peakgpt bench` keeps every finished row, whatever fails after it."""

import inspect
import json
import time

import pytest

from peakgpt.bench import command
from peakgpt.bench.contenders import worker_process
from peakgpt.bench.contenders.time_contenders import time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess
from peakgpt.bench.run_results import Failure
from peakgpt.bench.schema import Result
from peakgpt.cli import main


class Counting:
    """A contender of this process whose step raises at a given call."""

    pid, base_bytes, note = None, None, ""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at, self.closed = 0, fails_at, False

    def step(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError(f"call {self.calls}")
        return self.calls

    def memory_bytes(self):
        return None

    def close(self):
        self.closed = True


# The first output is call 1, the warm-up call 2. The following calls find the number of repetitions, then rounds start.
@pytest.mark.parametrize("fails_at", ["start", *range(1, 8), 20, 5000])
def test_contender_that_fails_at_any_call_loses_no_other_timing(fails_at):
    bad, good, failures = Counting(fails_at), [Counting(), Counting()], []

    def start():
        if fails_at == "start":
            raise RuntimeError("start")
        return bad

    measured = time_contenders(
        [("first", lambda: good[0]), ("bad", start), ("last", lambda: good[1])],
        lambda name, contender: contender.step(), lambda name, outputs: None,
        rounds=5, on_failure=lambda name, error: failures.append((name, str(error))),
    )  # fmt: skip
    assert list(measured) == ["first", "last"]
    assert failures == [("bad", "start" if fails_at == "start" else f"call {fails_at}")]
    assert all(m.timing.kept + m.timing.dropped == 5 for m in measured.values())
    assert all(contender.closed for contender in good) and (bad.closed or fails_at == "start")


def row(contender):
    return Result(bench="decode", case={"tokens": 4}, contender=contender, backend="auto", device="cpu",
                  dtype="float32", median_s=1.0, q25_s=1.0, q75_s=1.0, rounds=1, dropped=0)  # fmt: skip


@pytest.mark.parametrize(
    "error, code", [(RuntimeError("lost"), 1), (ValueError("wrong"), 1), (KeyboardInterrupt(), 130)]
)
def test_finished_rows_are_on_disk_when_the_benchmark_raises(error, code, monkeypatch, tmp_path, capsys):
    def measure(case, device, emit):
        emit(row("peakgpt"))
        emit(Failure(message="not installed", contender="peer"))
        (path,) = tmp_path.iterdir()
        assert len(json.loads(path.read_text())["results"]) == 1  # at once, not at the end
        emit(row("eager"))
        raise error

    monkeypatch.setattr(command, "run_case", measure)
    assert main(["bench", "decode", "--device", "cpu", "--out", str(tmp_path)]) == code
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert [r["contender"] for r in document["results"]] == ["peakgpt", "eager"]
    assert [f["message"] for f in document["failures"]] == ["not installed", f"{type(error).__name__}: {error}"]
    printed = capsys.readouterr()
    assert "decode: float32, tokens 4, peakgpt: 1,000 (1,000 to 1,000) ms" in printed.err and str(path) in printed.out


def test_error_before_the_first_row_writes_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "run_case", lambda case, device, emit: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["bench", "decode", "--device", "cpu", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def junk(request):
    """A worker that prints to standard output as packages do, and hangs at its second step."""
    steps = iter((1.0,))

    def step():
        print('{"value": 3}\n[1, 2]')
        return next(steps, None) or time.sleep(600)

    return step


def test_worker_may_print_anything_and_a_hanging_one_is_ended(tmp_path, monkeypatch):
    (tmp_path / "junk_worker.py").write_text("import time\n" + inspect.getsource(junk))
    monkeypatch.setattr(worker_process, "STEP_S", 60.0)
    worker = WorkerProcess("junk", {"make": "junk_worker:junk", "threads": 1}, {"PYTHONPATH": str(tmp_path)})
    try:
        assert worker.step() == 1.0
        monkeypatch.setattr(worker_process, "STEP_S", 0.2)
        with pytest.raises(RuntimeError, match=r"'junk' made no step in 0\.2 s"):
            worker.step()
    finally:
        worker.close()
    assert worker.process.returncode == -9


def test_folder_that_cannot_be_written_is_an_error_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "run_case", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    assert main(["bench", "decode", "--device", "cpu", "--out", str(tmp_path / "file" / "folder")]) == 2


@pytest.mark.parametrize(("flags", "message"), [
    (["train", "--contenders", "nobody"], "--contenders: got 'nobody', expected some of 'peakgpt', 'eager', "),
    (["decode", "--dtype", "int4", "--contenders", "eager"], "--contenders: got 'eager', expected some of 'peakgpt'"),
    (["suite", "--case", "ops/nothing/*"], "--case: got 'ops/nothing/*', which matches no case"),
])  # fmt: skip
def test_contender_or_case_that_does_not_exist_is_an_error(flags, message, tmp_path, capsys):
    assert main(["bench", *flags, "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
