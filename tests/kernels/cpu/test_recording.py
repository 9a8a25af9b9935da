"""A recorded training step has the bits of a normal one, and never uses memory or values of others."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from peakgpt.engine.gpt import GPT
from peakgpt.engine.graph_capture import WARMUP
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.core.dispatch import use_backend

recording = pytest.importorskip("peakgpt.kernels.cpu.recording", reason="no C++ extension")

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}
VARIANTS = {
    "gpt2": {},
    "no bias": {"bias": False},
    "dropout": {"dropout": 0.2},
    "penalties": {"z_loss": 1e-2},
    "rotary": {"position": "rotary", "norm": "rms", "bias": False, "gated_mlp": True, "activation": "silu"},
    "alibi": {"position": "alibi", "embedding_norm": True},
    "relative bias": {"position": "relative_bias"},
    "windows": {"windows": (4, None), "residual": "parallel"},
    "experts": {"experts": 4, "experts_every": 2},
    "untied": {"tied_head": False, "residual": "post_norm"},
}


def _batches(count: int, batch: int = 4, tokens: int = 16):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        rows = torch.randint(50, (batch, tokens + 1), generator=generator)
        yield rows[:, :-1], rows[:, 1:].clone()


def _trainers(config: TrainConfig, **variant) -> tuple[Trainer, Trainer]:
    """Return a trainer that records its step and one that does not, with equal models."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, **variant))
    return _recorded_and_normal(model, config)


def _recorded_and_normal(model: nn.Module, config: TrainConfig) -> tuple[Trainer, Trainer]:
    normal = Trainer(copy.deepcopy(model), config, steps=20)
    normal.update.obstacle = "for comparison"
    return Trainer(model, config, steps=20), normal


def _losses(trainer: Trainer, batches) -> list[float]:
    torch.manual_seed(1)
    return [trainer.step(*batch).item() for batch in batches]


