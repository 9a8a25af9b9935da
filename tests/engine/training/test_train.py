"""The training step: configuration, schedule, and losses equal to eager's over the same batches."""

import contextlib
import copy
import itertools

import pytest
import torch

from peakgpt.bench.contenders.eager_gpt import EagerGPT, EagerTrainer
from peakgpt.bench.shared_batches import SharedBatches
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.gradient_memory import GradientMemory
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.dispatch import use_backend

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 67}


def batches():
    generator = torch.Generator().manual_seed(5)
    for _ in itertools.count():
        start = torch.randint(67, (4, 1), generator=generator)
        ids = (start + 3 * torch.arange(17)) % 67  # a pattern to learn
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
def test_losses_of_twenty_steps_equal_eager(dtype, tolerance):
    torch.manual_seed(1)
    model = GPT.from_preset("gpt2", **TINY)
    eager = EagerGPT(model.config)
    eager.load_state_dict(model.state_dict())
    config = TrainConfig(batch=4, tokens=16, lr=3e-3, dtype=dtype)
    trainers = {"peakgpt": Trainer(model, config, steps=20), "eager": EagerTrainer(eager, config, steps=20)}
    shared = SharedBatches(batches(), torch.device("cpu"), trainers)
    for _ in range(20):
        ours, expected = (float(t.step(*shared.take(name))) for name, t in trainers.items())
        assert abs(ours - expected) < tolerance
    assert ours < 4.2, "it learns"


def test_bf16_training_keeps_a_float32_master():
    model = GPT.from_preset("gpt2", **TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, TrainConfig(batch=4, tokens=16, dtype=torch.bfloat16), steps=5)
    masters = trainer.optimizer.master_weights(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(masters[name], before[name])


def test_shared_batches_are_equal_for_all_contenders_and_freed():
    shared = SharedBatches(batches(), torch.device("cpu"), ("a", "b"))
    first = [shared.take("a") for _ in range(3)]
    assert all(torch.equal(x[0], shared.take("b")[0]) for x in first) and not shared.pending
    shared.take("a")
    shared.remove("b")
    shared.take("a")
    assert len(shared.pending) == 0


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"batch": 0}, "batch is 0, expected"),
        ({"micro_batch": 9}, "micro_batch is 9, expected 1 to batch 8"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"dtype": torch.half}, "dtype is"),
    ],
)
def test_train_config_names_bad_values(fields, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**fields)


