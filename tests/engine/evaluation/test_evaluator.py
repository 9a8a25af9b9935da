"""Answers of tiny models: choices, greedy and sampled texts, chats; shots that are computed once.

Mutations that these tests detect: shots drawn anew for each question; votes with one seed; a prompt that ends in the
space of its prefix; a chat with the tokenizer's own BOS.
"""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from serving import with_chat

from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.evaluation.evaluator import AnswerOptions, Evaluator
from peakgpt.engine.evaluation.metrics import CHOICES, TEXT
from peakgpt.engine.evaluation.task import Example, Shots, Task
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.block_pool import BLOCK_TOKENS
from peakgpt.engine.model.config import GPTConfig

COLORS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}
PREFIX = {"example_input_prefix": "Color of ", "example_output_prefix": ": ", "few_shot_example_separator": "\n",
          "append_choices_to_input": False, "stop_string": ("\n",), "max_tokens": 8}  # fmt: skip


def task_of(**fields):
    examples = tuple(Example(f"t:{i}", thing, (color,), {c: float(c == color) for c in COLORS.values()})
                     for i, (thing, color) in enumerate(COLORS.items()))  # fmt: skip
    return Task(name="t", examples=examples, metrics=("acc",), preferred_score="acc", **{**PREFIX, **fields})


LINES = [f"Color of {thing}: {color}\n" for thing, color in COLORS.items()]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["".join(LINES)], 300)


