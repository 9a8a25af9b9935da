"""Training adapters: frozen weights have no gradient, no optimizer state and no FLOPs of a gradient."""

import pytest
import torch

from peakgpt import GPT, GPTConfig, LoraConfig
from peakgpt.engine.model.flops import forward_flops, multiplying_parameters, trained_weights, training_flops
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer

SIZES = {"vocab_size": 96, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
IDS = torch.randint(96, (4, 9), generator=torch.Generator().manual_seed(0))


def adapted(rate=0.0, **changes):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SIZES, **changes))
    model.add_adapter(LoraConfig(r=3, target_modules="all-linear", lora_dropout=rate))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_adapters_train_and_have_state(dtype):
    model = adapted()
    before = {name: p.detach().to(dtype, copy=True) for name, p in model.named_parameters()}
    trainer = Trainer(model, TrainConfig(lr=1e-2, warmup=0, batch=4, tokens=9, dtype=dtype), steps=4)
    losses = [float(trainer.step(IDS, IDS)) for _ in range(4)]
    assert losses[-1] < losses[0]
    adapters = {name for name in before if ".adapters." in name}
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == adapters
    own = {p for name, p in model.named_parameters() if name in adapters}
    assert set(trainer.optimizer.state) == own, "frozen weights have no moments and no masters"
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(p.grad is None for p in model.parameters() if p not in own)


def test_dropout_drops_inputs_of_the_adapter_alone():
    model = adapted(0.5)
    assert torch.equal(model(IDS), model(IDS)), "B is zero, and the base model has no dropout"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.1)
    assert not torch.allclose(model(IDS), model(IDS), atol=1e-4)
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


def test_muon_is_refused():
    with pytest.raises(ValueError, match="optimizer is muon for a model with adapters, expected adamw"):
        Trainer(adapted(), TrainConfig(optimizer="muon", batch=4, tokens=9), steps=1)


@pytest.mark.parametrize(
    "changes", [{}, {"tied_head": False, "head_bias": True}, {"position": "rotary", "word_dim": 16},
                {"experts": 5, "experts_per_token": 3, "router_bias": True},
                {"qk_norm": "head", "attention_sinks": True}],
    ids=str,
)  # fmt: skip
def test_all_weights_of_a_model_train(changes):
    model = GPT(GPTConfig(**SIZES, **changes))
    assert trained_weights(model) == {"frozen": 0, "added": 0}
    assert training_flops(model.config, 16) == 3 * forward_flops(model.config, 16)


def test_flops_of_frozen_weights():
    model = adapted()
    weights, n = trained_weights(model), multiplying_parameters(model.config)
    added = sum(p.numel() for name, p in model.named_parameters() if ".adapters." in name)
    assert weights == {"frozen": n, "added": added}
    attention = 3 * (forward_flops(model.config, 16) - 2 * n)
    assert training_flops(model.config, 16, **weights) == 4 * n + 6 * added + attention
    model.transformer.ln_f.requires_grad_(True)
    assert trained_weights(model)["frozen"] == n - 2 * 32
