"""GPTQ and AWQ checkpoints: weights to the last bit, logits, every path, folders saved again, and bad files.

Mutations that these tests detect: the zero point of "gptq" not shifted; AWQ's columns not reordered; nibbles swapped;
an order applied to the wrong side; the zero points of one part used for all; the groups of 128 inputs of one scale for
a whole row cut at the wrong place; g_idx not checked; the bias of another layer.
"""

import json
import warnings

import numpy as np
import pytest
import torch
from packed_checkpoints import IDS, pack_layer, write_checkpoint
from safetensors.torch import load_file, save_file

from peakgpt.cli import main
from peakgpt.engine.checkpoint.quantized.packed_layers import packed_format, unpack
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.model.grouped_linear import GroupedExpertLinear, GroupedLinear
from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.ops.quantize import dequantize_grouped, unpack_grouped

pytest.importorskip("transformers", reason="transformers is not installed")

PACKINGS = {
    "gptq": {},
    "gptq v2": {"layout": "gptq_v2"},
    "gptq, symmetric": {"sym": True},
    "gptq, act-order": {"act_order": True},
    "gptq, 8 bits": {"bits": 8},
    "gptq, 8 bits, symmetric": {"bits": 8, "sym": True},
    "gptq, 8 bits, symmetric, act-order": {"bits": 8, "sym": True, "act_order": True},
    "gptq, rows": {"group": -1},
    "gptq, groups of 24": {"group": 24},
    "gptq, more than an input has": {"group": 128},
    "awq": {"method": "awq"},
    "awq, rows": {"method": "awq", "group": -1},
}
FAMILIES = [("mistral", "gptq"), ("qwen2", "awq"), ("qwen3", "gptq, act-order"), ("phi3", "awq"), ("gpt2", "gptq"),
            ("gpt2", "gptq, act-order"), ("gpt_neox", "gptq"), ("mixtral", "awq"), ("mixtral", "gptq, symmetric"),
            ("mixtral", "gptq, 8 bits, symmetric"), ("mixtral", "gptq, 8 bits, symmetric, act-order")]  # fmt: skip
SYMMETRIC = ("gptq, symmetric", "gptq, 8 bits, symmetric")
CASES = [("llama", packing) for packing in PACKINGS] + FAMILIES


def stored_weight(layer):
    """The weight (F, C) that a GroupedLinear multiplies by, with columns in the order of the inputs; or (E, F, C)."""
    if isinstance(layer, GroupedExpertLinear):
        parts = [(q, scale, None) for q, scale in zip(*layer.unpacked().values(), strict=True)]
        return torch.stack([dequantize_grouped(*p, layer.in_features, layer.form.group) for p in parts])
    parts = unpack_grouped(layer.weight, layer.scale, layer.offset, layer.out_features, layer.in_features,
                           layer.form.bits)  # fmt: skip
    weight = dequantize_grouped(*parts, layer.in_features, layer.form.group, layer.form.levels, layer.form.zero_points)
    if layer.order is None:
        return weight
    restored = torch.empty_like(weight)
    restored[:, layer.order.long()] = weight
    return restored


def grouped(model):
    kinds = GroupedLinear | GroupedExpertLinear
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.filterwarnings("ignore:.*quantized matrices, such as .*experts")
@pytest.mark.parametrize(("family", "packing"), CASES, ids=" ".join)
def test_weights_are_read_without_loss_and_logits_are_those_of_transformers(family, packing, tmp_path):
    theirs = write_checkpoint(tmp_path, family, **PACKINGS[packing])
    exact, ours = GPT.from_pretrained(tmp_path, dequantize=True), GPT.from_pretrained(tmp_path)
    layers = grouped(ours)
    multiplied = 5 if packing in SYMMETRIC else 2  # experts with zero points or act-order are decoded
    assert len(layers) == 2 * (multiplied if family == "mixtral" else 5 if exact.config.gated_mlp else 4)
    for name, layer in layers.items():
        assert torch.equal(stored_weight(layer), exact.get_submodule(name).weight), name
        assert (getattr(layer, "offset", None) is None) == PACKINGS[packing].get("sym", False)
    with torch.no_grad():
        expected = theirs(IDS).logits
        torch.testing.assert_close(exact(IDS), expected, rtol=1e-5, atol=1e-5)
        with use_backend("eager"):
            rounded = ours(IDS)
        assert (rounded - expected).norm() < 0.1 * expected.norm()  # inputs are rounded to 8 bits
        assert (ours(IDS) - rounded).norm() < 0.03 * rounded.norm()  # other last bits may round to another integer