@pytest.mark.parametrize("config", [{}, {"tied_head": False, "head_bias": True}], ids=str)
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_give_the_update_of_the_whole_batch(micro_batch, config):
    """Most ignored targets are in one sequence, so the mean of the micro-batches' means would be another loss."""
    results = []
    for size in (None, micro_batch):
        torch.manual_seed(0)
        model = GPT.from_preset("gpt2", **TINY, **config)
        trainer = Trainer(model, TrainConfig(batch=4, tokens=16, micro_batch=size, lr=1e-2), steps=5)
        losses = []
        for ids, targets in itertools.islice(batches(), 3):
            targets[0, 2:] = -100
            losses.append(trainer.step(ids, targets))
        results.append([*losses, trainer.grad_norm])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_accumulate_into_kept_memory(dtype, backend):
    """They equal the gradients that autograd accumulates; the tied embedding receives two gradients."""

    def gradients(sinks):
        torch.manual_seed(0)
        model = GPT.from_preset("gpt2", **TINY)
        optimizer = model.configure_optimizer(dtype=dtype)
        sinks = GradientMemory(optimizer).zero() if sinks else {}
        with use_backend(backend) if backend else contextlib.nullcontext():
            for ids, targets in itertools.islice(batches(), 2):
                with accumulate_into(sinks):
                    model(ids, targets).backward()
        optimizer.step()
        return optimizer, {name: p.grad for name, p in model.named_parameters()}

    (optimizer, grads), (_, expected) = gradients(True), gradients(False)
    for name, grad in expected.items():
        tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * float(grad.abs().max())
        torch.testing.assert_close(grads[name], grad, rtol=0.0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_a_scheduler_that_would_have_no_effect_is_refused():
    model = GPT.from_preset("gpt2", **TINY)
    trainer = Trainer(model, TrainConfig(batch=2, tokens=16, lr=1e-3), steps=9)
    other = copy.deepcopy(trainer.optimizer.state_dict())
    other["param_groups"][0]["lr"] = 5.0
    trainer.optimizer.load_state_dict(other)  # a state of a run with another lr
    trainer.step(*next(batches()))
    torch.optim.lr_scheduler.LinearLR(trainer.optimizer)
    with pytest.raises(ValueError, match=r"lr of a parameter group is not the config's 0\.001"):
        trainer.step(*next(batches()))


def test_a_parameter_that_is_frozen_after_a_step_keeps_its_value():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20))
    trainer, ids = Trainer(model, TrainConfig(batch=2, tokens=8, warmup=0.0), steps=20), torch.arange(16).view(2, 8)
    for _ in range(4):
        trainer.step(ids, ids)
    frozen = model.transformer.h[0].requires_grad_(False)
    before = [parameter.clone() for parameter in frozen.parameters()]
    for _ in range(2):
        trainer.step(ids, ids)
    assert all(map(torch.equal, before, frozen.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_frozen_parameters_train_in_bfloat16_and_are_saved_with_all_their_bits(optimizer, ema_decay):
    """Regression: they stayed float32, so the first product got two dtypes."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=20))
    frozen = {f"transformer.h.0.{n}": p for n, p in model.transformer.h[0].requires_grad_(False).named_parameters()}
    before = {name: parameter.clone() for name, parameter in frozen.items()}
    config = TrainConfig(batch=2, tokens=8, warmup=0.0, dtype=torch.bfloat16, optimizer=optimizer, ema_decay=ema_decay)
    trainer, ids = Trainer(model, config, steps=20), torch.arange(16).view(2, 8)
    losses = [trainer.step(ids, ids).item() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in frozen.values())
    saved = dict(trainer.saved_weights())
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    model.requires_grad_(True)  # thawed
    trainer.step(ids, ids)
    assert not any(torch.equal(trainer.master_weights()[name], value) for name, value in before.items())


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias"])
def test_hooks_of_parameters_run_and_change_the_gradient(name, micro_batch):
    """Regression: gradients are added to their memory without autograd, so hooks had no effect. Also after removal."""
    config = TrainConfig(batch=4, tokens=16, dtype=torch.float32, micro_batch=micro_batch, weight_decay=0.0, lr=1e-3)
    trainers = []
    for _ in range(2):
        torch.manual_seed(1)
        trainers.append(Trainer(GPT.from_preset("gpt2", **TINY), config, steps=20))
    plain, hooked = trainers
    shared = SharedBatches(batches(), torch.device("cpu"), ("plain", "hooked"))
    parameter, calls = hooked.model.get_parameter(name), []

    def step():
        losses = [t.step(*shared.take(n)) for t, n in ((plain, "plain"), (hooked, "hooked"))]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)

    step()
    step()
    handle = parameter.register_hook(lambda grad: calls.append(grad.shape))
    step()
    assert calls == [parameter.shape] * (1 if micro_batch is None else 2)
    handle.remove()
    step()
    zero = parameter.register_hook(torch.zeros_like), parameter.register_post_accumulate_grad_hook(calls.append)
    for state in hooked.optimizer.state.values():
        state["exp_avg"].zero_()
    before = parameter.detach().clone()
    hooked.step(*next(batches()))
    assert torch.equal(parameter, before) and calls[-1] is parameter
    zero[0].remove()
    zero[1].remove()
    hooked.step(*next(batches()))
    assert not torch.equal(parameter, before)
