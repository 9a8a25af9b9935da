"""Validation: exact means over held-out tokens, samples, the best validation and early stopping."""

import json
import math

import pytest
import torch

from peakgpt.engine.data.dataset import Dataset, TrainingData
from peakgpt.engine.data.shard_writer import write_shards
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.held_out import held_out_sets, prepare_held_out
from peakgpt.engine.training.validation import Validator, evaluate
from peakgpt.engine.training.validation_config import ValidationConfig

TEXT = "the cat sat on the mat, and the dog sat by the door of the house. " * 8


def stream(folder, count, name="validation", vocab_size=67):
    ids = [(5 * i * i + i // 3) % vocab_size for i in range(count)]
    write_shards(folder, name, [ids], vocab_size, text_bytes=3 * count, corpus_digest="d")
    return TokenShards.open(folder, name)


def tiny(vocab_size=67, dropout=0.5):
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=vocab_size, dropout=dropout))


def validator(model, *sets, tokenizer=None, **settings):
    named = {f"set{number}": shards for number, shards in enumerate(sets)}
    return Validator(model, named, ValidationConfig(**settings), batch=3, tokens=16, tokenizer=tokenizer, seed=7)


@pytest.mark.parametrize("count", [2, 9, 17, 49, 50, 97, 333])
def test_the_loss_is_the_mean_over_every_token(tmp_path, count):
    """Against one window at a time in float64. Fails if the last window or batch is left out, or weighs too much."""
    model, shards = tiny(), stream(tmp_path, count)
    found = evaluate(model.eval(), shards, 3, 16)
    ids = torch.tensor([(5 * i * i + i // 3) % 67 for i in range(count)])
    total = 0.0
    for start in range(0, count - 1, 16):
        window = ids[start : start + 17]
        logits = model.double()(window[None, :-1])[0].detach()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        model.float()
    assert found.tokens == count - 1
    assert found.loss == pytest.approx(total / (count - 1), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / 3)


def test_a_validation_changes_neither_the_mode_nor_the_random_state_and_uses_no_dropout(tmp_path):
    model, tokenizer = tiny(300), train_tokenizer([TEXT], 300)
    sets = (stream(tmp_path, 100, vocab_size=300), stream(tmp_path, 40, "other", vocab_size=300))
    evaluated = validator(model.train(), *sets, tokenizer=tokenizer, prompts=("the ",), sample_tokens=12)
    state = torch.get_rng_state()
    first, second = evaluated.validate(5), evaluated.validate(5)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert first.sets == second.sets and first.samples == second.samples and first.sets["set1"].tokens == 39
    assert first.samples[0].prompt == "the " and first.samples[0].text
    row = json.loads(json.dumps(first.row()))
    assert row["samples"] == [{"prompt": "the ", "text": first.samples[0].text}]
    assert row["validation_loss"] == first.loss and row["set1/validation_loss"] == first.sets["set1"].loss


def test_samples_are_those_of_generate(tmp_path):
    model, tokenizer = tiny(300), train_tokenizer([TEXT], 300)
    evaluated = validator(model, stream(tmp_path, 40, vocab_size=300), tokenizer=tokenizer, prompts=("the cat",),
                          sample_tokens=9, sample_temperature=0.0)  # fmt: skip
    ids = torch.tensor([tokenizer.encode("the cat")])
    expected = model.eval().generate(ids, max_new_tokens=9, eos_token_id=tokenizer.end_id)[0, ids.shape[1] :]
    # Of a checkpoint that training began with: the settings of the run win.
    model.source_files = {"generation_config.json": {"do_sample": True, "temperature": 5.0, "num_beams": 3}}
    kept = [i for i in expected.tolist() if i != tokenizer.end_id]
    assert evaluated.validate(1).samples[0].text == tokenizer.decode(kept)


def observe(evaluated, losses):
    return [evaluated._observe(step, loss) for step, loss in enumerate(losses, 1)]


def test_the_best_validation_is_the_lowest_and_survives_a_resume(tmp_path):
    losses = [3.0, 2.5, 2.6, 2.5, 2.4]
    whole = validator(tiny(), stream(tmp_path, 40))
    assert observe(whole, losses) == [True, True, False, False, True] and (whole.best_loss, whole.best_step) == (2.4, 5)
    first, second = validator(tiny(), *whole.sets.values()), validator(tiny(), *whole.sets.values())
    assert first.state_dict()["best_loss"] is None
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.best_loss == math.inf
    observe(first, losses[:3])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() and not second._observe(4, 2.5) and second._observe(5, 2.4)
    for state in ({}, {**first.state_dict(), "waited": 1.5}, {**first.state_dict(), "more": 1}):
        with pytest.raises(ValueError, match="validation state"):
            second.load_state_dict(state)


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "stops_after"),
    [
        (None, 0.0, [3.0] * 9, None),
        (2, 0.0, [3.0, 2.0, 2.1, 2.0, 1.0], 4),
        (2, 0.0, [3.0, 3.1, 2.9, 3.0, 2.8], None),
        (2, 0.5, [3.0, 2.9, 2.8, 2.7], 3),
        (3, 0.5, [3.0, 2.8, 2.6, 2.4, 2.3, 2.2, 2.1], 7),  # small steps that add up to min_delta count
    ],
)
def test_early_stopping_waits_for_patience_validations_without_min_delta(
    tmp_path, patience, min_delta, losses, stops_after
):
    evaluated = validator(tiny(), stream(tmp_path, 40), patience=patience, min_delta=min_delta)
    stopped = None
    for step, loss in enumerate(losses, 1):
        evaluated._observe(step, loss)
        stopped = stopped or (step if evaluated.should_stop else None)
    assert stopped == stops_after


def test_bad_input_is_refused_before_the_training(tmp_path):
    shards, tokenizer = stream(tmp_path, 40), train_tokenizer([TEXT], 300)
    with pytest.raises(ValueError, match="got no held-out set"):
        Validator(tiny(), {}, ValidationConfig(), batch=3, tokens=16)
    with pytest.raises(ValueError, match="got 1 tokens, expected at least 2"):
        validator(tiny(), stream(tmp_path / "one", 1))
    with pytest.raises(ValueError, match="prompts without a tokenizer"):
        validator(tiny(), shards, prompts=("x",))
    for prompt in ("", TEXT):
        with pytest.raises(ValueError, match=r"prompts: .* tokens, expected 1 to 31"):
            validator(tiny(300), shards, tokenizer=tokenizer, prompts=(prompt,))
    for text in ("wiki", "=a", "a b=c", "validation=x"):
        with pytest.raises(ValueError, match=f"validation_sets has '{text}', expected NAME=PATH"):
            ValidationConfig(validation_sets=(text,))
    with pytest.raises(ValueError, match=r"min_delta is 0.1 without patience"):
        ValidationConfig(min_delta=0.1)
    model = tiny()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 3: the loss on set0 is nan"):
        validator(model, shards).validate(3)


def test_held_out_sets_are_text_files_or_prepared_folders(tmp_path):
    tokenizer, tokens = train_tokenizer([TEXT], 300), tmp_path / "tokens"
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    size = tokenizer.vocab_size
    own = Dataset("run", stream(tokens, 90, "train", size), stream(tokens, 50, vocab_size=size), tokenizer)
    stream(tmp_path / "good", 40, vocab_size=size)
    stream(tmp_path / "other", 40)
    paths = {"a": str(tmp_path / "a.txt"), "b": str(tmp_path / "good")}
    prepare_held_out(paths, tokenizer, tokens)
    sets = held_out_sets(TrainingData([own]), paths, tokens)
    assert {name: len(shards) for name, shards in sets.items()} == {
        "validation": 50, "a": len(tokenizer.encode(TEXT)) + 1, "b": 40,
    }  # fmt: skip
    for path, text in (("none.txt", "No such file"), ("empty.txt", "is empty")):
        with pytest.raises(ValueError, match=text):
            prepare_held_out({"c": str(tmp_path / path)}, tokenizer, tokens)
    with pytest.raises(ValueError, match="expected a folder of tokens"):
        prepare_held_out(paths, None, tokens)
    with pytest.raises(ValueError, match="another tokenizer"):
        held_out_sets(TrainingData([own]), {"c": str(tmp_path / "other")}, tokens)
