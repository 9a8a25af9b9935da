"""Adapters that do not fit a model, or that are not supported, are refused in one sentence that names the fault."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peakgpt import GPT, GPTConfig, LoraConfig

SIZES = {"vocab_size": 41, "block_size": 24, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_inner": 40,
         "layer_norm_epsilon": 1e-6}  # fmt: skip
LLAMA = {"norm": "rms", "position": "rotary", "gated_mlp": True, "activation": "silu", "bias": False}


def llama(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SIZES, **LLAMA, "tied_head": False, **changes}))


@pytest.fixture
def folder(tmp_path):
    """Return the folder of an adapter of q_proj and down_proj."""
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora is True, expected none: it is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], expected none"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is"),
        ({"a_field_of_the_future": 3}, "a_field_of_the_future is 3, expected none"),
        ({"bias": "all"}, "bias is 'all', expected none"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', expected True or False or gaussian"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected LORA"),
        ({"r": 0}, "r is 0, expected a whole number of at least 1"),
        ({"r": "8"}, "r is '8', expected a whole number"),
        ({"lora_alpha": -1}, "lora_alpha is -1, expected a number above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, expected a rate"),
        ({"target_modules": []}, r"target_modules is \(\), expected names"),
        ({"r": 3}, r"q_proj.lora_A.weight is torch.float32 of shape \(2, 32\), expected .*\(3, 32\).*rank"),
        ({"target_modules": ["q_proj"]}, "got tensor base_model.model.model.layers.0.mlp.down_proj.lora_A"),
        ({"target_modules": "all-linear"}, "got no tensor base_model.model.model.layers.0.self_attn.k_proj"),
        ({"target_modules": ["c_attn"]}, "target_modules is .*, expected some of q_proj, k_proj.* this llama model"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_not_supported_is_refused_by_name(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(ValueError, match=message) as error:
        llama().load_adapter(folder)
    assert str(folder) in str(error.value) or "this llama model" in str(error.value)


@pytest.mark.parametrize("changes", [{"n_layer": 1}, {"n_embd": 48}, {"n_inner": 44}])
def test_an_adapter_of_another_model_is_refused(folder, changes):
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: .*expected"):
        llama(**changes).load_adapter(folder)


def test_an_adapter_with_other_tensors_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"got tensor base_model.model.lm_head.weight, expected only the 8 of"):
        llama().load_adapter(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["q_proj", "typo"], "got 'typo', expected the end of a name of a linear layer: q_proj, k_proj"),
        (".*typo", "target_modules is '.*typo', expected some of q_proj"),
        ([], "names of modules"),
        ([3], "str or a list of them"),
    ],
)
def test_targets_that_match_nothing_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        llama().add_adapter(LoraConfig(target_modules=names))


def test_a_tied_head_takes_no_adapter():
    with pytest.raises(ValueError, match="lm_head is tied to the token embedding here, which takes no adapter"):
        llama(tied_head=True).add_adapter(LoraConfig(target_modules=["lm_head"]))


def test_names_of_adapters_are_checked(folder):
    model = llama()
    model.load_adapter(folder, "one")
    with pytest.raises(ValueError, match="has one named 'one' already"):
        model.load_adapter(folder, "one")
    with pytest.raises(ValueError, match=r"name is 'a.b', expected text without a dot"):
        model.load_adapter(folder, "a.b")
    for method in (model.set_adapter, model.delete_adapter, lambda name: model.save_adapter(folder, name)):
        with pytest.raises(ValueError, match="got 'two', expected one of the model's: 'one'"):
            method("two")


def test_a_model_with_an_adapter_is_saved_only_merged(folder, tmp_path):
    model = llama()
    model.load_adapter(folder)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.save_pretrained(tmp_path / "model")
    model.merge_and_unload().save_pretrained(tmp_path / "model")


def test_a_damaged_adapter_folder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        llama().load_adapter(tmp_path)
    change(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="base_model_name_or_path is None, expected the model that the adapter is for"):
        GPT.from_pretrained(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        llama().load_adapter(folder)
