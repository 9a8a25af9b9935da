"""Models in .gguf files: values as gguf decodes them, and models that transformers and llama.cpp compute equally."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from gguf_files import CONFIGS, SMALL, build, export

from peakgpt.cli import main
from peakgpt.engine.checkpoint.families.catalogue import FAMILIES
from peakgpt.engine.checkpoint.gguf import export as gguf_export
from peakgpt.engine.checkpoint.gguf.architectures import ARCHITECTURES
from peakgpt.engine.checkpoint.gguf.blocks import FORMATS, read_tensor
from peakgpt.engine.checkpoint.quantized.folder import write_quantized
from peakgpt.engine.checkpoint.quantized.weights import quantize_state
from peakgpt.engine.data.gguf_header import TYPES, GGUFHeader, TensorEntry, read_header
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.grouped_linear import GroupedExpertLinear, GroupedLinear
from peakgpt.engine.model.quantized_linear import Format
from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.ops.quantize import dequantize_grouped, unpack_grouped

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
PROMPT = [5, 300, 17, 42, 9, 260, 33]
TRANSFORMERS = ("gpt2", "bloom", "falcon", "starcoder2", "llama", "qwen2")  # architectures that it can read


@pytest.mark.parametrize("number", TYPES)
def test_every_type_decodes_to_the_values_of_gguf(number):
    """On random bytes, so with every scale, also infinities and NaN."""
    kind, rows, blocks = TYPES[number], 3, 5
    rng = np.random.default_rng(number)
    data = rng.integers(0, 256, (rows, blocks * kind.size * (8 if kind.elements == 1 else 1)), np.uint8)
    shape = (rows, data.shape[1] // kind.size * kind.elements)
    header = GGUFHeader(None, {}, {}, memoryview(bytearray(data.tobytes())))
    got = read_tensor(header, TensorEntry(shape, kind, 0, data.nbytes), torch.float32).numpy()
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(number))
    assert kind.name == gguf.GGMLQuantizationType(number).name
    assert np.array_equal(got, expected.reshape(shape), equal_nan=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exported_model_reads_back_unchanged(name, tmp_path):
    model, path = build(name), tmp_path / "model.gguf"
    assert export(model, path) == name.partition(",")[0]
    copy = GPT.from_pretrained(path)
    assert copy.config == model.config
    expected = model.state_dict()
    assert copy.state_dict().keys() == expected.keys()
    for key, tensor in copy.state_dict().items():
        is_shifted = model.config.norm_offset and tensor.dim() == 1  # the file has 1 + w, rounded to float32
        assert (tensor - expected[key]).abs().max() <= (1.2e-7 if is_shifted else 0), key
    assert GPT.from_pretrained(path, dtype=torch.bfloat16).transformer.wte.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_of_transformers_for_an_exported_model(name, tmp_path):
    """Its reader knows names and layouts of llama.cpp by itself."""
    transformers = pytest.importorskip("transformers")
    model = build(name, block_size=1024)  # its GPT-2 has this context, whatever the file says
    export(model, tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=2e-4)


def greedy(path, count):
    """Return logits of a prompt and greedy tokens of llama.cpp, computed with a float32 cache."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    llama = llama_cpp.Llama(str(path), n_ctx=64, type_k=0, type_v=0, n_threads=1, logits_all=True, verbose=False)
    llama.eval(PROMPT)
    logits = torch.tensor(llama.scores[: len(PROMPT)].copy())
    tokens = []
    for _ in range(count):
        tokens.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(tokens[-1:])
    llama.close()
    return logits, tokens


