"""MXFP4 checkpoints: the bits that transformers decodes, the product with them, and the same bytes in saved folders."""

import json

import pytest
import torch
import transformers
from family_variants import YARN
from safetensors.torch import load_file, save_file

from peakgpt.cli import main
from peakgpt.engine.checkpoint.quantized.mxfp4 import mxfp4_weights
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.program_executor import ProgramExecutor
from peakgpt.engine.model.grouped_linear import GroupedExpertLinear
from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.ops.quantize import round_inputs

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 96, "max_position_embeddings": 32, "vocab_size": 259, "num_local_experts": 5,
         "num_experts_per_tok": 2, "sliding_window": 7, "rope_parameters": YARN, "bos_token_id": None,
         "eos_token_id": None, "pad_token_id": None}  # fmt: skip
METHOD = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def write_folder(folder, low=120, high=124):
    """Write a checkpoint as transformers writes it, with random blocks, and scales from low to high - 1."""
    torch.manual_seed(11)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, inputs, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, rows, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(low, high, (experts, rows, inputs // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | METHOD))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mxfp4"))


def bits(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_decoded_weights_have_the_bits_of_transformers(dtype, tmp_path):
    """Of all elements and scales: also those that only numbers without a normal exponent, or infinities, express."""
    write_folder(tmp_path, 0, 255)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=transformers.Mxfp4Config(dequantize=True)
    ).state_dict()
    ours = GPT.from_pretrained(tmp_path, dtype=dtype, dequantize=True).state_dict()
    for layer in range(2):
        experts, expected = f"transformer.h.{layer}.mlp.experts", f"model.layers.{layer}.mlp.experts"
        gate_up, down = theirs[f"{expected}.gate_up_proj"].mT, theirs[f"{expected}.down_proj"].mT
        assert gate_up.dtype == dtype and (gate_up == 0).any() and gate_up.isinf().any()
        assert torch.equal(bits(ours[f"{experts}.c_gate.weight"]), bits(gate_up[:, 0::2]))
        assert torch.equal(bits(ours[f"{experts}.c_fc.weight"]), bits(gate_up[:, 1::2]))
        assert torch.equal(bits(ours[f"{experts}.c_proj.weight"]), bits(down))


def test_logits_of_a_decoded_model_equal_transformers(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=transformers.Mxfp4Config(dequantize=True),
        attn_implementation="eager", experts_implementation="eager",
    ).eval()  # fmt: skip
    ids = torch.randint(SIZES["vocab_size"], (2, 20))
    with torch.no_grad():
        ours = GPT.from_pretrained(folder, dequantize=True)(ids)
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_products_read_the_elements_as_stored(folder):
    """The weights are exact, so the only error is that of the inputs, rounded to 8 bits: 0.4 % of their largest."""
    model, decoded = GPT.from_pretrained(folder), GPT.from_pretrained(folder, dequantize=True)
    layers = [module for module in model.modules() if isinstance(module, GroupedExpertLinear)]
    assert len(layers) == 6 and not any(p.requires_grad for p in model.parameters())
    ids = torch.randint(SIZES["vocab_size"], (1, 20))
    with torch.no_grad():
        expected = decoded(ids)
        assert 0 < (model(ids) - expected).norm() < 0.02 * expected.norm()
        with use_backend("eager"):
            eager = model(ids)
        program = ProgramExecutor(model, 2).step([Chunk(ids[0], 0, [0, 1], num_logits=20)])
    for got in (model(ids)[0], program):  # few of the inputs are rounded otherwise, because sums have other orders
        assert (got - eager[0]).norm() < 0.002 * eager.norm()
    name, rows, offsets = "transformer.h.1.mlp.experts.c_fc", torch.randn(6, 64), torch.tensor([0, 0, 1, 5, 5, 6])
    layer = model.get_submodule(name)
    product = decoded.get_submodule(name)(round_inputs(rows, 32), offsets)
    for backend in ("eager", "cpu"):
        with use_backend(backend):
            torch.testing.assert_close(layer(rows, offsets), product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_path_of_inference_runs(folder, dtype):
    model, prompt = GPT.from_pretrained(folder, dtype=dtype), torch.randint(SIZES["vocab_size"], (1, 9))
    greedy = model.generate(prompt, max_new_tokens=8)
    engine = Engine(model, budget=4)
    engine.submit(prompt[0].tolist(), SamplingParams(temperature=0, max_tokens=8))
    assert [token for output in engine.outputs() for token in output.token_ids] == greedy[0, 9:].tolist()
    assert not engine.executor_note
    assert model.generate(prompt, max_new_tokens=8, num_beams=3).shape == (1, 17)
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    assert model.generate(prompt.expand(2, -1), mask, max_new_tokens=3).shape == (2, 12)
    with torch.no_grad():
        expected = torch.log_softmax(model(prompt).float(), -1)[0, :-1].gather(1, prompt[0, 1:, None])[:, 0]
    (scored,) = Scorer(model).score([(prompt[0, :1].tolist(), prompt[0, 1:].tolist())])
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected, rtol=5e-2, atol=5e-2)


def test_saving_writes_the_same_bytes(tmp_path):
    (tmp_path / "in").mkdir()
    write_folder(tmp_path / "in", 0, 255)
    GPT.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == METHOD["quantization_config"]
    GPT.from_pretrained(tmp_path / "in", dequantize=True).save_pretrained(tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats/config.json").read_text())
    assert not mxfp4_weights(GPT.from_pretrained(tmp_path / "floats"))


def test_scales_stay_as_they_are_when_a_model_is_cast(folder):
    model = GPT.from_pretrained(folder)
    before = mxfp4_weights(model)
    after = mxfp4_weights(model.bfloat16())
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
BAD = {
    "no scales": (f"{GATE_UP}_scales", lambda t: None, "gate_up_proj_scales is nothing, expected uint8 of shape"),
    "another size": (f"{GATE_UP}_blocks", lambda t: t[:, :-2], r"blocks is torch.uint8 of shape \(5, 190, 2"),
    "floats": (f"{GATE_UP}_blocks", lambda t: t.float(), "gate_up_proj_blocks is torch.float32"),
    "NaN": (f"{GATE_UP}_scales", lambda t: t.clone().fill_(255), "gate_up_proj_scales has 255, which is NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_named_in_the_error(folder, case, tmp_path):
    name, change, message = BAD[case]
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed.contiguous()}), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value) and "\n" not in str(error.value)


def test_quantizing_again_is_refused(folder, tmp_path, capsys):
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--bits", "8"]) == 2
    assert "mxfp4" in capsys.readouterr().err
