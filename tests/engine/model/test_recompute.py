"""Activation checkpointing: the bits of the plain step, less saved memory, and the recomputed FLOPs."""

import contextlib
import weakref

import pytest
import torch
from torch import nn

from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import forward_flops, multiplying_parameters, recomputed_flops, training_flops
from peakgpt.engine.model.recompute import recomputable, set_recompute
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.core.dispatch import draw_seed, seeds_from, use_backend

SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 67}
PLANS = ("norm", "mlp", "block", "block/2")
CONFIGS = (
    {},
    {"dropout": 0.3},
    {"residual": "post_norm", "dropout": 0.3, "attention_dropout": 0.0, "position": "rotary"},
    {"gated_mlp": True, "activation": "silu", "position": "transformer_xl", "bias": False, "norm": "rms"},
    {"gated_mlp": True, "experts": 3, "position": "relative_bias", "dropout": 0.1},
)


def trained(plan, dtype, **config):
    """Train for three steps; returns the losses and the parameters."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(**SIZES, **config))
    trainer = Trainer(model, TrainConfig(batch=2, tokens=16, dtype=dtype, lr=1e-2, recompute=plan), steps=10)
    ids = torch.randint(67, (2, 17))
    losses = [trainer.step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for _ in range(3)]
    return [*losses, *trainer.optimizer.master_weights(model).values()]


@pytest.mark.parametrize("backend", (None, "eager"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_plan_gives_the_bits_of_the_plain_step(config, dtype, backend):
    """Mutation that makes it fail: the second pass draws new seeds, so that its dropout mask differs from the first."""
    with contextlib.ExitStack() as stack:
        if backend:
            stack.enter_context(use_backend(backend))
            stack.enter_context(seeds_from(draw_seed))  # without this, the eager plain step uses torch's dropout masks
        plain = trained("none", dtype, **config)
        for plan in PLANS:
            for a, b in zip(plain, trained(plan, dtype, **config), strict=True):
                assert torch.equal(a, b), plan


def saved_bytes(plan):
    """Return the bytes that a forward pass saves for backward, each storage once, without the parameters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, "n_layer": 6}))
    set_recompute(model, plan)
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(67, (2, 16))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(ids, ids)
    del loss
    return sum(size for address, size in seen.items() if address not in own)


def test_each_plan_saves_less_than_the_one_before():
    """"none" saves 14 tensors of width C a block (x, h; q, k, v, out; h; 4 C of the MLP), "block" saves x and h."""
    none, mlp, half, block = (saved_bytes(plan) for plan in ("none", "mlp", "block/2", "block"))
    assert none > mlp > half > block
    row = 2 * 16 * 32 * 4
    assert none - mlp == 6 * 4 * row


def test_plan_norm_frees_the_outputs_of_norms_and_none_saves_them(monkeypatch):
    outputs = []

    def recorded(result, function, x):
        outputs.append(weakref.ref(recomputable(result, function, x)))
        return result

    monkeypatch.setattr("peakgpt.engine.model.norms.recomputable", recorded)
    model, ids = GPT(GPTConfig(**SIZES)), torch.randint(67, (2, 16))
    set_recompute(model, "norm")
    loss = model(ids, ids)
    assert len(outputs) == 6 and not any(output() is not None for output in outputs)
    loss.backward()
    set_recompute(model, "none")
    assert model(ids, ids).requires_grad and len(outputs) == 6 + 6


def test_recomputed_flops_of_each_plan():
    config, tokens = GPTConfig(**SIZES, bias=False), 16
    whole = forward_flops(config, tokens)
    head = 2 * config.vocab_size * config.n_embd
    norms = 2 * (2 * config.n_layer + 1) * config.n_embd  # their weights count as multiplying ones in N
    assert recomputed_flops(config, tokens, "block") == whole - head - norms
    assert recomputed_flops(config, tokens, "block/2") == pytest.approx(2 / 3 * (whole - head - norms))
    assert recomputed_flops(config, tokens, "block/9") == pytest.approx((whole - head - norms) / 3)
    assert recomputed_flops(config, tokens, "mlp") == 2 * 3 * 32 * 128
    assert recomputed_flops(config, tokens, "none") == 0
    assert training_flops(config, tokens) == 3 * whole, "model FLOPs do not depend on the plan"
    assert multiplying_parameters(config) * 6 < training_flops(config, tokens)


@pytest.mark.parametrize("more", ({"gated_mlp": True}, {"gated_mlp": True, "experts": 5, "n_layer": 4}), ids=str)
def test_recomputed_flops_with_gates_and_experts(more):
    config, tokens = GPTConfig(**{**SIZES, **more}, bias=False), 16
    outside = 2 * config.vocab_size * config.n_embd + 2 * (2 * config.n_layer + 1) * config.n_embd
    assert recomputed_flops(config, tokens, "block") == forward_flops(config, tokens) - outside
    ups = 3 * 2 if config.experts == 0 else 2 * 2 + 2 * 2  # of C x F: gate and up, or two experts
    assert recomputed_flops(config, tokens, "mlp") == 2 * ups * 32 * 128


@pytest.mark.parametrize("plan", ("all", "block/0", "block/", "mlp/2", "block/-1", ""))
def test_unknown_plans_raise(plan):
    with pytest.raises(ValueError, match=r"recompute is .* expected none, norm, mlp, block, or block/N"):
        TrainConfig(recompute=plan)


def test_a_model_without_blocks_raises():
    with pytest.raises(ValueError, match="expected none for Linear"):
        Trainer(nn.Linear(2, 2), TrainConfig(recompute="block"), steps=1)
