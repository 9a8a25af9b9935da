"""Every field of a family's config.json is read, known to be harmless, or refused by name; damage is one sentence."""

import json
import math

import pytest
import torch
from small_configs import SMALL

from peakgpt.engine.checkpoint.families.catalogue import FAMILIES, OWN
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CONFIG_MAPPING = transformers.models.auto.configuration_auto.CONFIG_MAPPING

# Fields that do not change the logits of a loaded model in eval().
HARMLESS = {
    # what transformers returns, labels of classifiers, the versions and the dtype of the file
    "architectures", "chunk_size_feed_forward", "dtype", "id2label", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "transformers_version", "use_cache", "_name_or_path",
    # initialization, generation, heads of other tasks
    "initializer_range", "init_std", "bos_token_id", "eos_token_id", "pad_token_id", "classifier_dropout",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    # how transformers computes the same values
    "reorder_and_upcast_attn", "pretraining_tp", "slow_but_exact", "is_decoder", "is_encoder_decoder", "init_device",
    "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
    # fields without an effect: CodeGen's, those of MPT with ALiBi, and in training
    "n_ctx", "learned_pos_emb", "embedding_fraction",
    "_sliding_window_pattern",  # layer_types, which is written too, wins
}  # fmt: skip


@pytest.mark.parametrize("model_type", SMALL)
def test_every_field_of_transformers_config_is_read_or_harmless(model_type):
    known = FAMILIES[model_type].config_names
    assert set(CONFIG_MAPPING[model_type]().to_dict()) - known - HARMLESS == set()


