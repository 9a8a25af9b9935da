"""Files that no model has: each is one sentence with the path, never a hang or a traceback."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from peakgpt.engine.checkpoint.quantized.folder import write_quantized
from peakgpt.engine.checkpoint.quantized.weights import quantize_state
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.quantized_linear import Format

WTE = "transformer.wte.weight"
FILES = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
         "pytorch_model.bin")  # fmt: skip


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=16))
    model.save_pretrained(tmp_path)
    return model


def expect_one_sentence(folder):
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_file_that_never_ends_is_refused(name, kind, model, tmp_path):
    """Regression: a pipe without a writer blocked, and a link to /dev/zero took all memory."""
    (tmp_path / name).unlink(missing_ok=True)
    if name in FILES[3:]:
        (tmp_path / "model.safetensors").unlink()
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}
    make[kind](tmp_path / name)
    expect_one_sentence(tmp_path)


@pytest.mark.parametrize("name", [1, None, (1, 2), b"a"])
def test_a_pickle_with_another_name_is_refused(name, model, tmp_path):
    torch.save({**model.state_dict(), name: torch.ones(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    expect_one_sentence(tmp_path)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, lambda t: t.to("meta"),
                                    lambda t: t.to(torch.complex64), lambda t: t.tolist(),
                                    lambda t: torch.ones(1, 1).expand(10**9, 10**9)])  # fmt: skip
def test_a_pickle_of_another_kind_of_tensor_is_refused(change, model, tmp_path):
    state = load_file(tmp_path / "model.safetensors")
    torch.save({**state, WTE: change(state[WTE])}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    expect_one_sentence(tmp_path)


def test_one_high_layer_number_does_not_build_the_layers_below_it(model, tmp_path):
    """Regression: n_layer was compared with the highest number only, so one tensor name made it a hang."""
    path, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    save_file({**load_file(path), "transformer.h.1999999999.ln_1.weight": torch.ones(32)}, path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 2_000_000_000}))
    expect_one_sentence(tmp_path)


@pytest.mark.parametrize("header", [b"[" * 200_000, b'{"a":' * 20_000, b"", b"{}", b"\xff"])
def test_a_damaged_header_is_refused(header, model, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    expect_one_sentence(tmp_path)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_integers_of_another_dtype_are_refused(bits, model, tmp_path):
    """Regression: bool weights were computed with, other dtypes failed in the first forward."""
    out, form = tmp_path / "out", Format(bits)
    write_quantized(tmp_path, out, quantize_state(model.state_dict(), form), form)
    path, right = out / "quantised.safetensors", {8: torch.int8, 4: torch.uint8}[bits]
    tensors = load_file(path)
    name = "transformer.h.0.attn.c_attn.q"
    assert tensors[name].dtype == right and GPT.from_pretrained(out)
    for dtype in {torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64} - {right}:
        save_file({**tensors, name: tensors[name].to(dtype)}, path)
        expect_one_sentence(out)


@pytest.mark.parametrize("wrong", [{"bits": 4.0}, {"bits": 8.0}, {"group": 64.0}, {"group": 0}, {"bits": True},
                                   {"a": 1}])  # fmt: skip
def test_a_damaged_quantization_is_refused(wrong, model, tmp_path):
    out, form = tmp_path / "out", Format(4)
    write_quantized(tmp_path, out, quantize_state(model.state_dict(), form), form)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= wrong
    (out / "config.json").write_text(json.dumps(config))
    expect_one_sentence(out)
