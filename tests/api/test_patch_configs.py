"""Patched models follow every field of their config: each field that changes the unpatched model changes both alike."""

import copy

import pytest
import torch
from tiny_transformers import FAMILIES, TOKENS, batch, build, close, outputs_of, train_step

import peakgpt

# Fields that no forward of a language model reads, or that only set sizes or ids which the batch depends on.
HARMLESS = {
    "transformers_version", "architectures", "dtype", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "_name_or_path", "model_type", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range",
    "initializer_factor", "init_std", "classifier_dropout", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "qa_dropout", "seq_classif_dropout", "forced_eos_token_id",
    "decoder_start_token_id", "is_gated_act", "dense_act_fn",
}  # fmt: skip
ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "silu", "tanh")
ROPES = [
    {"rope_type": "default", "rope_theta": 50.0},
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 3.0, "original_max_position_embeddings": 8},
    {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 3.0, "original_max_position_embeddings": 8,
     "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 3.0, "original_max_position_embeddings": 8,
     "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
]  # fmt: skip
VALUES = {
    "activation_function": ACTIVATIONS, "hidden_act": ACTIVATIONS, "activation": ACTIVATIONS,
    "afn": ("gelu", "relu", "swish"),
    "feed_forward_proj": [gate + act for gate in ("", "gated-") for act in ACTIVATIONS],
    "rope_parameters": ROPES,
    "attention_types": [[[["local"], 2]], [[["global"], 2]], [[["local", "global"], 1]]],
    "layer_types": [["sliding_attention", "full_attention"], ["sliding_attention"] * 2],
    "rotary_dim": (None, 2, 8), "n_inner": (40,), "intermediate_size": (40,), "head_dim": (16,),
    "sliding_window": (None, 1, 3), "window_size": (1, 3), "num_key_value_heads": (1, 2, 4),
    "chunk_size_feed_forward": (TOKENS // 2,),
    "word_embed_proj_dim": (16,), "num_decoder_layers": (1,), "max_window_layers": (1,), "pretraining_tp": (2,),
}  # fmt: skip
# What must go with a value, so that the unpatched model reads it.
TOGETHER = {
    "slow_but_exact": {"pretraining_tp": 2}, "pretraining_tp": {"slow_but_exact": True},
    "sliding_window": {"use_sliding_window": True, "max_window_layers": 0},
    "use_sliding_window": {"sliding_window": 3, "max_window_layers": 0},
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 3},
    "layer_types": {"use_sliding_window": True, "sliding_window": 3},
    "reorder_and_upcast_attn": {"attn_implementation": "eager"}, "output_attentions": {"attn_implementation": "eager"},
    "add_cross_attention": {"is_decoder": True},
}  # fmt: skip


def values_of(name, value):
    """Return other values of a field."""
    if name in VALUES:
        return [copy.deepcopy(v) for v in VALUES[name] if v != value]  # transformers changes dictionaries
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [max(1, value // 2), value * 2]
    if isinstance(value, float):
        return [0.5 if "drop" in name else value * 100 + 1e-2]
    return []


def configs_of(family):
    """Return every field with another value: (name, fields)."""
    config = build(family).config.to_dict()
    for name in sorted(set(config) - HARMLESS):
        for value in values_of(name, config[name]):
            with_it = {k: v for k, v in TOGETHER.get(name, {}).items() if k in config or k == "attn_implementation"}
            yield name, {**with_it, name: value}


def results(model):
    inputs, labels = batch(model)
    if model.config.to_dict().get("add_cross_attention"):
        torch.manual_seed(2)
        inputs["encoder_hidden_states"] = torch.randn(3, 5, model.config.hidden_size)
    model.config.return_dict, return_dict = True, model.config.return_dict
    try:
        loss, grads = train_step(model, labels, inputs)
        return {"outputs": outputs_of(model, inputs), "loss": loss, **grads}
    finally:
        model.config.return_dict = return_dict


def check_configs(family, share, of):
    """Try the part `share` of all fields and values, in `of` parts; return how many models transformers could build."""
    tried = 0
    for name, fields in list(configs_of(family))[share::of]:
        try:
            torch.manual_seed(0)
            model = build(family, **fields)
            expected = results(model)
        except Exception:  # transformers has no such model
            continue
        tried += 1
        patched = copy.deepcopy(model)
        peakgpt.patch(patched)
        got = results(patched)
        assert got.keys() == expected.keys(), f"{fields}"
        drops = "drop" in name and float(fields[name]) > 0
        for key in ["outputs"] if drops else expected:
            try:
                close(got[key], expected[key], 1e-3)
            except AssertionError:
                raise AssertionError(f"{fields}: {key} differs") from None
    return tried


@pytest.mark.parametrize("family", FAMILIES)
def test_field_of_the_config_has_the_effect_that_it_has_without_patch(family):
    of = 9
    assert check_configs(family, FAMILIES.index(family) % of, of) > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_config_has_the_effect_that_it_has_without_patch(family):
    assert check_configs(family, 0, 1) > 10


def test_attention_that_cannot_be_replaced_gets_the_mask_that_it_reads():
    """BLOOM adds the mask itself, and slices of partial products keep its attention from being replaced."""
    model = build("bloom", pretraining_tp=2, slow_but_exact=True)
    inputs, _ = batch(model)
    expected = outputs_of(model, inputs)
    report = peakgpt.patch(model)
    assert any(entry.kind == "BloomAttention" for entry in report.left)
    close(outputs_of(model, inputs), expected)
