"""The training loop as a library user runs it, and a run folder that version 0.1.0 wrote."""

import shutil
from pathlib import Path

import pytest
import torch
from wrong_losses import OneStepLate

from peakgpt.cli import main
from peakgpt.engine.checkpoint.safetensors_io import read_safetensors
from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.shard_writer import write_shards
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training import loop as module
from peakgpt.engine.training.checkpoint_manager import CheckpointManager
from peakgpt.engine.training.loop import SaveDue, StepMetrics, TrainingLoop, ValidationMetrics
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.engine.training.validation import Validator
from peakgpt.engine.training.validation_config import ValidationConfig

OLD_RUN = Path(__file__).with_name("run_folder_0.1.0")


@pytest.fixture
def shards(tmp_path):
    for name, count in (("train", 1000), ("validation", 300)):
        ids = [(3 * i) % 67 for i in range(count)]
        write_shards(tmp_path / "tokens", name, [ids], 67, text_bytes=4 * count, corpus_digest="d")
    return [TokenShards.open(tmp_path / "tokens", name) for name in ("train", "validation")]


def new_loop(train, validation, **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=67, dropout=0.1))
    config = TrainConfig(batch=4, tokens=16, lr=1e-2, dtype=torch.bfloat16)
    validator = None if validation is None else make_validator(model, validation)
    return TrainingLoop(Trainer(model, config, steps=20), Batches(train, 4, 16, config.seed), validator, **options)


def make_validator(model, shards, **settings):
    return Validator(model, {"validation": shards}, ValidationConfig(**settings), batch=4, tokens=16)


