"""The average of the weights: its values, what is validated and saved, and that it resumes to the bit."""

import pytest
import torch

from peakgpt.engine.gpt import GPT
from peakgpt.engine.graph_dry_run import DryRun
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training import trainer as trainer_module
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.core.dispatch import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16)


def make_trainer(dtype=torch.float32, decay=0.9):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=37, dropout=0.1))
    return Trainer(model, TrainConfig(batch=2, tokens=8, lr=1e-2, dtype=dtype, ema_decay=decay), steps=20)


def train(trainer, steps):
    losses = []
    for step in range(trainer.steps_done, trainer.steps_done + steps):
        torch.manual_seed(step)  # of batch and dropout
        ids = torch.randint(37, (2, 9))
        losses.append(float(trainer.step(ids[:, :-1], ids[:, 1:])))
    return losses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_average_is_the_decayed_sum_of_the_masters(dtype):
    """Mutation that makes it fail: average the rounded parameters, or leave out the smaller decay at the start."""
    trainer = make_trainer(dtype)
    expected = {name: master.double() for name, master in trainer.master_weights().items()}
    for step in range(12):
        train(trainer, 1)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, master in trainer.master_weights().items():
            expected[name] = decay * expected[name] + (1 - decay) * master.double()
    saved = dict(trainer.saved_weights())
    assert saved.keys() == trainer.model.state_dict().keys()
    for name, average in saved.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(average, trainer.master_weights()[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_validation_has_the_average_and_training_goes_on_with_the_weights(dtype):
    trainer, other = make_trainer(dtype), make_trainer(dtype)
    train(trainer, 5)
    with trainer.validated_weights():
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, dict(trainer.saved_weights())[name].to(dtype))
    assert train(trainer, 5) == train(other, 10)[5:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_resumed_average_has_the_bits_of_an_uninterrupted_one(dtype):
    """Mutation that makes it fail: state_dict without the masters, or load_saved_weights that leaves the average."""
    whole, first, resumed = (make_trainer(dtype) for _ in range(3))
    expected = train(whole, 12)
    train(first, 6)
    weights = {name: tensor.clone() for name, tensor in first.saved_weights()}
    train(resumed, 2)  # another state, which is replaced
    resumed.load_saved_weights(weights)
    resumed.load_state_dict(first.state_dict())
    assert train(resumed, 6) == expected[6:]
    for ours, theirs in ((resumed, whole),):
        for a, b in zip(ours.saved_weights(), theirs.saved_weights(), strict=True):
            assert a[0] == b[0] and torch.equal(a[1], b[1])
        for name, master in ours.master_weights().items():
            assert torch.equal(master, theirs.master_weights()[name])


def test_a_state_without_an_average_is_refused():
    trainer, plain = make_trainer(), make_trainer(decay=None)
    for ours, theirs, got in ((trainer, plain, "without"), (plain, trainer, "with")):
        with pytest.raises(ValueError, match=f"got one {got} an average of the weights, expected ema_decay as it was"):
            ours.load_state_dict(theirs.state_dict())


def test_a_graphed_step_averages_with_the_bits_of_the_plain_step(monkeypatch):
    """Mutation that makes it fail: pass the weight of the average by value."""
    plain, losses = make_trainer(), []
    with use_backend("eager"):  # the CPU's kernels read values on the host
        losses.append(train(plain, 5))
        monkeypatch.setattr(trainer_module, "step_graphs", lambda device: DryRun)
        graphed = make_trainer()
        losses.append(train(graphed, 5))
    assert losses[0] == losses[1] and graphed.update.inputs is not None
    for a, b in zip(plain.saved_weights(), graphed.saved_weights(), strict=True):
        assert torch.equal(a[1], b[1])
