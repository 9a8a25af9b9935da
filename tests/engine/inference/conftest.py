"""The model of the tests of the engine."""

import pytest
import torch

from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=3, n_embd=24, block_size=300, vocab_size=97)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0.0, 0.5)
    return model