def test_a_user_trains_validates_saves_and_resumes_bit_for_bit(shards, tmp_path):
    whole = list(new_loop(*shards).run(validate_every=5))
    loop, events = new_loop(*shards), []
    with RunFolder(tmp_path / "run") as run, CheckpointManager(run, loop) as checkpoints:
        stop = lambda: loop.trainer.steps_done == 12  # noqa: E731
        for event in loop.run(validate_every=5, save_every=10, should_stop=stop):
            events.append(event)
            if isinstance(event, SaveDue) and event.step == 10:  # as if the process was killed after step 12
                checkpoints.save()
    assert [e.step for e in events if isinstance(e, SaveDue)] == [10, 12] and not loop.finished
    resumed = new_loop(*shards)
    with RunFolder.reopen(tmp_path / "run") as run:
        assert CheckpointManager(run, resumed).load() == 10
    before = events[: events.index(SaveDue(10))]
    events = before + list(resumed.run(validate_every=5))
    assert [e.loss for e in events] == [e.loss for e in whole] and resumed.finished
    steps = [e for e in whole if isinstance(e, StepMetrics)]
    assert [e.step for e in steps] == list(range(1, 21)) and steps[-1].loss < steps[0].loss - 1
    assert [e.step for e in whole if isinstance(e, ValidationMetrics)] == [5, 10, 15, 20]
    resumed.save_model(tmp_path / "model")
    model = GPT.from_pretrained(tmp_path / "model")
    masters = resumed.trainer.master_weights()
    assert all(torch.equal(tensor, masters[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("stop_at", "expected"), [(None, [8, 16, 20]), (8, [8]), (11, [8, 11]), (0, [0])])
def test_a_save_is_due_at_each_multiple_and_at_the_end(shards, stop_at, expected):
    loop = new_loop(*shards)
    events = list(loop.run(save_every=8, validate_every=4, should_stop=lambda: loop.trainer.steps_done == stop_at))
    assert [e.step for e in events if isinstance(e, SaveDue)] == expected
    for event in (e for e in events if isinstance(e, SaveDue)):  # everything of earlier steps comes before
        rest = events[events.index(event) + 1 :]
        assert all(e.step > event.step for e in rest)


def test_a_loop_in_several_runs_makes_the_steps_of_one(shards):
    whole, parts = [e.loss for e in new_loop(*shards).run()], new_loop(*shards)
    losses = [e.loss for e in parts.run(7)] + [e.loss for e in parts.run(7, synchronous=True)]
    assert losses + [e.loss for e in parts.run(7)] == whole and parts.finished and not list(parts.run())


def test_metrics_that_arrive_a_step_late_come_in_order_and_before_validation(shards, monkeypatch):
    monkeypatch.setattr(module, "DelayedMetrics", OneStepLate)
    events = list(new_loop(*shards).run(validate_every=8))
    expected = [*range(1, 9), 8, *range(9, 17), 16, *range(17, 21), 20]
    assert [event.step for event in events] == expected
    assert [i for i, e in enumerate(events) if isinstance(e, ValidationMetrics)] == [8, 17, 22]


def test_weights_that_are_not_finite_are_not_saved(shards, tmp_path):
    """Regression: the last good checkpoint was overwritten. A loss that is not finite: test_skipped_steps.py."""
    loop = new_loop(*shards)
    run = RunFolder(tmp_path / "run")
    checkpoints = CheckpointManager(run, loop)
    list(loop.run(3))
    checkpoints.save()
    checkpoints.wait()
    saved = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    step = loop.trainer.step

    def damaged_step(ids, targets):
        loss = step(ids, targets)
        for parameter in loop.trainer.model.parameters():
            parameter.data.fill_(float("nan"))
        return loss

    loop.trainer.step = damaged_step
    with pytest.raises(FloatingPointError, match=r"step 4: .* (is nan|is inf|not finite)"), run, checkpoints:
        for event in loop.run(1):
            assert event.step == 4
        checkpoints.save()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == saved


@pytest.mark.parametrize("name", ["lr", "eps", "max_norm", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_train_config_takes_only_finite_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected (a finite number|more than 0|at least 0)"):
        TrainConfig(**{name: value})


def test_rows_have_the_fields_of_metrics_jsonl(shards, monkeypatch):
    monkeypatch.setattr(module, "peak_flops_s", lambda device, dtype, again=False: 1e9)
    step, validation = list(new_loop(*shards, report_mfu=True).run(1, validate_every=1))
    assert list(step.row()) == ["step", "loss", "tokens_per_s", "lr", "grad_norm", "mfu"] and step.mfu > 0
    assert list(validation.row()) == [
        "step", "validation_loss", "perplexity", "validation_tokens", "bits_per_byte", "is_best", "validation_s",
    ]  # fmt: skip
    assert list(next(new_loop(*shards).run(1)).row()) == ["step", "loss", "tokens_per_s", "lr", "grad_norm"]


def test_mfu_above_the_peak_measures_it_again(shards, monkeypatch):
    """On a busy machine the first measurement is too low. It is not repeated at every step."""
    measured = []

    def measure(device, dtype, again=False):
        measured.append(again)
        return 1.0 if len(measured) < 3 else 1e15

    monkeypatch.setattr(module, "peak_flops_s", measure)
    loop = new_loop(*shards, report_mfu=True)
    first, *others = loop.run(4)
    assert measured == [False, True, True] and first.mfu > 1 > max(step.mfu for step in others) > 0
    monkeypatch.setattr(module, "peak_flops_s", lambda device, dtype, again=False: measured.append(again) or 1.0)
    loop = new_loop(*shards, report_mfu=True)
    assert all(step.mfu > 1 for step in loop.run(9)) and measured[3:] == [False, True, True, True]


def test_bad_input_of_a_loop_is_named_in_the_error(shards):
    train, _ = shards
    loop = new_loop(train, None)
    with pytest.raises(ValueError, match="got no validator"):
        loop.validate()
    with pytest.raises(ValueError, match="got validate_every=2 without a validator"):
        next(loop.run(validate_every=2))
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=67))
    with pytest.raises(ValueError, match="tokens is 16, expected at most the model's 8"):
        TrainingLoop(Trainer(model, TrainConfig(tokens=16), steps=1), iter(()), None)


def test_a_run_folder_of_version_0_1_0_still_generates_and_is_not_resumed(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(OLD_RUN, run)
    weights, old = GPT.from_pretrained(run).state_dict(), read_safetensors(OLD_RUN / "checkpoint/model.safetensors")[0]
    assert torch.equal(weights["transformer.wte.weight"], old["transformer.wte.weight"])
    assert main(["generate", str(run), "--prompt", "the", "--max-tokens", "2"]) == 0
    before = sorted(run.rglob("*"))
    assert main(["train", "--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert "got state/ of an older version, expected checkpoints/" in error and error.count("\n") == 1
    assert sorted(run.rglob("*")) == before
