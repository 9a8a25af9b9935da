"""ULMFiT's options: the learning rate of each layer, and which layers train at which update."""

import pytest
import torch

from peakgpt.engine.finetuning.labelled_model import SequenceModel
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.layer_depths import depths
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 32}
KINDS = ("head.", "gpt.transformer.ln_f", "gpt.transformer.h.1", "gpt.transformer.h.0", "gpt.transformer.w")
DEPTHS = dict(zip(KINDS, (0, 0, 1, 2, 3), strict=True))


def make_trainer(steps=8, **options):
    torch.manual_seed(0)
    model = SequenceModel(GPT(GPTConfig(**SIZES)), 2, lm_loss_weight=0.5)
    config = TrainConfig(batch=3, tokens=8, steps=steps, weight_decay=0.0, lr=1e-3, warmup_steps=0, schedule="constant",
                         **options)  # fmt: skip
    return Trainer(model, config)


def step(trainer):
    """Make an update; return the largest change of a weight in each part of the model."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    ids = torch.randint(32, (3, 1, 8), generator=torch.Generator().manual_seed(1))
    trainer.step(ids, torch.full((3, 1), 8), torch.tensor([0, 1, 0]))
    changes = {name: (p.detach() - before[name]).abs().max() for name, p in trainer.model.named_parameters()}
    return {kind: max(change for name, change in changes.items() if name.startswith(kind)).item() for kind in KINDS}


def test_depths_count_from_the_head():
    model = make_trainer().model
    found = depths(model)
    names = {name: found[p] for name, p in model.named_parameters()}
    assert all(names[name] == DEPTHS[kind] for name in names for kind in KINDS if name.startswith(kind))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_layer_has_the_rate_of_the_one_above_times_the_decay(optimizer):
    """The first update of AdamW changes a weight by its learning rate; Muon's matrices have groups of their own."""
    trainer = make_trainer(layerwise_lr_decay=0.5, optimizer=optimizer)
    found = depths(trainer.model)
    assert {group["lr"] / 1e-3 for group in trainer.optimizer.param_groups} == {1.0, 0.5, 0.25, 0.125}
    for group in trainer.optimizer.param_groups:
        assert {found[p] for p in group["params"]} == {round(-torch.log2(torch.tensor(group["lr"] / 1e-3)).item())}
    if optimizer == "adamw":
        expected = {kind: 1e-3 * 0.5**depth for kind, depth in DEPTHS.items()}
        assert step(trainer) == pytest.approx(expected, rel=1e-2)


def test_layers_are_unfrozen_from_the_last_to_the_embeddings():
    """Four depths in the first half of 8 updates: one more at each update."""
    trainer = make_trainer(gradual_unfreezing=0.5)
    trainer.model.head.weight.data.normal_()  # or the layers below have tiny gradients
    for update in range(6):
        changes = step(trainer)
        assert {kind: change > 0 for kind, change in changes.items()} == {k: d <= update for k, d in DEPTHS.items()}


def test_a_resumed_training_unfreezes_the_same_layers():
    first, second = make_trainer(gradual_unfreezing=1.0), make_trainer(gradual_unfreezing=1.0)
    for _ in range(3):
        step(first)
    second.load_saved_weights(dict(first.saved_weights()))
    second.load_state_dict(first.state_dict())
    assert step(first) == step(second)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_parameters_stay_frozen():
    trainer = make_trainer()
    trainer.model.gpt.transformer.h[1].requires_grad_(False)
    again = Trainer(trainer.model, TrainConfig(batch=3, tokens=8, steps=2, gradual_unfreezing=0.1))
    changes = [step(again), step(again)]
    assert changes[1]["gpt.transformer.h.1"] == 0 < changes[1]["gpt.transformer.h.0"]
