"""A training state with one flipped bit loads equal or is refused with a ValueError."""

import random

import pytest
import torch

from peakgpt import GPT, AdamW, GPTConfig
from peakgpt.engine.checkpoint.folder import TRAINING_STATE
from peakgpt.engine.checkpoint.safetensors_io import read_safetensors, write_safetensors
from peakgpt.engine.checkpoint.training_state import load_training_state, save_training_state

VALUES = {"done": 17, "data": {"epoch": 3}}


def make():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_embd=8, n_head=2, block_size=8, vocab_size=16))
    return model, AdamW(model.parameters(), dtype=torch.bfloat16)


def content(model, optimizer, values):
    state = optimizer.state_dict()
    tensors = [*model.state_dict().values(), *(t for entry in state["state"].values() for t in entry.values())]
    return [t.tolist() for t in tensors], state["param_groups"], values


@pytest.mark.parametrize("sealed", [True, False], ids=["with digest", "as 0.1.0"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, sealed):
    model, optimizer = make()
    save_training_state(tmp_path, model, optimizer, VALUES)
    expected = content(model, optimizer, VALUES)
    path = tmp_path / TRAINING_STATE
    if not sealed:
        tensors, metadata = read_safetensors(path)
        write_safetensors(path, tensors, {"training": metadata["training"]})
    whole, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *draw.sample(range(8, header), 250), *draw.sample(range(header, len(whole)), 40)]
    loaded = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            values = load_training_state(tmp_path, model, optimizer)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        loaded += 1
        if sealed:
            assert content(model, optimizer, values) == expected, place
        model, optimizer = make()
    path.write_bytes(whole)
    assert load_training_state(tmp_path, *make()) == VALUES and loaded < len(places) / 2
