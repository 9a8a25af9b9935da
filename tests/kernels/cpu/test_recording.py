"""A recorded training step has the bits of a normal one, and never uses memory or values of others."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peakgpt.engine.gpt import GPT
from peakgpt.engine.graph_capture import WARMUP
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.recompute import set_recompute
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.core.recording import CannotRecord
from peakgpt.kernels.ops.norm import layernorm

recording = pytest.importorskip("peakgpt.kernels.cpu.recording", reason="no C++ extension")

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}
VARIANTS = {
    "gpt2": {},
    "no bias": {"bias": False},
    "dropout": {"dropout": 0.2},
    "penalties": {"z_loss": 1e-2},
    "rotary": {"position": "rotary", "norm": "rms", "bias": False, "gated_mlp": True, "activation": "silu"},
    "norms of heads": {"position": "rotary", "norm": "rms", "bias": False, "norm_offset": 1.0, "qk_norm": "head",
                       "logit_softcap": 3.0},
    "alibi": {"position": "alibi", "embedding_norm": True},
    "relative bias": {"position": "relative_bias"},
    "windows": {"windows": (4, None), "residual": "parallel"},
    "soft cap, sinks": {"attention_softcap": 2.0, "attention_sinks": True, "attention_dropout": 0.2},
    "experts": {"experts": 4, "experts_every": 2},
    "untied": {"tied_head": False, "residual": "post_norm"},
    "sandwich": {"residual": "sandwich_norm", "position": "rotary", "embedding_scale": 5.5},
    "output": {"residual": "output_norm", "position": "rotary", "norm_weight": False, "bias": ("mlp",)},
}  # fmt: skip


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


def _is_recorded(trainer: Trainer) -> bool:
    """Return whether the last step was a replay or was recorded."""
    return isinstance(trainer.update.graph, recording.Recording) and trainer.update.inputs is not None


def _runs():
    """Yield each variant with each dtype and each micro_batch. All pairs of two variants are quick.

    A dtype meets a micro_batch in the optimizer and in the accumulation of gradients, which all variants share.
    """
    quick = {(torch.float32, None), (torch.bfloat16, 1), (torch.bfloat16, 3)}
    for name, dtype, micro_batch in itertools.product(VARIANTS, (torch.float32, torch.bfloat16), (None, 1, 3)):
        slow = name not in ("gpt2", "dropout") and (dtype, micro_batch) not in quick
        marks = [pytest.mark.slow] if slow else []
        yield pytest.param(name, dtype, micro_batch, marks=marks, id=f"{name}-{dtype}-{micro_batch}")


@pytest.mark.parametrize(("name", "dtype", "micro_batch"), list(_runs()))
def test_recorded_steps_have_the_bits_of_normal_steps(name, dtype, micro_batch):
    config = TrainConfig(batch=4, tokens=16, lr=1e-2, dtype=dtype, micro_batch=micro_batch)
    recorded, normal = _trainers(config, **VARIANTS[name])
    _assert_same_bits(recorded, normal)
    assert recorded.update.obstacle is None
    assert _is_recorded(recorded)


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


def test_a_recording_keeps_the_tensors_of_its_kernels_alive():
    """Fails if the tape does not: the memory of the input belongs to one of the later tensors then."""
    inputs, w, b = [torch.randn(64, 64)], torch.ones(64), torch.zeros(64)
    expected, graph = layernorm(inputs[0], w, b), recording.Recording()
    graph.capture(lambda: (layernorm(inputs.pop(), w, b),))
    others = [torch.full((64, 64), 3.0) for _ in range(50)]
    assert torch.equal(graph.replay()[0], expected)
    assert all(bool((other == 3.0).all()) for other in others)


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


class _OfTorch(nn.Module):
    """A model of torch's operators."""

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.drop = nn.Embedding(50, 24), nn.Linear(24, 50), nn.Dropout(0.1)
        self.register_buffer("mean", torch.zeros(24))

    def body(self, x):
        return self.drop(x)

    def forward(self, ids, targets):
        logits = self.head(self.body(self.embed(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _ReadsValue(_OfTorch):
    def body(self, x):
        return x * x.detach().abs().mean().tolist()


class _ReplacesBuffer(_OfTorch):
    def body(self, x):
        self.mean = 0.9 * self.mean + x.detach().mean((0, 1))
        return x - self.mean


class _DropsAgainInBackward(_OfTorch):
    def body(self, x):
        return torch.utils.checkpoint.checkpoint(self.drop, x, use_reentrant=False)


class _OverridesForward(GPT):
    calls = 0

    def __init__(self):
        super().__init__(GPTConfig(**SIZES))

    def forward(self, ids, targets):
        self.calls += 1
        return super().forward(ids, targets) + self.calls


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


@pytest.mark.parametrize("kind", (_OfTorch, _ReadsValue, _ReplacesBuffer, _DropsAgainInBackward, _OverridesForward))
def test_models_with_modules_of_others_run_normally(kind):
    torch.manual_seed(0)
    recorded, normal = _recorded_and_normal(kind(), TrainConfig(batch=4, tokens=16, lr=1e-2))
    _assert_same_bits(recorded, normal)
    assert not _is_recorded(recorded)


def _freeze(trainer: Trainer) -> None:
    trainer.model.transformer.h[0].requires_grad_(False)


def _replace_parameter(trainer: Trainer) -> None:
    trainer.model.transformer.h[0].attn.c_proj.weight = nn.Parameter(torch.ones(32, 32))


def _share_parameter(trainer: Trainer) -> None:
    module = trainer.model.transformer.h[0].attn.c_proj
    module.weight = nn.Parameter(module.weight.detach())  # the optimizer has the old one


def _eval_block(trainer: Trainer) -> None:
    trainer.model.transformer.h[0].eval()


def _recompute(trainer: Trainer) -> None:
    set_recompute(trainer.model, "block")


def _change_attribute(trainer: Trainer) -> None:
    trainer.model.transformer.h[1].attn.dropout = 0.7


def _change_max_norm(trainer: Trainer) -> None:
    trainer.optimizer.max_norm = 1e-3


def _hook_optimizer(trainer: Trainer) -> None:
    def zero(optimizer, args, kwargs):
        for parameter in optimizer.param_groups[1]["params"]:
            parameter.grad.zero_()

    trainer.optimizer.register_step_pre_hook(zero)


CHANGES = (_freeze, _replace_parameter, _share_parameter, _eval_block, _recompute, _change_attribute, _change_max_norm,
           _hook_optimizer)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_or_optimizer_has_the_bits_of_normal_steps(change):
    recorded, normal = _trainers(TrainConfig(batch=4, tokens=16, lr=1e-2), dropout=0.2)
    before, after = list(_batches(WARMUP + 6))[: WARMUP + 2], list(_batches(WARMUP + 6))[WARMUP + 2 :]
    assert _losses(recorded, before) == _losses(normal, before)
    assert _is_recorded(recorded)
    for trainer in (recorded, normal):
        change(trainer)
    assert _losses(recorded, after) == _losses(normal, after)
    for ours, theirs in zip(recorded.model.parameters(), normal.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert recorded.update.obstacle is None


def test_a_step_under_autocast_is_not_the_replay_of_one_without():
    recorded, normal = _trainers(TrainConfig(batch=4, tokens=16, lr=1e-2))
    _assert_same_bits(recorded, normal)
    batches = list(_batches(WARMUP + 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert _losses(recorded, batches) == _losses(normal, batches)
    _assert_same_bits(recorded, normal)


class _CountOperators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_all_operators_of_a_recorded_step():
    recorded, normal = _trainers(TrainConfig(batch=4, tokens=16))
    _assert_same_bits(recorded, normal)
    counts = []
    for trainer in (recorded, normal):
        with _CountOperators() as mode:
            trainer.step(*next(_batches(1)))
        counts.append(mode.count)
    assert counts[0] == counts[1] > 0


def test_new_memory_of_a_frozen_parameter_is_read():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    model.transformer.h[0].requires_grad_(False)
    recorded, normal = _recorded_and_normal(model, TrainConfig(batch=4, tokens=16))
    _assert_same_bits(recorded, normal)
    for trainer in (recorded, normal):
        trainer.model.transformer.h[0].attn.c_proj.weight.data = torch.ones(32, 32)
    _assert_same_bits(recorded, normal)


def _replayed(function, *inputs: torch.Tensor) -> torch.Tensor:
    """Record a function of tensors with other values, and return what its replay makes of these."""
    static, recorded = [torch.zeros_like(value) for value in inputs], recording.Recording()
    recorded.capture(lambda: (function(*static),))
    for tensor, value in zip(static, inputs, strict=True):
        tensor.copy_(value)
    return recorded.replay()[0]


TORCH_FUNCTIONS = {
    "in place": lambda x: x.clone().mul_(3).add_(x),
    "view": lambda x: (y := x + 1)[:, 1:].add_(x[:, :-1]) * y[:, 1:],
    "item": lambda x: (y := x * 2, y.__setitem__((slice(None), 0), 0.0))[0],
    "lists": lambda x: torch._foreach_add(list(x.chunk(2)), 1.0)[1] + torch._foreach_mul([x, x], 2.0)[0][:2],
    "several results": lambda x: x.sort(-1)[0] + x.topk(1)[0],
    "indices": lambda x: x[:, torch.tensor([2, 0])],
    "out": lambda x: torch.mul(x, 2, out=torch.empty_like(x)),
}


@pytest.mark.parametrize("name", TORCH_FUNCTIONS)
def test_operators_of_torch_are_replayed(name):
    function, x = TORCH_FUNCTIONS[name], torch.arange(12.0).view(4, 3)
    assert torch.equal(_replayed(function, x), function(x))


@pytest.mark.parametrize(("function", "message"), (
    (lambda x: x[x > 0], "shape depends on values"),
    (lambda x: x.nonzero(), "shape depends on values"),
    (lambda x: x + x.sum(-1).unsqueeze_(1), "shape of a tensor in place"),
    (lambda x: x + torch.rand(3, generator=torch.Generator()), "generator of its own"),
    (lambda x: x * x.sum().item(), "to the host"),
))  # fmt: skip
def test_what_a_replay_would_not_repeat_is_not_recorded(function, message):
    with pytest.raises(CannotRecord, match=message):
        _replayed(function, torch.arange(12.0).view(4, 3))


def test_large_steps_run_normally_without_a_warning(monkeypatch, recwarn):
    monkeypatch.setattr(recording, "ARENA_BYTES", 1 << 16)
    recorded, normal = _trainers(TrainConfig(batch=4, tokens=16))
    _assert_same_bits(recorded, normal)
    assert "temporaries take more than" in recorded.update.obstacle
    assert not recwarn.list