DTYPES = [(name, "f32") for name in CONFIGS] + [(name, "q8_0") for name in CONFIGS]
DTYPES += [(name, dtype) for name in ("gpt2", "llama") for dtype in ("f16", "bf16", "q4_0")]


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_llama_cpp_gives_the_same_greedy_tokens(name, dtype, tmp_path):
    """As our reading of the same file; llama.cpp rounds inputs of its products, and GELU to 16 bits.

    With quantized weights both round inputs to 8 bits, and the error of one is about that of the other.
    """
    path = tmp_path / "model.gguf"
    export(build(name), path, dtype)
    model = GPT.from_pretrained(path, dequantize=True)
    logits, tokens = greedy(path, 12)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT]))[0]
        ours = GPT.from_pretrained(path)(torch.tensor([PROMPT]))[0]
    error, own = ((one - expected).norm() / expected.norm() for one in (logits, ours))
    assert error < {"f32": 2e-3, "f16": 2e-3, "bf16": 2e-2}.get(dtype, 2 * own)
    if dtype in ("f32", "f16"):
        ours = model.generate(torch.tensor([PROMPT]), max_new_tokens=12)
        assert tokens == ours[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_phi3_packs_the_gate(dtype, tmp_path, monkeypatch):
    """The llama row, which has the same mathematics, is not asked."""
    monkeypatch.setattr(gguf_export, "ROWS", (ARCHITECTURES["phi3"],))
    model, path = build("llama", rotary_base=1e4), tmp_path / "m.gguf"
    assert export(model, path, dtype) == "phi3"
    assert {"blk.0.attn_qkv.weight", "blk.1.ffn_up.weight"} < read_header(path).tensors.keys()
    assert "blk.0.ffn_gate.weight" not in read_header(path).tensors
    copy = GPT.from_pretrained(path, dequantize=True)
    assert copy.config == model.config
    if dtype == "f32":
        assert all(torch.equal(tensor, copy.state_dict()[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        expected, ours = (one(torch.tensor([PROMPT]))[0] for one in (copy, GPT.from_pretrained(path)))
    logits, _ = greedy(path, 1)
    assert (logits - expected).norm() < (2e-3 * expected.norm() if dtype == "f32" else 2 * (ours - expected).norm())


SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4,
         "intermediate_size": 96, "max_position_embeddings": 64, "vocab_size": 384}  # fmt: skip
OLD_SIZES = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 384}
FAMILIES_OF_GGUF = [
    ("GPT2Config", OLD_SIZES, "gpt2"),
    ("GPTBigCodeConfig", OLD_SIZES, "starcoder"),
    ("GPTNeoXConfig", SIZES, "gptneox"),
    ("BloomConfig", {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 384}, "bloom"),
    ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 384}, "mpt"),
    ("FalconConfig", {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}, "falcon"),
    ("FalconConfig", {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "num_kv_heads": 2,
                      "new_decoder_architecture": True}, "falcon"),
    ("PhiConfig", SIZES, "phi2"),
    ("Phi3Config", {**SIZES, "pad_token_id": 0, "max_position_embeddings": 128, "original_max_position_embeddings": 64,
                    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.05] * 8, "long_factor": [2.1] * 8}},
     "phi3"),
    ("StableLmConfig", SIZES, "stablelm"),
    ("Olmo2Config", SIZES, "olmo2"),
    ("Olmo3Config", {**SIZES, "sliding_window": 8, "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8,
        "attention_factor": 1.2079441541679836}},
     "olmo2"),
    ("Starcoder2Config", {**SIZES, "sliding_window": None}, "starcoder2"),
    ("LlamaConfig", SIZES, "llama"),
    ("MistralConfig", {**SIZES, "sliding_window": None}, "llama"),
    ("Qwen2Config", SIZES, "qwen2"),
    ("SmolLM3Config", {**SIZES, "pad_token_id": None}, "smollm3"),
    ("OlmoConfig", SIZES, "olmo"),
    ("GptOssConfig", {**SIZES, "head_dim": 16}, "gpt-oss"),
]  # fmt: skip


@pytest.mark.parametrize("name, fields, expected", FAMILIES_OF_GGUF, ids=[row[0] for row in FAMILIES_OF_GGUF])
def test_the_configs_of_transformers_have_their_architecture(name, fields, expected):
    transformers = pytest.importorskip("transformers")
    content = getattr(transformers, name)(**fields).to_dict()
    config = FAMILIES[content["model_type"]].config(content)
    assert gguf_export.choose_architecture(config)[0].name == expected