@pytest.fixture(scope="module")
def trained(tokenizer):
    """A model that memorizes all pairs of lines."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_embd=64, n_head=2, block_size=64, vocab_size=tokenizer.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = [tokenizer.encode(first + second) for first, second in permutations(LINES, 2)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    for _ in range(130):
        loss = model(ids[:, :-1].clamp(min=0), ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def answer(model, tokenizer, task, reads=(CHOICES, TEXT), shots=0, **options):
    evaluator = Evaluator(model, tokenizer)
    drawn = Shots(task.examples, shots, seed=0)
    return evaluator.answer(task, task.examples, drawn, set(reads), AnswerOptions(**options))


@pytest.mark.parametrize("shots", [0, 1])
def test_a_model_that_knows_the_answers_gives_them(trained, tokenizer, shots):
    """By log-probabilities, greedily, and by votes."""
    for options in ({}, {"votes": 5, "temperature": 0.7, "top_k": 40}):
        for found in answer(trained, tokenizer, task_of(), shots=shots, **options):
            assert found.choice == found.text == found.example.targets[0]
            assert len(found.outputs) == len(found.answers) == options.get("votes", 1)
            assert found.prompt.count("Color of") == shots + 1


def random_model(tokenizer, **fields):
    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 1024, "vocab_size": tokenizer.vocab_size}
    model = GPT(GPTConfig(**{**sizes, **fields}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def test_logprobs_and_greedy_text_are_those_of_the_model(tokenizer):
    """The prompt of a generated text ends before the space of its prefix; a choice begins with this space."""
    model = random_model(tokenizer)
    for found in answer(model, tokenizer, task_of(stop_string=("zzz",)), shots=2):
        for choice, logprob in found.logprobs.items():
            context, whole = tokenizer.encode(found.prompt.rstrip()), tokenizer.encode(found.prompt + choice)
            assert whole[: len(context)] == context
            log_p = model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
            targets = torch.tensor(whole[len(context) :])[:, None]
            assert logprob == pytest.approx(log_p[len(context) - 1 :].gather(1, targets).sum().item(), abs=1e-3)
        ids = torch.tensor([tokenizer.encode(found.prompt.rstrip(" "))])
        expected = model.generate(ids, max_new_tokens=8)[0, ids.shape[1] :].tolist()
        assert found.outputs == (tokenizer.decode(expected),)


def test_votes_differ_and_depend_on_the_seed_only(tokenizer):
    model, options = random_model(tokenizer), {"votes": 6, "temperature": 1.0}
    first, again, other = (answer(model, tokenizer, task_of(), (TEXT,), seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other
    assert all(len(set(found.outputs)) > 3 for found in first)
    assert first[0].logprobs == {}


# ---- prefixes


def tokens_run(executor, monkeypatch, run):
    """Return the number of tokens that an executor runs while `run` is called."""
    counts, step = [], executor.step
    with monkeypatch.context() as patch:
        patch.setattr(executor, "step", lambda chunks: counts.extend(len(c.token_ids) for c in chunks) or step(chunks))
        run()
    return sum(counts)


def test_shared_shots_are_computed_once(tokenizer, monkeypatch):
    """Of questions that are not among the shots. A Scorer shares tokens, an Engine whole blocks of its cache."""
    model, task = random_model(tokenizer), task_of(max_tokens=1)
    pool = [Example(f"s:{i}", f"shot number {i} of many", ("a long answer to it",)) for i in range(12)]
    shots = Shots(pool, 12, seed=0)
    prompts = [tokenizer.encode(task.prompt(example, shots.of(example)).rstrip()) for example in task.examples]
    common = next(i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    assert common > 3 * BLOCK_TOKENS and common > 0.9 * len(prompts[0])
    evaluator = Evaluator(model, tokenizer)
    ask = lambda reads: evaluator.answer(task, task.examples, shots, {reads}, AnswerOptions())  # noqa: E731
    own = sum(len(prompt) - common for prompt in prompts)
    scored = tokens_run(evaluator.scorer.executor, monkeypatch, lambda: ask(CHOICES))
    assert common + own <= scored <= common + own + 4 * len(COLORS) * len(prompts) < 2 * common
    generated = tokens_run(evaluator.engine.executor, monkeypatch, lambda: ask(TEXT))
    assert generated == common + own + (len(prompts) - 1) * (common % BLOCK_TOKENS) < 2 * common


# ---- chats and limits


TEMPLATE = ("<end>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            "{{ '[assistant]' if add_generation_prompt }}")  # fmt: skip


@torch.no_grad()
def test_chats_are_rendered_by_the_template(tokenizer):
    """Its text is encoded alone: the ids that the tokenizer puts before a text are not added."""
    model, with_start = random_model(tokenizer), with_chat(tokenizer, TEMPLATE)
    with_start.start_ids = [tokenizer.end_id] * 2
    task = task_of(task_prefix="Name colors.\n", max_tokens=4, stop_string=("zzz",))
    for found in answer(model, with_start, task, shots=1, chat=True):
        shot, question = (text.strip() for text in found.prompt.split("[user]")[1:])
        shot_color = shot.split(":[assistant]")[1]
        assert found.prompt.startswith("<end>[user]Name colors.\n\nColor of ") and found.prompt.endswith(":[assistant]")
        assert question == f"Color of {found.example.input}:[assistant]" and shot_color in COLORS.values()
        ids = tokenizer.encode(found.prompt)
        expected = model.generate(torch.tensor([ids]), max_new_tokens=4)[0, len(ids) :].tolist()
        assert found.outputs == (tokenizer.decode(expected),)
        whole = tokenizer.encode(found.prompt + "blue")
        log_p = model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)[len(ids) - 1 :]
        expected = log_p.gather(1, torch.tensor(whole[len(ids) :])[:, None]).sum().item()
        assert found.logprobs["blue"] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="chat template: got a tokenizer without one"):
        answer(model, tokenizer, task, chat=True)


def test_too_long_prompts_are_named_or_cut(tokenizer):
    model, task = random_model(tokenizer, block_size=32), task_of()
    long = replace(task.examples[2], input="snow " * 40)
    task = replace(task, examples=(*task.examples[:2], long))
    for reads, rest in ((CHOICES, "a choice of"), (TEXT, "8 new tokens")):
        with pytest.raises(ValueError, match=rf"^t:2: got a prompt of \d+ tokens and {rest}.*expected at most 3[23]"):
            answer(model, tokenizer, task, (reads,))
        found = answer(model, tokenizer, task, (reads,), truncate=True)
        assert found[:2] == answer(model, tokenizer, replace(task, examples=task.examples[:2]), (reads,))
    with pytest.raises(ValueError, match="tokens and 32 new tokens, expected at most 32 in all"):
        answer(model, tokenizer, task, (TEXT,), max_tokens=32, truncate=True)
