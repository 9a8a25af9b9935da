"""The server and `peakgpt generate` follow the checkpoint's generation_config.json, and explicit values win."""

import json
import math

import pytest
import serving  # skips all where the packages of peakgpt[serve] are missing
from serving import LIMITS, Running

from peakgpt.cli import main
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.generation_config import GenerationConfig
from peakgpt.serve.schema import check_request

DEFAULTS = GenerationConfig(
    eos_token_id=(3, 4), do_sample=True, temperature=0.6, top_k=11, top_p=0.9, min_p=0.05, repetition_penalty=1.3,
    max_new_tokens=40, suppress_tokens=(5, 6), stop_strings=("END",),
)  # fmt: skip


def params(defaults=DEFAULTS, *, chat=False, room=100, num_prompt=8, **fields):
    start = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    return check_request({**start, **fields}, chat=chat, limits=LIMITS).params(defaults, num_prompt, room)


SUPPRESSED = {5: -math.inf, 6: -math.inf}
STATED = {"temperature": 0.6, "top_k": 11, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3, "stop": ("END",),
          "logit_bias": SUPPRESSED}  # fmt: skip


def test_request_that_says_nothing_follows_the_checkpoint():
    assert params(chat=True) == SamplingParams(max_tokens=40, **STATED)
    assert params() == SamplingParams(max_tokens=16, **STATED)
    assert params(GenerationConfig()) == SamplingParams(max_tokens=16)
    assert params(GenerationConfig(), chat=True) == SamplingParams(max_tokens=100)
    assert params(GenerationConfig(do_sample=False), chat=True).temperature == 0


def test_what_the_request_says_wins():
    fields = {"temperature": 1.1, "top_k": 2, "top_p": 0.5, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 90}
    got = params(chat=True, stop="x", logit_bias={"5": 2, "7": 1}, **fields)
    assert got == SamplingParams(stop=("x",), logit_bias={5: 2.0, 6: -math.inf, 7: 1.0}, **fields)


def test_the_room_and_max_length_limit_a_text():
    assert [params(chat=True, room=room).max_tokens for room in (39, 40, 41)] == [39, 40, 40]
    limit = GenerationConfig(max_length=30)
    assert params(limit, chat=True).max_tokens == 22
    assert params(limit, chat=True, max_completion_tokens=90).max_tokens == 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = serving.tiny_tokenizer()
    folder = tmp_path_factory.mktemp("checkpoint")
    serving.tiny_model(tokenizer).save_pretrained(folder, tokenizer)
    return folder


def state(folder, **content):
    (folder / "generation_config.json").write_text(json.dumps(content))
    return GPT.from_pretrained(folder)


def test_server_ends_at_every_end_of_the_checkpoint(folder):
    tokenizer = serving.tiny_tokenizer()
    ask = {"prompt": "the canary", "max_tokens": 60, "temperature": 0}
    greedy = SamplingParams(max_tokens=60, temperature=0)
    outputs = Engine(state(folder), tokenizer).stream(tokenizer.encode("the canary"), greedy)
    free = [token for output in outputs for token in output.token_ids]
    ends = []
    for content in ({}, {"eos_token_id": [tokenizer.vocab_size - 1, free[9]]}, {"max_length": 4}):
        with Running(state(folder, **content), tokenizer) as running:
            status, answer = running.ask("/v1/completions", ask)
            assert status == 200
            ends.append(answer["choices"][0])
            bare = running.ask("/v1/completions", {"prompt": "the canary"})
    assert bare[0] == 400 and bare[1]["error"]["param"] == "max_tokens"
    assert "generation_config.json: max_length is 4" in bare[1]["error"]["message"]
    free, stopped, _ = ends
    assert (free["finish_reason"], stopped["finish_reason"]) == ("length", "stop")
    assert free["text"].startswith(stopped["text"]) and len(stopped["text"]) < len(free["text"])


def test_command_follows_the_checkpoint(folder, capsys):
    def command(*flags):
        assert main(["generate", str(folder), "-p", "the canary", "--device", "cpu", *flags]) == 0
        return capsys.readouterr().out.partition("\n\n[")[0]

    def engine(model, **options):
        tokenizer = serving.tiny_tokenizer()
        stream = Engine(model.bfloat16(), tokenizer).stream(
            tokenizer.encode("the canary"), SamplingParams(**{"seed": 0, **options})
        )
        return "the canary" + "".join(output.text for output in stream)

    model = state(folder, do_sample=True, temperature=0.6, top_p=0.7, repetition_penalty=1.4, max_new_tokens=20)
    stated = {"temperature": 0.6, "top_p": 0.7, "repetition_penalty": 1.4, "max_tokens": 20}
    assert command() == engine(model, **stated)
    assert command("--top-p", "1", "-n", "30") == engine(model, **{**stated, "top_p": 1.0, "max_tokens": 30})
    assert command("--temperature", "0") == engine(model, **{**stated, "temperature": 0})
    assert command("--repetition-penalty", "1", "--min-p", "0.2", "--seed", "4") == engine(
        model, **{**stated, "repetition_penalty": 1.0, "min_p": 0.2, "seed": 4}
    )
    plain = state(folder)
    assert command("-n", "25") == engine(plain, temperature=0.8, top_k=50, max_tokens=25)
    assert command("-n", "25", "--top-k", "0") == engine(plain, temperature=0.8, max_tokens=25)
    greedy = state(folder, do_sample=False, stop_strings=["canary"])
    assert command("-n", "25") == engine(greedy, temperature=0, max_tokens=25, stop=("canary",))


def test_sampling_flags_of_a_greedy_checkpoint_are_refused(folder, capsys):
    state(folder, do_sample=False)
    assert main(["generate", str(folder), "-p", "x", "--top-p", "0.5"]) == 2
    assert "--top-p: got it with do_sample false in generation_config.json, which is greedy" in capsys.readouterr().err
    assert main(["generate", str(folder), "-p", "x", "--top-p", "0.5", "--temperature", "1", "-n", "2"]) == 0
    capsys.readouterr()


def test_wrong_file_is_one_sentence(folder, capsys):
    state(folder, temperature="hot")
    assert main(["generate", str(folder), "-p", "x"]) == 2
    assert "generation_config.json: temperature is 'hot', expected a number from 0" in capsys.readouterr().err