def test_quantized_matrices_are_rounded_and_the_rest_is_not(tmp_path):
    model, path = build("gpt2"), tmp_path / "model.gguf"
    export(model, path, "q8_0")
    kinds = {name: entry.type.name for name, entry in read_header(path).tensors.items()}
    assert {kinds["token_embd.weight"], kinds["blk.1.ffn_down.weight"]} == {"Q8_0"}
    assert {kinds["position_embd.weight"], kinds["blk.0.attn_qkv.bias"], kinds["output_norm.weight"]} == {"F32"}
    copy = GPT.from_pretrained(path)
    got, expected = copy.transformer.wte.weight, model.transformer.wte.weight
    assert 0 < (got - expected).norm() / expected.norm() < 0.01
    assert sum(isinstance(module, GroupedLinear) for module in copy.modules()) == 4 * 2 + 1


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path):
    model, path = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=24, block_size=8, vocab_size=16)), tmp_path / "m.gguf"
    export(model, path, "q4_0", kind=None)
    kinds = {name: entry.type.name for name, entry in read_header(path).tensors.items()}
    assert kinds["token_embd.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q4_0"


def test_a_model_without_biases_gets_zeros_where_llama_cpp_needs_them(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=384, bias=False)).eval()
    assert export(model, tmp_path / "m.gguf", kind=None) == "gpt2"
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        assert torch.equal(GPT.from_pretrained(tmp_path / "m.gguf").eval()(ids), model(ids))


def test_another_gelu_is_no_difference_and_another_activation_is(tmp_path):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=384, activation="gelu_erf")
    assert export(GPT(config), tmp_path / "m.gguf", kind=None) == "gpt2"
    with pytest.raises(ValueError, match="the nearest, gpt2, lacks this activation"):
        export(GPT(dataclasses.replace(config, activation="relu")), tmp_path / "n.gguf", kind=None)


