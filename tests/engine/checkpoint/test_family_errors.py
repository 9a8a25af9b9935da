"""What families refuse, and that a family is data: errors name the file, and nothing in kernels/ names a family."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from family_variants import T, V, batch, reference
from safetensors.torch import load_file, save_file

import peakgpt
from peakgpt.engine.checkpoint.families.catalogue import FAMILIES

NEO_TYPES = r"attention_types is .*, expected 4 layers of global or local"
BAD_CONFIGS = [
    ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, NEO_TYPES),
    ("gpt_neo", {"attention_types": [[["global", "sparse"], 2]]}, NEO_TYPES),
    (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "axial"}},
        "rope_type is 'axial', expected one of default, linear, dynamic, llama3, yarn, longrope",
    ),
    ("gpt_neox", {"num_attention_heads": 0}, "n_head is 0, expected at least 1"),
    ("gpt_neox", {"hidden_act": "silu"}, "hidden_act is 'silu', expected one of gelu_fast, gelu_new, "),
    ("gptj", {"rotary_dim": 17}, "rotary_dim is 17, expected an even number up to head_dim 24"),
    ("gptj", {"n_head": 5}, "n_embd is 48, expected a multiple of n_head 5"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True, expected False"),
    ("opt", {"do_layer_norm_before": "no"}, "do_layer_norm_before is 'no', expected one of True, False"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm is True, expected False"),
    ("openai-gpt", {"afn": "swish"}, "afn is 'swish', expected one of gelu, relu"),
    ("codegen", {"n_head": 2}, "n_head is 2, expected a multiple of 4"),
    ("mpt", {"attn_config": {"clip_qkv": -6.0}}, r"qkv_clip is -6.0, expected .*attn_config.clip_qkv in config"),
    ("mpt", {"attn_config": {"alibi": False}}, r"attn_config.alibi is False, expected True"),
    ("mpt", {"attn_config": {"alibi_bias_max": 16}}, r"attn_config.alibi_bias_max is 16, expected 8"),
    ("mpt", {"attn_config": "torch"}, "attn_config is 'torch', expected an object"),
    ("mpt", {"no_bias": False}, "no_bias is False, expected True"),
    ("mpt", {"norm_type": "rmsnorm"}, "norm_type is 'rmsnorm', expected one of low_precision_layernorm, layernorm"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2, expected 1, or 2 with new_decoder_arch"),
    ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads is 2, expected 3 without multi_query"),
    ("falcon 40b", {"parallel_attn": False}, "parallel_attn is False, expected True with new_decoder_architecture"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True, expected False"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm is True, expected False"),
    ("phi", {"tie_word_embeddings": True}, "head_bias is True, expected false with tied_head"),
    ("llama", {"hidden_act": "mish"}, "hidden_act is 'mish', expected one of silu, swish, gelu"),
    ("llama", {"rope_scaling": {"type": "proportional", "factor": 2.0}}, "rope_type is 'proportional', expected one"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is None, expected the parameters of 'linear': factor"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": -2.0}}, "factor is -2.0, expected a number above 0"),
    ("llama", {"rope_scaling": {"type": "linear", "mrope_section": [1]}}, "rope_parameters has mrope_section"),
    ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\], expected a JSON object"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0, expected 7.0"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
    ("olmo", {"clip_qkv": 0}, "qkv_clip is 0, expected .*clip_qkv in config"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types is .*, expected none: sliding_window decides"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0, expected an integer of at least 1, or null"),
    ("qwen2 windows", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types is .*, expected 2 times"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types is .* with a sliding_window"),
    ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers is \[1\], expected 1 \(rotary\) or 0 for each of 2 layers"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "ZeroDivisionError"),
    ("llama", {"model_type": "llama4", "kv_bits": 3}, "nearest: llama; llama has no kv_bits"),
    ("llama", {"model_type": "olmoe"}, "model_type is 'olmoe', expected one of .*; nearest: olmo.*; olmo has "),
    ("qwen2", {"model_type": "zzz"}, "nearest: .*; .* has "),
]


@pytest.mark.parametrize(("variant", "changes", "message"), BAD_CONFIGS)
def test_bad_configs_are_named_in_the_error(variant, changes, message, tmp_path):
    hf_model = reference(variant)
    hf_model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message) as error:
        peakgpt.GPT.from_pretrained(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("variant", ["gpt_neo", "gpt_neox", "opt", "bloom", "falcon 40b"])
def test_bad_tensors_are_named_in_the_error_as_in_their_file(variant, tmp_path):
    reference(variant).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith(("k_proj.weight", "query_key_value.weight")))
    whole = tensors.pop(name)
    for replacement, message in (
        ({}, rf"got no tensor {name}, expected one of shape \({whole.shape[0]}, {whole.shape[1]}\)"),
        ({name: whole[:-1].clone()}, rf"{name} is .*\({whole.shape[0] - 1}, .*expected .*\({whole.shape[0]}, "),
        ({name: whole, "model.extra": whole.clone()}, "got tensor .*model.extra, expected only the"),
    ):
        save_file(tensors | replacement, path)
        with pytest.raises(ValueError, match=message) as error:
            peakgpt.GPT.from_pretrained(tmp_path)
        assert str(path) in str(error.value)


FAMILY = re.compile(
    r"openai|gpt.?(neo|oss|[1-4j])|neox|pythia|\bopt\b|bloom|palm|gopher|chinchilla|megatron|glam|llama|bert|\bt5\b|"
    r"qwen|gemma(?!rgs)|mi[sx]tral|falcon|\bphi.?\d|olmo|smollm|starcoder|\bmpt\b|stablelm|codegen|bigcode", re.I
)  # fmt: skip


def names_and_strings(path):
    """Return names and strings of a Python file without docstrings, or a C++ file without comments."""
    text = path.read_text()
    if path.suffix != ".py":
        return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    tree = ast.parse(text)
    docs = {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(getattr(node, "body", None), list) and node.body and isinstance(node.body[0], ast.Expr)}
    words = []
    for node in ast.walk(tree):
        words += [str(value) for name, value in ast.iter_fields(node)
                  if isinstance(value, str) and id(node) not in docs and name != "type_comment"]
    return " ".join(words)


def test_nothing_in_kernels_names_a_family():
    """A family is data: no op may depend on one."""
    root = Path(__file__).parents[3]
    files = [*root.glob("kernels/**/*.py"), *root.glob("csrc/**/*.cpp"), *root.glob("csrc/**/*.h")]
    assert len(files) > 50
    searched = ((path, FAMILY.search(names_and_strings(path))) for path in files)
    families_named = {str(path.relative_to(root)): match[0] for path, match in searched if match}
    assert not families_named


def test_a_new_family_is_one_row(tmp_path):
    """For a family that does not exist, one new row is enough to read, write and run its models."""
    row = dataclasses.replace(
        FAMILIES["gpt2"], model_type="new", architecture="NewLM", constants={"norm": "rms", "bias": False},
        groups=(), always_biased=False, conv1d=False,
    )  # fmt: skip
    config = row.config({"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": T, "vocab_size": V}, dropout=0.0)
    assert row.differences(config) == [] and config.norm == "rms"
    model = peakgpt.GPT(config)
    state, layout = model.state_dict(), row.to_layout(config, model.state_dict())
    assert all(torch.equal(row.from_layout(config, name, layout), tensor) for name, tensor in state.items())
    assert model(batch()[0]).shape == (2, 17, V)
