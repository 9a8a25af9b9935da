"""The training loop as a library user runs it, and a run folder that version 0.1.0 wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from peakgpt.cli import main
from peakgpt.engine.checkpoint.safetensors_io import read_safetensors
from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.shard_writer import write_shards
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.run_session import Reporter, resume
from peakgpt.engine.training import loop as module
from peakgpt.engine.training.delayed_metrics import DelayedMetrics
from peakgpt.engine.training.loop import StepMetrics, TrainingLoop, ValidationMetrics
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer

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
    return TrainingLoop(Trainer(model, config, steps=20), Batches(train, 4, 16, config.seed), validation, **options)


def test_a_user_trains_validates_saves_and_resumes_bit_for_bit(shards, tmp_path):
    whole = list(new_loop(*shards).run(validate_every=5))
    loop, events = new_loop(*shards), []
    for event in loop.run(validate_every=5, should_stop=lambda: loop.trainer.steps_done == 12):
        events.append(event)
        if isinstance(event, ValidationMetrics):
            loop.save(tmp_path / "run")
    assert loop.trainer.steps_done == 12 and not loop.finished
    resumed = new_loop(*shards)
    resumed.load(tmp_path / "run")
    events = events[: events.index(ValidationMetrics(10, *losses_at(whole, 10))) + 1] + list(
        resumed.run(validate_every=5)
    )
    assert [e.loss for e in events] == [e.loss for e in whole] and resumed.finished
    steps = [e for e in whole if isinstance(e, StepMetrics)]
    assert [e.step for e in steps] == list(range(1, 21)) and steps[-1].loss < steps[0].loss - 1
    assert [e.step for e in whole if isinstance(e, ValidationMetrics)] == [5, 10, 15, 20]
    resumed.save_model(tmp_path / "model")
    model = GPT.from_pretrained(tmp_path / "model")
    masters = resumed.trainer.master_weights()
    assert all(torch.equal(tensor, masters[name]) for name, tensor in model.state_dict().items())


def losses_at(events, step):
    return next((e.loss, e.bits_per_byte) for e in events if isinstance(e, ValidationMetrics) and e.step == step)


def test_a_loop_in_several_runs_makes_the_steps_of_one(shards):
    whole, parts = [e.loss for e in new_loop(*shards).run()], new_loop(*shards)
    losses = [e.loss for e in parts.run(7)] + [e.loss for e in parts.run(7, synchronous=True)]
    assert losses + [e.loss for e in parts.run(7)] == whole and parts.finished and not list(parts.run())


def test_metrics_that_arrive_a_step_late_come_in_order_and_before_validation(shards, monkeypatch):
    """On CUDA a loss is read while the next step runs; here a class on the CPU simulates that."""

    class OneStepLate(DelayedMetrics):
        def put(self, label, value):
            arrived, self.pending = self.take(), (label, float(value))
            return arrived

        def take(self):
            arrived, self.pending = [self.pending] if self.pending else [], None
            return arrived

    monkeypatch.setattr(module, "DelayedMetrics", OneStepLate)
    events = list(new_loop(*shards).run(validate_every=8))
    expected = [*range(1, 9), 8, *range(9, 17), 16, *range(17, 21), 20]
    assert [event.step for event in events] == expected
    assert [i for i, e in enumerate(events) if isinstance(e, ValidationMetrics)] == [8, 17, 22]


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_last_save(shards, tmp_path, what):
    """Regression: training went on with NaN and overwrote the last good checkpoint, with exit code 0."""
    loop = new_loop(*shards)
    list(loop.run(3))
    loop.save(tmp_path)
    saved = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors") if path.is_file()}
    step = loop.trainer.step

    def damaged_step(ids, targets):
        loss = step(ids, targets)
        if what == "gradient":
            loop.trainer.grad_norm = loop.trainer.grad_norm * float("inf")
        if what == "weights":
            for parameter, state in loop.trainer.optimizer.state.items():
                parameter.data.fill_(float("nan"))
                state.get("master", parameter.data).fill_(float("nan"))
        return loss * float("nan") if what == "loss" else loss

    loop.trainer.step = damaged_step
    with pytest.raises(FloatingPointError, match=r"step 4: .* (is nan|is inf|not finite)"):
        for event in loop.run(1):
            assert event.step == 4
        loop.save(tmp_path)
    assert {path: path.read_bytes() for path in saved} == saved


@pytest.mark.parametrize("name", ["lr", "eps", "max_norm", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_train_config_takes_only_finite_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected (a finite number|more than 0|at least 0)"):
        TrainConfig(**{name: value})


def test_rows_have_the_fields_of_metrics_jsonl(shards, monkeypatch):
    monkeypatch.setattr(module, "peak_for", lambda device, dtype: type("Peak", (), {"flops_s": 1e9}))
    step, validation = list(new_loop(*shards, report_mfu=True).run(1, validate_every=1))
    assert list(step.row()) == ["step", "loss", "tokens_per_s", "mfu"] and step.mfu > 0
    assert list(validation.row()) == ["step", "validation_loss", "bits_per_byte"]
    assert list(next(new_loop(*shards).run(1)).row()) == ["step", "loss", "tokens_per_s"]


def test_bad_input_of_a_loop_is_named_in_the_error(shards):
    train, validation = shards
    loop = new_loop(train, None)
    with pytest.raises(ValueError, match="got no validation tokens"):
        loop.validate()
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=67))
    with pytest.raises(ValueError, match="tokens is 16, expected at most the model's 8"):
        TrainingLoop(Trainer(model, TrainConfig(tokens=16), steps=1), iter(()), validation)


def test_a_run_folder_of_version_0_1_0_resumes(tmp_path, monkeypatch):
    """Its weights, optimizer state, random state and position in the data are those of a run that was not stopped.

    run_folder_0.1.0.json has the losses of that run. Other machines round differently, so the bits are compared only
    on a machine like the one that wrote it.
    """
    from peakgpt._C import isas

    recorded = json.loads(OLD_RUN.with_name(f"{OLD_RUN.name}.json").read_text())
    monkeypatch.setattr(module, "peak_for", lambda device, dtype: type("Peak", (), {"flops_s": 1e9}))
    run = tmp_path / "run"
    shutil.copytree(OLD_RUN, run)
    assert main(["train", "--resume", str(run), "--save-every", "4", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    machine = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "isas": list(isas)}
    if machine == recorded["machine"]:
        assert losses == recorded["losses"]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(recorded["losses"]), rtol=5e-3, atol=0.0)


def test_a_training_state_of_version_0_1_0_is_written_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "peak_for", lambda device, dtype: type("Peak", (), {"flops_s": 1e9}))
    run = tmp_path / "run"
    shutil.copytree(OLD_RUN, run)
    session = resume(run, {}, torch.device("cpu"), Reporter())
    session.loop.save(run, session.tokenizer)
    for file in ("state/training_state.safetensors", "checkpoint/model.safetensors"):
        (old, old_text), (new, new_text) = (read_safetensors(folder / file) for folder in (OLD_RUN, run))
        new_text.pop("digest", None)  # of the whole training state; 0.1.0 did not write it
        for text in (old_text, new_text):
            if "training" in text:
                text["training"] = json.loads(text["training"])
                del text["training"]["values"]["data"]  # the position has another form
        assert old_text == new_text and old.keys() == new.keys()
        assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    weights = GPT.from_pretrained(OLD_RUN / "checkpoint").state_dict()
    masters = session.loop.trainer.master_weights()
    assert all(torch.equal(tensor, masters[name]) for name, tensor in weights.items())