@pytest.mark.parametrize("group", (-1, 256, 136))
@pytest.mark.parametrize("method", ("gptq", "awq"))
def test_groups_of_more_than_128_inputs_are_cut_without_loss(method, group):
    inputs = np.arange(400) // (400 if group == -1 else group)
    orders = (None,) if method == "awq" else (None, np.random.default_rng(1).permutation(inputs))
    for order in orders:
        tensors, expected = pack_layer(np.random.default_rng(0), "a", 16, 400, method=method, group=group,
                                       groups_of=order)  # fmt: skip
        form = packed_format({"quant_method": method, "bits": 4, "group_size": group})
        layer = unpack({name.removeprefix("a."): tensor for name, tensor in tensors.items()}, form, 400, 16)
        assert torch.equal(layer.weight(form).double(), expected)
        assert layer.scale.shape == (16, -(-400 // form.block())) and form.block() == (8 if group == 136 else 128)


@pytest.mark.parametrize(("family", "packing"), [("llama", "gptq, act-order"), ("gpt2", "gptq"), ("qwen2", "awq"),
                                                   ("mixtral", "gptq, symmetric")])  # fmt: skip
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_engine_score_and_generate_compute_the_same(family, packing, dtype, tmp_path):
    write_checkpoint(tmp_path, family, **PACKINGS[packing])
    model, ids = GPT.from_pretrained(tmp_path, dtype=dtype), IDS[0].tolist()
    engine = Engine(model)
    assert not engine.executor_note  # it runs in the C++ program
    first = next(engine.stream(ids, SamplingParams(max_tokens=1, temperature=0.0)))
    with torch.no_grad():
        logits = model(IDS)[0].float()
    assert list(first.token_ids) == logits[-1:].argmax(-1).tolist()
    expected = logits.log_softmax(-1)[:-1].gather(1, IDS[0, 1:, None])[:, 0]
    scored = Scorer(model).score([(ids[:1], ids[1:])])[0]
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    assert scored.total == pytest.approx(expected.sum().item(), abs=tolerance)
    assert model.generate(IDS, max_new_tokens=4).shape == (1, IDS.shape[1] + 4)


@pytest.mark.parametrize("case", ["llama: gptq, act-order", "llama: gptq, symmetric", "llama: awq",
                                  "mixtral: gptq, 8 bits, symmetric"])  # fmt: skip
def test_a_saved_model_reads_back_with_the_same_bits(case, tmp_path):
    family, packing = case.split(": ")
    write_checkpoint(tmp_path / "source", family, **PACKINGS[packing])
    model = GPT.from_pretrained(tmp_path / "source")
    model.save_pretrained(tmp_path / "copy")
    again = GPT.from_pretrained(tmp_path / "copy")
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    with torch.no_grad():
        assert torch.equal(model(IDS), again(IDS))
    GPT.from_pretrained(tmp_path / "source", dequantize=True).save_pretrained(tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    floats, exact = GPT.from_pretrained(tmp_path / "floats"), GPT.from_pretrained(tmp_path / "source", dequantize=True)
    assert torch.equal(floats(IDS), exact(IDS))
    with pytest.raises(ValueError, match="save_pretrained: got weights or max_shard_size, expected none"):
        model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")


def test_quantize_converts_to_our_levels_and_prints_the_error(tmp_path, capsys):
    write_checkpoint(tmp_path / "in")
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "out"), "--bits", "4"]) == 0
    error = float(capsys.readouterr().out.split("relative error ")[1].split("%")[0])
    exact, ours = GPT.from_pretrained(tmp_path / "in", dequantize=True), GPT.from_pretrained(tmp_path / "out")
    assert 1 < error < 15 and not grouped(ours)
    with torch.no_grad():
        assert (ours(IDS) - exact(IDS)).norm() < 0.5 * exact(IDS).norm()
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "twice"), "--bits", "8"]) == 2
    assert "IN has quantized weights of peakgpt already, expected floats, GPTQ or AWQ" in capsys.readouterr().err


