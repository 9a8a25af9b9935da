"""generation_config.json: output equals transformers', explicit arguments win, and what is not implemented is named."""

import json
import math
import warnings

import pytest
import torch

from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.generation_config import generation_config
from peakgpt.engine.model.config import GPTConfig

transformers = pytest.importorskip("transformers")

VOCAB = 41
PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 35]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_layer=2, n_head=3, n_embd=24, block_size=40, vocab_size=VOCAB)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.5)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def with_config(folder, **content):
    (folder / "generation_config.json").write_text(json.dumps({"transformers_version": "5.0.0", **content}))
    return GPT.from_pretrained(folder)


@pytest.fixture
def model(folder):
    """A model whose checkpoint says everything."""
    return with_config(
        folder, eos_token_id=[7, 9], pad_token_id=0, do_sample=True, temperature=0.6, top_k=11, top_p=0.9, min_p=0.05,
        repetition_penalty=1.3, max_new_tokens=12, suppress_tokens=[5], num_beams=1,
    )  # fmt: skip


def free_output(folder):
    """The greedy tokens that no default ends."""
    return with_config(folder).generate(PROMPT, eos_token_id=())[:, 5:]


CONFIGS = {
    "nothing": {},
    "one end": {"eos_token_id": 0},
    "several ends": {"eos_token_id": [0, 1, 2], "pad_token_id": 3},
    "penalty": {"repetition_penalty": 1.7},
    "small penalty": {"repetition_penalty": 0.8, "suppress_tokens": [3, 8]},
    "suppressed": {"suppress_tokens": [0, 1, 2]},
    "new tokens": {"max_new_tokens": 7, "max_length": 9},
    "length": {"max_length": 9},
    "greedy": {"do_sample": False, "temperature": 0.3, "top_k": 3, "top_p": 0.1},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": [0, 1]},
    "beams with penalty": {"num_beams": 2, "repetition_penalty": 1.5, "suppress_tokens": [4], "eos_token_id": 0},
    "neutral": {"typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "use_cache": True, "top_k": 50},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_output_equals_transformers(folder, name, padded):
    """Numbers below 3 stand for tokens that occur in the free output: ends and suppressed tokens have an effect."""
    free = free_output(folder)
    tokens = [int(free[0, 4]), int(free[1, 6]), int(free[0, 9])]
    real = lambda value: tokens[value] if value < 3 else value  # noqa: E731
    content = {key: [real(v) for v in value] if isinstance(value, list) else real(value) if key == "eos_token_id"
               else value for key, value in CONFIGS[name].items()}  # fmt: skip
    content.setdefault("max_length", 30)
    model = with_config(folder, **content)
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder)
    mask = torch.ones_like(PROMPT)
    mask[0, : 2 * padded] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = model.generate(PROMPT, mask)
    expected = reference.generate(PROMPT, attention_mask=mask)
    assert torch.equal(ours, expected)
    if name not in ("nothing", "greedy", "neutral") and not padded:
        assert ours.shape != (2, 30) or not torch.equal(ours[:, 5:], free[:, :25]), "the config had no effect"


def test_explicit_arguments_win(model, folder):
    plain = with_config(folder)
    explicit = {"do_sample": True, "temperature": 0.6, "top_k": 11, "top_p": 0.9, "min_p": 0.05, "seed": 3,
                "repetition_penalty": 1.3, "max_new_tokens": 12, "eos_token_id": (7, 9), "pad_token_id": 0}  # fmt: skip
    model.source_files = {**model.source_files}
    del (content := dict(model.source_files["generation_config.json"]))["suppress_tokens"]
    model.source_files["generation_config.json"] = content
    default = model.generate(PROMPT, seed=3)
    assert torch.equal(default, plain.generate(PROMPT, **explicit))
    changes = {"do_sample": False, "temperature": 1.4, "top_k": 2, "top_p": 0.2, "min_p": 0.9,
               "repetition_penalty": 9.0, "max_new_tokens": 3, "eos_token_id": int(default[0, 6])}  # fmt: skip
    for name, value in changes.items():
        sampling = ("temperature", "top_k", "top_p", "min_p", "seed")
        arguments = {**explicit, name: value}
        if name == "do_sample":
            arguments = {key: argument for key, argument in arguments.items() if key not in sampling}
        seed = {} if name == "do_sample" else {"seed": 3}
        got, expected = model.generate(PROMPT, **seed, **{name: value}), plain.generate(PROMPT, **arguments)
        assert torch.equal(got, expected), name
        assert not torch.equal(got, default), name
    assert model.generate(PROMPT, eos_token_id=(), max_new_tokens=30, seed=0).shape == (2, 35)
    assert torch.equal(model.generate(PROMPT, top_k=0, seed=3), plain.generate(PROMPT, **{**explicit, "top_k": 0}))


def test_stream_has_the_same_defaults(folder):
    end = int(free_output(folder)[0, 4])
    model = with_config(folder, eos_token_id=[end], repetition_penalty=1.01, max_new_tokens=9)
    whole = model.generate(PROMPT[:1])[0, 5:].tolist()
    assert list(model.stream(PROMPT[:1])) == whole[: whole.index(end)]


def test_prompt_as_long_as_the_limit_is_refused(folder):
    model = with_config(folder, max_length=5)
    for method in (
        model.generate, lambda ids: model.stream(ids[:1]), lambda ids: Engine(model).submit(ids[0].tolist())
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"generation_config\.json: max_length is 5 and the prompt has 5 tokens"):
            method(PROMPT)
    assert model.generate(PROMPT, max_new_tokens=2).shape == (2, 7)


def test_limit_beyond_the_context_is_cut(folder):
    assert with_config(folder, max_new_tokens=1000).generate(PROMPT).shape == (2, 40)
    assert with_config(folder, max_length=1000).generate(PROMPT).shape == (2, 40)


# ---- the file


def test_ids_of_config_json_are_used_where_the_file_has_none(folder):
    content = json.loads((folder / "config.json").read_text())
    for file, expected in (({}, ((3,), 4)), ({"eos_token_id": [5, 6]}, ((5, 6), 4)), ({"pad_token_id": 0}, ((3,), 0))):
        model = with_config(folder, **file)
        model.source_files = {**model.source_files, "config.json": {**content, "eos_token_id": 3, "pad_token_id": 4}}
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == expected


def test_ids_beyond_the_vocabulary_and_null_are_absent(folder):
    content = {"eos_token_id": [VOCAB, 3, -1], "pad_token_id": -1, "temperature": None, "top_k": -1}
    config = with_config(folder, **content).generation_config
    assert (config.eos_token_id, config.pad_token_id, config.temperature, config.top_k) == ((3,), None, None, None)
    new = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9))
    assert new.generation_config.eos_token_id == ()