def test_a_model_that_llama_cpp_lacks_is_refused(tmp_path):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=384, windows=(None, 4))
    with pytest.raises(ValueError, match=r"no architecture of llama\.cpp expresses.*lacks this windows"):
        export(GPT(config), tmp_path / "m.gguf", kind=None)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ValueError, match=r"m\.gguf exists, expected a new file"):
        export(build("gpt2"), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_numbers_above_float16_are_refused(tmp_path):
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[3, 4] = 1e6
    with pytest.raises(ValueError, match=r"got numbers in token_embd\.weight that are not finite as F16"):
        export(model, tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())


def test_a_saved_copy_is_a_folder_of_the_family(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build("gpt2")
    export(model, tmp_path / "m.gguf")
    GPT.from_pretrained(tmp_path / "m.gguf").save_pretrained(tmp_path / "folder")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert (theirs.config.model_type, theirs.config.eos_token_id) == ("gpt2", 2)
    with torch.no_grad():
        assert torch.allclose(theirs(torch.tensor([PROMPT])).logits, model(torch.tensor([PROMPT])), atol=1e-4)


# ---- products with the integers of a file


def write_random(path, kinds, config, name="llama", of_experts=False):
    """Write a model whose matrices, or those of experts, are random blocks of these types, with scales of one size."""
    source = build(name, **config)
    export(source, path.with_suffix(".f32.gguf"), kind=None)
    header = read_header(path.with_suffix(".f32.gguf"))
    writer, rng, axes = gguf.GGUFWriter(path, name), np.random.default_rng(0), 3 if of_experts else 2
    for key, value in header.metadata.items():
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
        if key != "general.architecture":
            getattr(writer, f"add_{kind}")(key, value)
    matrices = 0
    for name, entry in header.tensors.items():
        values = read_tensor(header, entry, torch.float32).numpy()
        kind = kinds[matrices % len(kinds)] if values.ndim == axes else "F32"
        matrices += values.ndim == axes
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, random_blocks(rng, kind, values) if kind != "F32" else values, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(rng, kind, values):
    """Quantize by gguf where it can; else random integers with float16 scales like those of the values."""
    number = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[number]
    try:
        return gguf.quants.quantize(values, number)
    except NotImplementedError:
        blocks = rng.integers(0, 256, (values.shape[0], values.shape[1] // elements, size), np.uint8)
        scales = rng.uniform(1e-4, 3e-4, (*blocks.shape[:2], 2)).astype(np.float16).view(np.uint8)
        blocks[..., slice(208, 210) if kind == "Q6_K" else slice(0, 4)] = scales[..., : 2 if kind == "Q6_K" else 4]
        return blocks.reshape(values.shape[0], -1)


WIDE = {"n_embd": 256, "head_dim": 64, "n_inner": 256}
KINDS = [[kind] for kind in FORMATS] + [["Q4_K", "Q6_K"], ["Q5_0", "Q4_1", "Q8_0"], ["Q8_0", "F32"]]


@pytest.mark.filterwarnings("ignore:.*scales are rounded to float16")
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_products_with_the_integers_equal_those_with_decoded_weights(kinds, tmp_path):
    """Weights are equal up to float16 scales; logits differ by the rounding of the layers' inputs to 8 bits."""
    path = tmp_path / "m.gguf"
    write_random(path, kinds, WIDE)
    exact, ours, ids = GPT.from_pretrained(path, dequantize=True), GPT.from_pretrained(path), torch.tensor([PROMPT])
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, GroupedLinear)}
    assert len(layers) == 11 if kinds != ["Q8_0", "F32"] else 0 < len(layers) < 11
    for name, layer in layers.items():
        expected = exact.get_submodule(name).weight
        stored = unpack_grouped(layer.weight, layer.scale, layer.offset, *expected.shape, layer.form.bits)
        error = dequantize_grouped(*stored, expected.shape[1], layer.form.group, layer.form.levels) - expected
        assert error.norm() <= (1e-3 if kinds[0].endswith("_K") else 0) * expected.norm()
    with torch.no_grad(), use_backend("eager"):
        expected, close = ours(ids), exact(ids)
        assert (expected - close).norm() < 0.1 * close.norm()
    with torch.no_grad(), use_backend("cpu"):  # other last bits of an input may round to another integer
        assert (ours(ids) - expected).norm() < 0.03 * expected.norm()
    engine = Engine(ours)
    assert not engine.executor_note  # it runs in the C++ program
    first = next(engine.stream(PROMPT, SamplingParams(max_tokens=1, temperature=0.0)))
    assert list(first.token_ids) == ours(ids)[0, -1:].argmax(-1).tolist()


@pytest.mark.parametrize(("kind", "count"), [("MXFP4", 6), ("Q8_0", 6), ("Q4_1", 0)])
def test_products_with_experts_read_their_integers(kind, count, tmp_path):
    """Types with offsets are decoded. llama.cpp multiplies by the same weights, and rounds inputs too."""
    path = tmp_path / "m.gguf"
    write_random(path, [kind], {}, "gpt-oss", of_experts=True)
    exact, ours, ids = GPT.from_pretrained(path, dequantize=True), GPT.from_pretrained(path), torch.tensor([PROMPT])
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, GroupedExpertLinear)}
    assert len(layers) == count
    for name, layer in layers.items():
        form, expected = layer.form, exact.get_submodule(name).weight
        for w, scale, weight in zip(layer.weight, layer.scale, expected, strict=True):
            stored = unpack_grouped(w, scale, None, *weight.shape, form.bits)
            assert torch.equal(dequantize_grouped(*stored, weight.shape[1], form.group, form.levels), weight)
    with torch.no_grad():
        expected = exact(ids)[0]
        own = (ours(ids)[0] - expected).norm()
        assert own < 0.03 * expected.norm() if count else own == 0
    assert not count or (greedy(path, 1)[0] - expected).norm() < 2 * own
    assert not Engine(ours).executor_note
    ours.save_pretrained(tmp_path / "saved")
    again = GPT.from_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/quantised.safetensors").exists() == (kind == "Q8_0")  # others are folders of transformers
    assert again.config == ours.config
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in ours.state_dict().items())


