"""A trace has the steps of its window, with the names of our ops, and no other step is profiled."""

import gzip
import json

import pytest
import torch

from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.step_profile import StepProfile, check_window
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer


def profiled_steps(folder, window, steps):
    """Train for some steps; return which of them ran under a profiler, and the path of the trace."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=67))
    trainer, ids = Trainer(model, TrainConfig(batch=2, tokens=8), steps=10), torch.randint(67, (2, 8))
    found = []
    with StepProfile(window, folder, torch.device("cpu")) as profile:
        for step in range(1, steps + 1):
            profile.before_step(step)
            if torch._C._autograd._profiler_enabled():
                found.append(step)
            trainer.step(ids, ids)
    assert not torch._C._autograd._profiler_enabled()
    return found, profile.path


def test_a_trace_has_our_ops_by_name_and_only_its_steps_are_profiled(tmp_path):
    found, path = profiled_steps(tmp_path, "3:4", 7)
    assert found == [3, 4] and path == tmp_path / "profile" / "steps-3-4.json.gz"
    with gzip.open(path) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    for op in ("attention_qkv", "mlp", "add_layernorm", "linear_cross_entropy", "adamw"):
        assert f"peakgpt::{op}" in names, op


def test_a_run_that_ends_in_the_window_writes_what_it_has(tmp_path):
    found, path = profiled_steps(tmp_path, "2:90", 3)
    assert found == [2, 3] and path.is_file()


def test_a_run_that_is_resumed_after_the_window_writes_nothing(tmp_path):
    with StepProfile("2:3", tmp_path, torch.device("cpu")) as profile:
        profile.before_step(4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("done", "steps"), [(0, 9), (13, 20), (12, None)])
def test_a_window_without_a_step_of_the_run_is_refused(done, steps):
    with pytest.raises(ValueError, match=f"profile is 10:12, expected steps that the run makes: {done + 1}"):
        check_window("10:12", done, steps)
    for done, steps in ((0, 10), (11, 20), (0, None)):
        check_window("10:12", done, steps)
