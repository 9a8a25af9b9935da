"""Weights that are mapped from their file: no copy, and what happens to them and to the file.

Mutations that these tests detect: a shared map instead of a private one; tensors of a pickle used in place; a copy of
every tensor; the header's length not rounded to the width of a number.
"""

import faulthandler
import json
import os
import signal
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from peakgpt.engine.checkpoint.safetensors_io import read_safetensors
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 512}
WTE = "transformer.wte.weight"


def save(folder, seed=0, **changes):
    """Save a model of OPT's family, whose matrices are stored as ours, with separate queries, keys and values."""
    torch.manual_seed(seed)
    opt = {"activation": "relu", "position_offset": 2, "embedding_dropout": 0.0}
    GPT(GPTConfig(**{**SIZES, **opt, **changes})).save_pretrained(folder)
    return folder / "model.safetensors"


def is_mapped(tensor, file):
    """Whether a tensor's memory is a map of a file, by the system's list."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if begin <= tensor.data_ptr() < end:
                return line.rstrip().endswith(str(file))
    return False


def test_weights_of_the_right_dtype_and_layout_are_not_copied(tmp_path):
    file = save(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    copied = {name for name, tensor in model.state_dict().items() if not is_mapped(tensor, file)}
    assert copied == {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias"}, "they are concatenated"
    model = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not any(is_mapped(tensor, file) for tensor in model.state_dict().values())
    save(tmp_path / "gpt2", activation="gelu_tanh", position_offset=0)
    model = GPT.from_pretrained(tmp_path / "gpt2")
    transposed = [t for name, t in model.state_dict().items() if ".c_" in name and name.endswith("weight")]
    assert transposed and all(t.is_contiguous() for t in transposed)


def test_writing_to_a_weight_does_not_change_the_file(tmp_path):
    file = save(tmp_path)
    before, model = file.read_bytes(), GPT.from_pretrained(tmp_path)
    optimizer = model.configure_optimizer(lr=0.1)
    ids = torch.arange(16).view(2, 8)
    model.train()(ids, ids).backward()
    optimizer.step()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    assert file.read_bytes() == before
    again = GPT.from_pretrained(tmp_path).transformer.wte.weight
    assert torch.equal(again, load_file(file)["model.decoder.embed_tokens.weight"])


def test_a_file_that_is_replaced_leaves_the_model_as_it_is(tmp_path):
    """Saving, the hub's client and `mv` replace a file by a rename."""
    save(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(tmp_path, seed=1)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(GPT.from_pretrained(tmp_path).transformer.wte.weight, expected[WTE])
    model.save_pretrained(tmp_path)  # over the file that replaced its own
    assert torch.equal(GPT.from_pretrained(tmp_path).transformer.wte.weight, expected[WTE])


def test_a_file_that_is_cut_off_ends_the_process(tmp_path):
    """docs/families.md says so: the system has no other way to answer an access to a page that is gone."""
    file = save(tmp_path)
    weight = GPT.from_pretrained(tmp_path).transformer.wte.weight.view(-1)
    os.truncate(file, 0)
    if (child := os.fork()) == 0:
        faulthandler.disable()
        weight[-1].item()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS


def test_tensors_of_a_pickle_that_share_memory_are_separated(tmp_path):
    file = save(tmp_path)
    tensors = load_file(file)
    names = [f"model.decoder.layers.0.{norm}_layer_norm.bias" for norm in ("self_attn", "final")]
    assert set(names) <= tensors.keys()
    shared = torch.zeros(32)
    torch.save({**tensors, names[0]: shared, names[1]: shared}, tmp_path / "pytorch_model.bin")
    file.unlink()
    block = GPT.from_pretrained(tmp_path).transformer.h[0]
    with torch.no_grad():
        block.ln_1.bias.fill_(1.0)
    assert not block.ln_2.bias.any()


@pytest.mark.parametrize("padding", range(9))
def test_a_header_of_any_length_is_read(padding, tmp_path):
    """Files of other libraries: numbers may lie at any byte."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(3), "d": torch.empty(0, 2)}
    save_file(tensors, tmp_path / "aligned")
    data = (tmp_path / "aligned").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(json.loads(data[8 : 8 + length])).encode() + b" " * padding
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    got, _ = read_safetensors(tmp_path / "file")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)
        assert got[name].data_ptr() % tensor.element_size() == 0


def test_a_dtype_that_we_do_not_read_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + bytes(3))
    with pytest.raises(ValueError, match=r"file: .*F6_E2M3"):
        read_safetensors(tmp_path / "file")