def _assert_same_bits(recorded: Trainer, normal: Trainer, steps: int = WARMUP + 4) -> None:
    assert _losses(recorded, _batches(steps)) == _losses(normal, _batches(steps))
    for (name, ours), theirs in zip(recorded.model.named_parameters(), normal.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(recorded.grad_norm, normal.grad_norm)


def test_a_recording_does_not_import_dynamo():
    """Regression: the third step of each run imported it, which took seconds and 150 MiB."""
    code = f"""
import sys, torch
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
trainer = Trainer(GPT(GPTConfig(**{SIZES})), TrainConfig(batch=4, tokens=16, dtype=torch.float32), steps=20)
ids = torch.zeros(4, 16, dtype=torch.long)
for _ in range({WARMUP + 2}):
    trainer.step(ids, ids)
print(trainer.update.graph is not None, trainer.update.obstacle, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "None", "False"], done.stderr


@pytest.mark.parametrize("micro_batch", (None, 1, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_recorded_steps_have_the_bits_of_normal_steps(name, dtype, micro_batch):
    config = TrainConfig(batch=4, tokens=16, lr=1e-2, dtype=dtype, micro_batch=micro_batch)
    recorded, normal = _trainers(config, **VARIANTS[name])
    _assert_same_bits(recorded, normal)
    is_recorded = name != "experts"  # the number of tokens of each expert is read on the host
    assert (recorded.update.obstacle is None) == is_recorded
    assert isinstance(recorded.update.graph, recording.Recording)


@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_micro_batches_run_at_the_same_time_unless_they_draw_random_numbers(dropout):
    recorded, normal = _trainers(TrainConfig(batch=4, tokens=16, micro_batch=1), dropout=dropout)
    _assert_same_bits(recorded, normal)
    assert len(recorded.update.graph.parts) == (0 if dropout else 4)


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_bits_of_parallel_micro_batches_do_not_depend_on_the_threads(threads):
    config = TrainConfig(batch=4, tokens=16, micro_batch=1)
    before = torch.get_num_threads()
    expected = _losses(_trainers(config)[1], _batches(8))
    try:
        torch.set_num_threads(threads)
        assert _losses(_trainers(config)[0], _batches(8)) == expected
    finally:
        torch.set_num_threads(before)


def test_replays_leave_the_memory_of_others_alone():
    recorded, normal = _trainers(TrainConfig(batch=4, tokens=16, micro_batch=2))
    batches = list(_batches(12))
    losses, others = [], []
    for batch in batches:
        losses.append(recorded.step(*batch).item())
        # Freed temporaries of the capture would be given to these tensors.
        others += [torch.full((size,), 3.0) for size in (16, 64, 512, 1600, 2048, 8192, 65536)]
    assert all(bool((other == 3.0).all()) for other in others)
    assert losses == _losses(normal, batches)


def test_arena_gives_freed_memory_to_later_tensors():
    recorded, _ = _trainers(TrainConfig(batch=4, tokens=16), n_inner=256)
    deep, _ = _trainers(TrainConfig(batch=4, tokens=16, recompute="block"), n_inner=256)
    for trainer in (recorded, deep):
        _losses(trainer, _batches(WARMUP + 1))
    assert deep.update.graph.arena.used < 0.8 * recorded.update.graph.arena.used


@pytest.mark.parametrize("micro_batch", (None, 2))
def test_replay_checks_the_ids(micro_batch):
    recorded, _ = _trainers(TrainConfig(batch=4, tokens=16, micro_batch=micro_batch))
    _losses(recorded, _batches(WARMUP + 2))
    ids, targets = next(_batches(1))
    with pytest.raises(ValueError, match=r"values 0 to 50|0 to 49"):
        recorded.step(ids.clone().fill_(50), targets)
    recorded.step(ids, targets)


def test_ignored_targets_change_the_mean_in_a_replay():
    recorded, normal = _trainers(TrainConfig(batch=4, tokens=16))
    _assert_same_bits(recorded, normal)
    ids, targets = next(_batches(1))
    for ignored in (0, 1, 63, 64):
        targets.view(-1)[:ignored] = -100
        ours, theirs = recorded.step(ids, targets).item(), normal.step(ids, targets).item()
        assert ours == theirs or (ours != ours and theirs != theirs)


class _ReadsValue(nn.Module):
    """A model that decides by a value on the host."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 50)

    def forward(self, ids, targets):
        logits = self.embed(ids)
        if logits.sum().item() > 1e9:
            logits = -logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _TorchOnly(nn.Module):
    """A model of torch's operators."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(50, 24), nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(24, 50)

    def forward(self, ids, targets):
        logits = self.head(self.body(self.embed(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_a_changed_option_is_recorded_again():
    recorded, normal = _trainers(TrainConfig(batch=4, tokens=16))
    for step, batch in enumerate(_batches(14)):
        for trainer in (recorded, normal):
            trainer.optimizer.param_groups[0]["weight_decay"] = 0.1 if step < 7 else 0.5
        assert recorded.step(*batch).item() == normal.step(*batch).item()
    assert recorded.update.obstacle is None


def test_a_forced_backend_is_used_after_the_recording():
    recorded, normal = _trainers(TrainConfig(batch=4, tokens=16))
    _assert_same_bits(recorded, normal)
    batch = next(_batches(1))
    with use_backend("eager"):
        assert recorded.step(*batch).item() == normal.step(*batch).item()
    _assert_same_bits(recorded, normal)


@pytest.mark.parametrize(("kind", "is_recorded"), ((_ReadsValue, False), (_TorchOnly, True)))
def test_models_of_torchs_operators_train_with_the_same_bits(kind, is_recorded):
    torch.manual_seed(0)
    model, config = kind(), TrainConfig(batch=4, tokens=16, lr=1e-2)
    recorded, normal = _recorded_and_normal(model, config)
    _assert_same_bits(recorded, normal)
    assert (recorded.update.obstacle is None) == is_recorded


def test_large_steps_run_normally_without_a_warning(monkeypatch, recwarn):
    monkeypatch.setattr(recording, "ARENA_BYTES", 1 << 16)
    recorded, normal = _trainers(TrainConfig(batch=4, tokens=16))
    _assert_same_bits(recorded, normal)
    assert "temporaries take more than" in recorded.update.obstacle
    assert not recwarn.list
