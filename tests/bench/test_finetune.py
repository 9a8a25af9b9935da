"""`peakgpt bench finetune`: its contenders make the same updates, and its figures count no padding."""

import dataclasses

import pytest
import torch

from peakgpt.bench.contenders.finetuning import FINETUNING_CONTENDERS, finetuning_step, make_examples
from peakgpt.bench.finetune import FinetuneCase
from peakgpt.bench.train import LOSS_TOLERANCE
from peakgpt.engine.model.presets import preset
from peakgpt.engine.training.train_config import TrainConfig

CONFIG = preset("gpt2-tiny", n_layer=1, n_embd=32, n_head=2, vocab_size=97, block_size=64)


@pytest.mark.parametrize("dtype", LOSS_TOLERANCE)
def test_all_contenders_have_the_same_losses(dtype):
    """Fails if one of them attends across examples, trains on padding, or weighs its rows instead of its tokens."""
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    request = {"config": dataclasses.asdict(CONFIG), "examples": 5, "tokens": 48,
               "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
    losses = {}
    for name, contender in FINETUNING_CONTENDERS.items():
        if not contender.environment:  # the same code
            step = finetuning_step({**request, "contender": name})
            losses[name] = [step() for _ in range(3)]
    assert losses["TRL"][2] < 0.99 * losses["TRL"][0], "the updates matter"
    for name in ("peakgpt", "TRL, packed"):
        assert losses[name] == pytest.approx(losses["TRL"], rel=LOSS_TOLERANCE[dtype]), name


def test_a_case_counts_the_tokens_of_its_examples():
    case = FinetuneCase("tiny", CONFIG, TrainConfig(tokens=48), 5)
    lengths = [len(example["ids"]) for example in make_examples(CONFIG, 5, 48)]
    assert case.sizes["tokens"] == sum(lengths) < 5 * 48 and min(lengths) < max(lengths)
    assert case.name == "finetune/tiny/5x48/float32" and case.flops > 0
    assert torch.equal(*(torch.tensor(make_examples(CONFIG, 5, 48)[0]["ids"]) for _ in range(2)))