def test_exact_scales_are_silent_and_rounded_ones_are_shown(tmp_path):
    write_random(tmp_path / "exact.gguf", ["Q8_0", "Q4_0", "Q5_1", "MXFP4"], WIDE)
    write_random(tmp_path / "rounded.gguf", ["Q4_K"], WIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPT.from_pretrained(tmp_path / "exact.gguf")
    with pytest.warns(UserWarning, match=r"to float16, relative error of the weights 0\.000\d+, 5\.00 bits"):
        GPT.from_pretrained(tmp_path / "rounded.gguf")


def test_a_quantized_folder_is_not_dequantized(tmp_path):
    build("gpt2").save_pretrained(tmp_path / "float")
    state = quantize_state(build("gpt2").state_dict(), Format(8))
    write_quantized(tmp_path / "float", tmp_path / "q8", state, Format(8))
    with pytest.raises(ValueError, match="got quantized weights of peakgpt, expected others with dequantize=True"):
        GPT.from_pretrained(tmp_path / "q8", dequantize=True)


# ---- metadata that contradicts itself, or that we do not support


def changed(tmp_path, name="llama", **metadata):
    """Return a header of an exported model with other metadata; None removes a key."""
    export(build(name), tmp_path / "m.gguf", kind=None)
    header = read_header(tmp_path / "m.gguf")
    values = {**header.metadata, **{key.replace("__", "."): value for key, value in metadata.items()}}
    return dataclasses.replace(header, metadata={key: value for key, value in values.items() if value is not None})


@pytest.mark.parametrize("metadata, message", [
    ({"llama__block_count": 1 << 31}, "got tensors of 2 layers, expected 2147483648 as block_count"),
    ({"llama__block_count": None}, "got no llama.block_count, expected one"),
    ({"llama__attention__head_count": "x"}, "llama.attention.head_count is 'x', expected int"),
    ({"llama__attention__head_count": 3}, "n_kv_head is 2, expected a divisor of n_head 3; .* is llama.attention"),
    ({"llama__attention__key_length": 8, "llama__attention__value_length": 16}, "expected the same"),
    ({"llama__attention__causal": False}, "llama.attention.causal is 'False', expected True"),
    ({"llama__expert_count": 8}, "llama.expert_count is '8', expected 0"),
    ({"llama__attention__sliding_window": 8}, "got llama.attention.sliding_window '8', expected none: peakgpt"),
    ({"llama__rope__scaling__type": "longrope"}, "scaling.type is 'longrope', expected none, linear or yarn"),
])  # fmt: skip
def test_metadata_that_is_not_supported_is_named(metadata, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ARCHITECTURES["llama"].config(changed(tmp_path, **metadata))


@pytest.mark.parametrize("name, layers", [("gemma2", 46), ("gemma3", 62)])
def test_gemma_27b_has_a_scale_of_its_own(name, layers):
    """Of query_pre_attn_scalar, hidden_size / num_attention_heads: 144 and 168; the others have that of their heads."""
    base = {**SMALL, **CONFIGS[name], "head_dim": 32}
    large = GPTConfig(**{**base, "n_layer": layers, "attention_scale": 16**-0.5})
    assert gguf_export.choose_architecture(large)[0].name == name
    assert gguf_export.choose_architecture(GPTConfig(**base, attention_scale=32**-0.5))[0].name == name
    with pytest.raises(ValueError, match="lacks this attention_scale"):
        gguf_export.choose_architecture(GPTConfig(**base, attention_scale=16**-0.5))


def test_an_unknown_architecture_is_named(tmp_path):
    export(build("llama"), tmp_path / "m.gguf", kind=None)
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"llama", b"mamba", 1))
    with pytest.raises(ValueError, match=r"m\.gguf: general\.architecture is 'mamba', expected one of gpt2"):
        GPT.from_pretrained(tmp_path / "m.gguf")