def alternatives(value):
    """Return other values of a field that transformers might accept."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value]
    if isinstance(value, float):
        return [value * 10 + 1e-3]
    if isinstance(value, str):
        return ["relu", "gelu_new", "silu"]
    if isinstance(value, dict) and "rope_type" in value:
        return [{**value, **more} for more in ({"rope_type": "linear", "factor": 2.0}, {"rope_theta": 500.0},
                                               {"partial_rotary_factor": 1.0})]  # fmt: skip
    return [True, 16, "relu"] if value is None else []


@pytest.mark.parametrize("model_type", SMALL)
def test_a_changed_field_gives_transformers_logits_or_an_error_that_names_it(model_type, tmp_path):
    base, family = CONFIG_MAPPING[model_type](**SMALL[model_type], vocab_size=64), FAMILIES[model_type]
    ids, equal = torch.randint(64, (2, 9)), 0
    common = set(transformers.PreTrainedConfig().to_dict()) if model_type != "gpt2" else {"architectures", "model_type"}
    changes = [(name, value) for name, old in base.to_dict().items() if name not in common
               for value in alternatives(old)]  # fmt: skip
    for name, value in changes:
        try:
            config = CONFIG_MAPPING[model_type](**{**base.to_dict(), name: value})
            model = getattr(transformers, family.architecture)(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
                expected = model(ids).logits
            model.save_pretrained(tmp_path)
        except Exception:  # transformers does not accept this value
            continue
        try:
            with torch.no_grad():
                got = GPT.from_pretrained(tmp_path)(ids)
        except ValueError as error:
            assert name in str(error) or "rope_type" in str(error), f"{name} = {value!r}"
            continue
        equal += 1
        assert (got - expected).abs().max() < 1e-3 * expected.abs().max(), f"{name} = {value!r}"
    assert equal >= 8


@pytest.mark.parametrize("model_type", SMALL)
def test_other_names_of_fields_are_those_of_transformers(model_type):
    assert CONFIG_MAPPING[model_type].attribute_map.items() <= FAMILIES[model_type].aliases.items()


# Fields that contradict others of the same file, or that only some releases write.
ROPE = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0}
COMBINATIONS = [
    *((name, {"num_attention_heads": 4}) for name in ("gpt2", "openai-gpt", "gpt_neo", "gptj", "bloom")),
    ("gpt_neo", {"attention_layers": ["local", "global"]}),
    ("gpt_neo", {"attention_layers": ["local", "local"], "window_size": 2}),
    ("gpt_neox", {"rope_scaling": ROPE}),
    ("gpt_neox", {"rope_scaling": ROPE | {"rope_type": "linear", "factor": 2.0}}),
    ("gpt_neox", {"head_dim": 8}),
    ("gpt_neox", {"head_dim": 16}),
    ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 300}),
    ("gpt_neox", {"rotary_pct": 1.0, "rope_parameters": None}),
    ("mpt", {"attn_config": {"softmax_scale": 0.7}}),
    ("mpt", {"attn_config": {"qk_ln": True}}),
    ("falcon", {"alibi": True, "bias": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    ("falcon", {"rope_parameters": None, "rope_theta": 300.0}),
    ("phi", {"rope_parameters": None, "partial_rotary_factor": 0.25}),
    ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.5, "rope_theta": 300.0}),
    ("stablelm", {"rope_parameters": None, "partial_rotary_factor": 0.5}),
]


@pytest.mark.parametrize(("model_type", "change"), COMBINATIONS)
def test_combined_fields_give_transformers_logits_or_an_error_that_names_one(model_type, change, tmp_path):
    """Regression: attention_layers, rope_scaling, head_dim and other names of the head count were ignored."""
    config = CONFIG_MAPPING[model_type](**SMALL[model_type], vocab_size=64)
    architecture = getattr(transformers, FAMILIES[model_type].architecture)
    architecture(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model, ids = architecture.from_pretrained(tmp_path).eval(), torch.randint(64, (2, 9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        expected = model(ids).logits
    text = path.read_text()
    model.save_pretrained(tmp_path)
    path.write_text(text)
    try:
        with torch.no_grad():
            got = GPT.from_pretrained(tmp_path)(ids)
    except ValueError as error:
        assert any(name in str(error) for name in (*change, "rope_type"))
    else:
        assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


TYPES = [[[["global", "local"], 2 * 10**9]], [[["global"], 2**70]], [[["global"], -1]], [[["global"], 1.5]], [[]], [1],
         [[["global"], "2"]], [["global", 2]], [[None, 2]], [[[["global"]], 2]], {"a": 1}, "global"]  # fmt: skip


@pytest.mark.parametrize("types", TYPES)
def test_hostile_attention_types_are_one_sentence(types, tmp_path):
    """Regression: a count of 2e9 took all memory."""
    path, content = written(tmp_path, "gpt_neo")
    path.write_text(json.dumps({**content, "attention_types": types, "attention_layers": None}))
    with pytest.raises(ValueError, match=r"config.json: [^\n]*$"):
        GPT.from_pretrained(tmp_path)


HOSTILE = [None, "x", "", "9" * 50, -1, 0, 1.5, 1e30, 2**31, 2**63, 2**200, 20_000, math.nan, math.inf, True,
           [], {}, [[[]]], [None], {"a": [1]}]  # fmt: skip


def written(tmp_path, model_type):
    """Save a small model; return the path and content of its config.json."""
    if model_type == OWN:
        config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=64, gated_mlp=True, experts=2)
        with pytest.warns(UserWarning, match="own layout"):
            GPT(config).save_pretrained(tmp_path)
    else:
        config = CONFIG_MAPPING[model_type](**SMALL[model_type], vocab_size=64)
        getattr(transformers, FAMILIES[model_type].architecture)(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    return path, json.loads(path.read_text())


@pytest.mark.parametrize("share", [0, *(pytest.param(share, marks=pytest.mark.slow) for share in (1, 2, 3))])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_hostile_value_in_config_json_loads_or_is_one_sentence(model_type, share, tmp_path):
    """Each share is a quarter of all pairs of a field and a value; other families put other pairs in the first share.

    Regression: n_layer 20,000 took 42 s and 2e9 all memory: modules were built before names were compared.
    """
    share += list(FAMILIES).index(model_type)
    path, content = written(tmp_path, model_type)
    names = {*content, *(f.hf_name for f in FAMILIES[model_type].fields), "quantization_config", "rope_scaling"}
    for i, name in enumerate(sorted(names)):
        for value in HOSTILE[(i + share) % 4 :: 4]:
            path.write_text(json.dumps({**content, name: value}))
            try:
                GPT.from_pretrained(tmp_path)
            except ValueError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error), f"{name} = {value!r}: {error}"


TEXTS = ["[" * 100_000, '{"a":' * 50_000, "[]", "null", "", "\0", '{"model_type": "gpt2"', "1"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_json_is_one_sentence_with_the_path(name, text, tmp_path):
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=16)).save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: .*expected"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": 5}, {"weight_map": {"a": 5}}, {"weight_map": {"a": None}},
                                   {"weight_map": {"a": "../b.safetensors"}}, {"weight_map": ["a"]},
                                   {"weight_map": {"a": ""}}, {"weight_map": {"a": "."}}, {"weight_map": {"a": []}},
                                   {"weight_map": {"a": "config.json"}}, []])  # fmt: skip
def test_a_damaged_index_is_one_sentence_with_a_path(index, tmp_path):
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=16)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{tmp_path}.*expected"):
        GPT.from_pretrained(tmp_path)