BAD = {
    "eos_token_id": ["x", 1.5, [1, None], True], "do_sample": [1, "yes"], "temperature": ["hot", -1, True, 1e-9],
    "top_k": [1.5, "5"], "top_p": [0, 1.5, "x"], "min_p": [-0.1, 2], "repetition_penalty": [0, -1, "x"],
    "max_new_tokens": [0, 1.5], "max_length": [-3, "x"], "suppress_tokens": [[1.5]], "stop_strings": [5, [""], [1]],
    "num_beams": [0, 1.5], "length_penalty": ["x"], "early_stopping": ["soon", 1], "pad_token_id": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_values_are_one_sentence(folder, name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"^generation_config\.json: {name} is .*, expected "):
            with_config(folder, **{name: value}).generate(PROMPT)


def test_what_is_not_implemented_is_named(folder):
    content = {"typical_p": 0.9, "no_repeat_ngram_size": 3, "bad_words_ids": [[1]], "stop_strings": ["x"]}
    content["num_beams"] = 2
    model = with_config(folder, **content)
    with pytest.warns(UserWarning, match=r"GPT\.generate does not implement bad_words_ids, no_repeat_ngram_size, "
                                         r"typical_p, stop_strings; the text may differ"):  # fmt: skip
        model.generate(PROMPT, max_new_tokens=1)
    with pytest.warns(UserWarning, match=r"Engine does not implement .*typical_p, num_beams, stop_strings;"):
        Engine(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(with_config(folder, typical_p=1.0, max_time=None, penalty_alpha=0.0, num_beams=1, chat_format="x"))


def test_saved_unchanged(model, folder, tmp_path):
    model.generate(PROMPT)
    model.save_pretrained(tmp_path)
    saved, source = (json.loads((place / "generation_config.json").read_text()) for place in (tmp_path, folder))
    assert saved == source


# ---- the engine


def tokens_of(engine, params=None):
    return [token for output in engine.stream(PROMPT[0].tolist(), params) for token in output.token_ids]


def test_every_end_of_the_checkpoint_ends_a_request(folder):
    free = free_output(folder)[0].tolist()
    for end in (free[4], free[9]):
        engine = Engine(with_config(folder, eos_token_id=[free[4], free[9]]))
        suppressed = {other: -math.inf for other in (free[4], free[9]) if other != end}
        params = SamplingParams(temperature=0, logit_bias=suppressed)
        got = tokens_of(engine, params)
        assert len(got) < 35 and got[-1] == end
        assert len(tokens_of(engine, SamplingParams(temperature=0, ignore_eos=True, logit_bias=suppressed))) == 35
        own = SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=(got[0],), logit_bias=suppressed)
        assert tokens_of(engine, own) == got[:1]


def test_tokenizer_ends_a_request():
    tokenizer = train_tokenizer(["the cat sat on the mat"], 270)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=tokenizer.vocab_size)).eval()
    params = {"logit_bias": {tokenizer.end_id: 100.0}, "max_tokens": 5, "temperature": 0}
    engine = Engine(model, tokenizer)
    (output,) = engine.stream([1, 2], SamplingParams(**params))
    assert (output.token_ids, output.finish_reason, output.text) == ((tokenizer.end_id,), "stop", "")
    assert len([*engine.stream([1, 2], SamplingParams(**params, ignore_eos=True))]) == 5


def test_request_without_parameters_follows_the_checkpoint(model):
    params = Engine(model).preparation.default_params(5)
    assert params == SamplingParams(
        max_tokens=12, temperature=0.6, top_k=11, top_p=0.9, min_p=0.05, repetition_penalty=1.3,
        logit_bias={5: -math.inf},
    )  # fmt: skip
    assert Engine(model, blocks=1).preparation.default_params(35).max_tokens == 5
    torch.manual_seed(0)
    drawn = tokens_of(Engine(model))
    assert 0 < len(drawn) <= 12 and 5 not in drawn


@pytest.mark.parametrize(("content", "temperature"), [
    ({}, 1.0), ({"do_sample": False}, 0.0), ({"do_sample": False, "temperature": 0.6, "top_k": 5}, 0.0),
    ({"temperature": 0.6}, 0.6), ({"do_sample": True}, 1.0), ({"temperature": 0.0}, 0.0),
], ids=str)  # fmt: skip
def test_temperature_of_a_request_without_parameters(folder, content, temperature):
    params = generation_config(with_config(folder, **content)).sampling_params(5)
    assert params.temperature == temperature and (params.top_k is None or temperature)