def split(path, count, folder, **changes):
    """Write a file as `count` files, as `llama-gguf-split` does; the metadata is in the first."""
    reader = gguf.GGUFReader(path)
    names = [folder / f"m-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "llama")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(key, field.contents(), *field.types[:2])
        numbers = {"no": number, "count": count, "tensors.count": len(reader.tensors)}
        for key, value in {**numbers, **changes.get(f"file{number}", {})}.items():
            (writer.add_int32 if key == "tensors.count" else writer.add_uint16)(f"split.{key}", value)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data.copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names


def test_a_model_in_several_files_is_that_of_one_file(tmp_path):
    model = build("llama")
    export(model, tmp_path / "m.gguf")
    first, second, _ = split(tmp_path / "m.gguf", 3, tmp_path)
    copy = GPT.from_pretrained(first)
    assert copy.config == model.config
    assert all(torch.equal(tensor, copy.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert greedy(first, 1)[1] == greedy(tmp_path / "m.gguf", 1)[1]
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf: got file 2 of 3, expected the first one"):
        GPT.from_pretrained(second)
    second.rename(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf: "):
        GPT.from_pretrained(first)
    first.rename(tmp_path / "first.gguf")
    with pytest.raises(ValueError, match=r"first\.gguf: got file 1 of 3, expected the first one under its name"):
        GPT.from_pretrained(tmp_path / "first.gguf")


@pytest.mark.parametrize(("changes", "message"), [
    ({"file1": {"no": 2}}, r"m-00002-of-00002\.gguf: got split\.no 2 and split\.count 2, expected file 2 of 2"),
    ({"file1": {"count": 3}}, r"got split\.no 1 and split\.count 3, expected file 2 of 2"),
    ({"file0": {"tensors.count": 99}}, r"m-00001-of-00002\.gguf: got \d+ tensors in 2 files, expected 99"),
])  # fmt: skip
def test_files_that_do_not_belong_together_are_named(changes, message, tmp_path):
    export(build("llama"), tmp_path / "m.gguf", kind=None)
    first, _ = split(tmp_path / "m.gguf", 2, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(first)


def test_a_tensor_in_two_files_is_named(tmp_path):
    export(build("llama"), tmp_path / "m.gguf", kind=None)
    first, second = split(tmp_path / "m.gguf", 2, tmp_path)
    data, name = second.read_bytes(), next(iter(read_header(second).tensors))
    same = next(other for other in read_header(first).tensors if len(other) == len(name))
    second.write_bytes(data.replace(name.encode(), same.encode(), 1))
    with pytest.raises(ValueError, match=rf"m-00002-of-00002\.gguf: got tensor '{same}', expected file 2 of 2, with o"):
        GPT.from_pretrained(first)


def test_frequencies_of_other_parameters_are_refused(tmp_path):
    export(build("llama, llama3"), tmp_path / "m.gguf", kind=None)
    header = read_header(tmp_path / "m.gguf")
    entry = header.tensors["rope_freqs.weight"]
    factors = torch.frombuffer(header.data, dtype=torch.float32, count=8, offset=entry.start)
    factors[3] = 5.0  # of the mapped copy
    with pytest.raises(ValueError, match=r"got rope_freqs\.weight of other parameters than those of Llama"):
        ARCHITECTURES["llama"].config(header)
    factors.fill_(1.0)
    assert ARCHITECTURES["llama"].config(header).rope_scaling is None


def test_quantize_asks_for_a_folder(tmp_path, capsys):
    export(build("gpt2"), tmp_path / "m.gguf")
    assert main(["quantize", str(tmp_path / "m.gguf"), str(tmp_path / "out"), "--bits", "8"]) == 2
    assert "m.gguf, expected a folder: read the file with dequantize=True" in capsys.readouterr().err
