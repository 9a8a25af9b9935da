"""Zero-shot answers of a tiny model that is trained on a few sentences."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from peakgpt.cli import main
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.evaluation.zero_shot import ZeroShot, best_threshold
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

SENTENCES = ("The film was great, very good.", "The film was awful, very bad.", "The nurse said that she was tired.",
          "The engineer said that he was tired.", "Ann thanked Bob since Bob had helped.")  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["".join(SENTENCES)], 300)


@pytest.fixture(scope="module")
def trained_model(tokenizer):
    """Train a model for 100 steps on the sentences, so that it memorizes them."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_embd=64, n_head=2, block_size=64, vocab_size=tokenizer.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    start = [tokenizer.end_id], []
    rows = [[*before, *tokenizer.encode(text), tokenizer.end_id] for text in SENTENCES for before in start]
    width = max(map(len, rows))
    ids = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    for _ in range(100):
        loss = model(ids[:, :-1].clamp(min=0), ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.6
    return model.eval()


@pytest.fixture(scope="module")
def zero(trained_model, tokenizer):
    return ZeroShot(Scorer(trained_model), tokenizer)


def test_context_and_continuation_are_split_at_the_tokens_of_the_whole_text(zero, tokenizer):
    """A space at the end of the context belongs to the next token; an empty context is the end-of-text token."""
    whole, parts = zero.continuations([("", SENTENCES[0]), ("The film was ", "great, very good.")])
    ids, first = tokenizer.encode(SENTENCES[0]), len(tokenizer.encode("The film was"))
    assert [whole, parts] == zero.scorer.score([([tokenizer.end_id], ids), (ids[:first], ids[first:])])


def test_all_heuristics_answer_correctly_on_memorized_sentences(zero):
    assert zero.restricted("The film was great,", [" bad", " good"]) == 1
    assert zero.restricted("The film was awful,", [" bad", " good"]) == 0
    assert zero.best_answer("The nurse said that", [" he was tired.", " she was tired."]) == 1
    assert zero.winograd("Ann thanked Bob since _ had helped.", ["Ann", "Bob"]) == 1
    scrambled = ["great good very film was The.", "said nurse tired was that she The."]
    means = zero.mean_logprobs([*SENTENCES[:2], *scrambled])
    threshold = best_threshold(means, [True, True, False, False])
    assert zero.acceptable([*SENTENCES[2:], *scrambled], threshold) == [True, True, True, False, False]


def test_best_threshold_classifies_the_most_texts_correctly():
    assert best_threshold([-1.0, -2.0, -3.0, -4.0], [True, True, False, False]) == -2.5
    assert best_threshold([-1.0], [False]) > -1.0
    with pytest.raises(ValueError, match="got 0 means and 0 labels"):
        best_threshold([], [])


@pytest.mark.parametrize("schema", ["no blank", "_ and _", "at the end _", "at the end _ "])
def test_schemas_without_one_blank_and_text_after_it_raise(zero, schema):
    with pytest.raises(ValueError, match="expected one '_' and text after it"):
        zero.winograd(schema, ["a", "b"])


def test_the_bias_example_runs_and_finds_the_trained_bias(zero):
    spec = importlib.util.spec_from_file_location("bias", Path(__file__).parents[3] / "examples/occupation_bias.py")
    bias = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bias)
    biases = {name: values for name, *values in bias.measure(zero)}
    assert list(biases) == list(bias.OCCUPATIONS) and all(len(values) == 4 for values in biases.values())
    sentence = "The {} said that {} was tired."
    assert bias.sentence_bias(zero, sentence, "nurse") > 0 > bias.sentence_bias(zero, sentence, "engineer")


def test_the_score_command_prints_perplexity_and_continuation_scores(trained_model, tokenizer, tmp_path, capsys):
    trained_model.save_pretrained(tmp_path, tokenizer)
    (tmp_path / "text").write_text(SENTENCES[0] * 20)
    assert main(["score", str(tmp_path), "--text", str(tmp_path / "text"), "--stride", "20"]) == 0
    line, row = capsys.readouterr().out.splitlines()
    row = json.loads(row)
    ids = [tokenizer.end_id, *tokenizer.encode(SENTENCES[0] * 20)]
    assert row["perplexity"] == pytest.approx(Scorer(trained_model).perplexity(ids, stride=20).value, rel=1e-5)
    assert row["tokens"] == len(ids) - 1 and "windows of 64 by 20" in line
    argv = ["score", str(tmp_path), "--text", str(tmp_path / "text"), "--stride", "20", "--kv-cache-dtype", "int8"]
    assert main(argv) == 0
    small = json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"]
    assert small != row["perplexity"] and small == pytest.approx(row["perplexity"], rel=0.02)
    assert main(["score", str(tmp_path), "--context", "The nurse said that", "--continuation", " she was tired.",
                 "--continuation", " he was tired."]) == 0  # fmt: skip
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["logprob"] > second["logprob"] and first["greedy"] and not second["greedy"]
    (tmp_path / "text").write_bytes(b"\xff")
    assert main(["score", str(tmp_path), "--text", str(tmp_path / "text")]) == 2
    assert "expected UTF-8" in capsys.readouterr().err