def test_layers_that_stay_floats_are_read_as_floats(tmp_path):
    theirs = write_checkpoint(tmp_path, skip=("down_proj", "k_proj"), changes={"dynamic": {"-:.*down_proj": {}}})
    with pytest.warns(UserWarning, match=r"4 quantized matrices, such as model\.layers\.0\.self_attn\.q_proj\.weight"):
        model = GPT.from_pretrained(tmp_path)
    assert sorted(grouped(model)) == [f"transformer.h.{i}.{name}" for i in (0, 1)
                                      for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_gate")]  # fmt: skip
    with torch.no_grad():
        assert (model(IDS) - theirs(IDS).logits).norm() < 0.03 * theirs(IDS).logits.norm()


def test_biases_of_zeros_that_old_releases_wrote_are_ignored_and_others_are_not(tmp_path):
    write_checkpoint(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.bias"
    tensors = load_file(file)
    save_file({**tensors, name: torch.zeros(96, dtype=torch.float16)}, file)
    assert GPT.from_pretrained(tmp_path)
    save_file({**tensors, name: torch.ones(96, dtype=torch.float16)}, file)
    with pytest.raises(ValueError, match=rf"got tensor {name}, expected only the"):
        GPT.from_pretrained(tmp_path)


def test_parts_of_one_matrix_with_another_order_are_refused(tmp_path):
    theirs = write_checkpoint(tmp_path, act_order=True, shared_order=False)
    with pytest.raises(ValueError, match=r"another act-order \(g_idx\) for model\.layers\.0\.self_attn\.k_proj than"):
        GPT.from_pretrained(tmp_path)
    with torch.no_grad():
        got = GPT.from_pretrained(tmp_path, dequantize=True)(IDS)
        torch.testing.assert_close(got, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


BAD_CONFIGS = [
    ({"bits": 3}, "got gptq weights of 3 bits, expected 4 or 8"),
    ({"bits": None}, "got gptq weights of None bits, expected 4 or 8"),
    ({"bits": 4.0}, "got gptq weights of 4.0 bits, expected 4 or 8"),
    ({"bits": True}, "got gptq weights of True bits, expected 4 or 8"),
    ({"group_size": True}, "with group_size True, expected -1 or a multiple of 8"),
    ({"group_size": 20}, "with group_size 20, expected -1 or a multiple of 8"),
    ({"group_size": "128"}, "with group_size '128', expected -1 or a multiple of 8"),
    ({"checkpoint_format": "marlin"}, "gptq weights in the 'marlin' layout, expected gptq or gptq_v2"),
    ({"is_marlin_format": True}, "gptq weights in the 'marlin' layout, expected gptq or gptq_v2"),
    ({"format": "bitblas"}, "gptq weights in the 'bitblas' layout"),
    ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "got other bits or groups for the layers"),
    ({"dynamic": 5}, "got dynamic 5, expected an object"),
    ({"quant_method": "awq", "version": "GEMV"}, "awq weights in the 'gemv' layout, expected gemm"),
    ({"quant_method": "awq", "version": "exllama"}, "awq weights in the 'exllama' layout, expected gemm"),
    ({"quant_method": "awq", "bits": 8}, "got awq weights of 8 bits, expected 4"),
    ({"quant_method": "awq", "zero_point": False}, "got awq weights without zero points"),
    ({"quant_method": "awq", "zero_point": 0}, "got awq weights with zero_point 0, expected true or false"),
    ({"quant_method": "awq", "zero_point": "no"}, "got awq weights with zero_point 'no', expected true or false"),
    ({"sym": "false"}, "got gptq weights with sym 'false', expected true or false"),
    ({"desc_act": 1}, "got gptq weights with desc_act 1, expected true or false"),
    ({"is_marlin_format": "yes"}, "got gptq weights with is_marlin_format 'yes', expected true or false"),
    ({"format": 0}, "gptq weights in the '0' layout, expected gptq or gptq_v2"),
    ({"dynamic": False}, "got dynamic False, expected an object"),
    ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes', expected 'peakgpt' of `peakgpt quantize`, 'gptq"),
    ({"quant_method": "fp8"}, "quant_method 'fp8', expected 'peakgpt'"),
    ({"quant_method": "peakgpt", "layers": {"lm_head": {"bits": 4, "group": 50}}}, "expected 8 or 4 bits, a group"),
    ({"quant_method": "peakgpt", "layers": {"lm_head": {"bits": 8, "group": 8.0}}}, "expected 8 or 4 bits, a group"),
    ({"quant_method": "peakgpt", "layers": {"lm_head": {"size": 4}}}, "unexpected keyword argument 'size'"),
    ({"quant_method": "peakgpt", "layers": {"a.wpe": {"bits": 4, "group": 48}}}, "got the quantized layer a.wpe"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=[str(row[0])[:40] for row in BAD_CONFIGS])
def test_unknown_quantizations_are_named_in_the_error(changes, message, tmp_path):
    write_checkpoint(tmp_path, changes=changes)
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(tmp_path)
    assert "config.json: " in str(caught.value) or "quantized" in str(caught.value)


LAYER = "model.layers.1.mlp.down_proj"
BAD_TENSORS = [
    ("qzeros", None, rf"{LAYER}: got no qzeros, expected qzeros of torch.int32 and shape \(3, 8\)"),
    ("qweight", None, rf"{LAYER}: got no qweight"),
    ("scales", None, rf"{LAYER}: got no scales"),
    ("qweight", lambda t: t[:-1], rf"{LAYER}: got qweight of torch.int32 and shape \(11, 64\), expected .* \(12, 64\)"),
    ("qzeros", lambda t: t.long(), "got qzeros of torch.int64"),
    ("scales", lambda t: t.int(), "got scales of torch.int32"),
    ("scales", lambda t: t.float() * 1e-9, "got scales of torch.float32 that float16 does not hold"),
    ("scales", lambda t: t * float("nan"), "got scales with infinities or NaN"),
    ("scales", lambda t: t.bfloat16() * 2.0**30, "got scales of torch.bfloat16 that float16 does not hold"),
    ("g_idx", lambda t: t.clamp(max=1), "got 0 inputs of group 2 in g_idx, expected 32"),
    ("g_idx", lambda t: t + 1, "got groups 1 to 3 in g_idx, expected 0 to 2"),
    ("g_idx", lambda t: t - 1, "got groups -1 to 1 in g_idx, expected 0 to 2"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BAD_TENSORS, ids=[row[2][:50] for row in BAD_TENSORS])
def test_damaged_layers_are_named_in_the_error(kind, change, message, tmp_path):
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop(f"{LAYER}.{kind}")
    if change:
        tensors[f"{LAYER}.{kind}"] = change(tensor).contiguous()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("error")
        GPT.from_pretrained(tmp_path)


def test_act_order_without_the_group_of_each_input_is_refused(tmp_path):
    write_checkpoint(tmp_path, act_order=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(f"{LAYER}.g_idx")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"{LAYER}: got no g_idx, expected g_idx of torch.int32 and shape \(96,\)"):
        GPT.from_pretrained(tmp_path)


def test_a_quantized_layer_that_the_model_lacks_is_named_in_the_error(tmp_path):
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.1.mlp.more.qweight": tensors[f"{LAYER}.qweight"].clone()}, file)
    with pytest.raises(ValueError, match=r"got the quantized layer model\.layers\.1\.mlp\.more"):
        GPT.from_pretrained(tmp_path)
