"""From rows to sequences and labels: the layout of each task, lengths, and bad input, named by file and line."""

import numpy as np
import pytest
import torch
from tiny_finetuning import make_config, rows_of, write_base

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.finetuning.example_batches import ExampleBatches
from peakgpt.engine.finetuning.examples import Examples, write_examples
from peakgpt.engine.finetuning.label_metrics import class_metrics, score_metrics
from peakgpt.engine.finetuning.rows import Row
from peakgpt.engine.finetuning.sequences import shortened, unpack
from peakgpt.engine.finetuning.tasks.catalogue import TASKS
from peakgpt.engine.finetuning.tasks.label_config import LABEL_TASKS
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

A, B, C = "the film was good", "the song was sad", "a book"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


def make_task(base, name, rows=None, **settings):
    """A task that has learned the labels of rows."""
    task = TASKS[name](make_config(base, name, **settings), Tokenizer.load(base))
    task.learn(places(rows_of(name) if rows is None else rows))
    return task


def places(rows):
    return [Row(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, 1)]


def encode(task, row):
    """The sequences of one row, and its label."""
    (example,) = task.encode(places([row]))
    return [sequence.tolist() for sequence in unpack(example)], example["label"].tolist()


def ids_of(task, *texts):
    return [Tokenizer.load(task.config.task.init).encode(text) for text in texts]


def test_classification_is_start_text_extract(base):
    task = make_task(base, "classification")
    (ids,), t = ids_of(task, A), task.tokens
    assert task.labels.names == ("bad", "good")
    assert encode(task, {"text": A, "label": "good"}) == ([[t.start, *ids, t.extract]], [1])


def test_entailment_has_a_delimiter_between_premise_and_hypothesis(base):
    task = make_task(base, "entailment")
    (first, second), t = ids_of(task, A, B), task.tokens
    found = encode(task, {"premise": A, "hypothesis": B, "label": 1})
    assert found == ([[t.start, *first, t.delimiter, *second, t.extract]], [1])


def test_similarity_has_both_orders(base):
    task = make_task(base, "similarity")
    (first, second), t = ids_of(task, A, B), task.tokens
    assert task.is_regression and task.labels.outputs == 1
    assert encode(task, {"sentence1": A, "sentence2": B, "label": 2}) == (
        [[t.start, *first, t.delimiter, *second, t.extract], [t.start, *second, t.delimiter, *first, t.extract]], [2.0],
    )  # fmt: skip
    with_classes = make_task(base, "similarity", [{"sentence1": A, "sentence2": B, "label": i % 2} for i in range(4)])
    assert with_classes.labels.names == ("0", "1")


def test_multiple_choice_has_a_sequence_for_each_answer(base):
    task = make_task(base, "multiple-choice")
    (context, first, second), t = ids_of(task, f"{A} {C}", B, C), task.tokens
    row = {"context": A, "question": C, "choices": [B, C], "label": 1}
    expected = [[t.start, *context, t.delimiter, *choice, t.extract] for choice in (first, second)]
    assert encode(task, row) == (expected, [1])
    ids, lengths, labels = task.collate(task.encode(places([row, {"context": A, "choices": [A, B, C], "label": 2}])))
    assert ids.shape[:2] == (2, 3) and lengths[0, 2] == 0 and labels.tolist() == [1, 2]
    assert (ids[0, 2] == t.pad).all()


def test_a_word_has_its_label_at_its_last_token(base):
    task = make_task(base, "token-classification")
    words, labels = ["the", "gargoyle", "New York", "was"], ["D", "N", "N", "V"]
    (sequence,), found = encode(task, {"tokens": words, "label": labels})
    assert sequence == [task.tokens.start, *ids_of(task, " ".join(words))[0]]
    ends = [i for i, label in enumerate(found) if label != -100]
    texts = [task.tokenizer.decode(sequence[i + 1 : j + 1]) for i, j in zip([0, *ends], ends, strict=False)]
    assert [text.strip() for text in texts] == words
    assert [task.labels.names[found[i]] for i in ends] == labels


def test_other_fields_and_unlabelled_rows(base):
    task = make_task(base, "entailment", [{"a": A, "b": B, "y": label} for label in "nynyny"],
                     text_fields=("a", "b"), label_field="y")  # fmt: skip
    assert encode(task, {"a": A, "b": B, "y": "y"})[1] == [1]
    (example,) = task.encode(places([{"a": A, "b": B}]), labelled=False)
    assert example["label"].tolist() == [0]


@pytest.mark.parametrize("name", LABEL_TASKS)
def test_the_label_of_an_example_is_that_of_its_row(name, base):
    rows = rows_of(name)
    task = make_task(base, name, rows)
    shown = [task.label(example) for example in task.encode(places(rows))]
    assert shown == [row["label"] if name != "entailment" else str(row["label"]) for row in rows]


def test_long_examples_are_cut_when_asked(base):
    task = make_task(base, "entailment", tokens=16, truncate=True)
    (sequence,), _ = encode(task, {"premise": f"{A} {A} {A}", "hypothesis": C, "label": 1})
    (first, second), t = ids_of(task, f"{A} {A} {A}", C), task.tokens
    assert sequence == [t.start, *first[: 13 - len(second)], t.delimiter, *second, t.extract] and len(sequence) == 16
    task = make_task(base, "token-classification", tokens=8, truncate=True)
    rows = places([{"tokens": ["the"] * 20, "label": ["D"] * 20}])
    (example,) = task.encode(rows)
    whole_words = task.tokenizer.decode(example["ids"][1:].tolist()).split()
    assert len(example["ids"]) == 8 and task.label(example) == ["D"] * len(whole_words)


def test_a_cut_that_leaves_nothing_to_learn_is_an_error_with_its_line(base):
    task = make_task(base, "token-classification", tokens=2, truncate=True)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: got no whole word in the first 2 tokens"):
        encode(task, {"tokens": ["gargoyles"], "label": ["N"]})
    task = make_task(base, "classification", tokens=2, truncate=True)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: got tokens 2, expected at least 3"):
        encode(task, {"text": A, "label": "good"})


def test_words_that_share_their_last_token_are_refused(base, monkeypatch):
    task = make_task(base, "token-classification")
    monkeypatch.setattr(task.tokenizer, "encode_with_offsets", lambda texts: [([5, 6], [(0, 3), (3, 7)])])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: got the word 'b', expected one that has"):
        encode(task, {"tokens": ["the", "a", "b"], "label": ["D", "N", "N"]})


@pytest.mark.parametrize("name", LABEL_TASKS)
def test_the_speed_of_a_run_counts_the_tokens_of_all_sequences(name, base, tmp_path):
    task = make_task(base, name)
    write_examples(tmp_path / "rows.safetensors", task.encode(places(rows_of(name))))
    batches = ExampleBatches(Examples.open(tmp_path / "rows.safetensors"), task, 5, 0)
    _, lengths, _ = next(batches)
    assert batches.tokens_seen == int(lengths.sum())


def test_a_run_that_begins_again_has_the_same_new_embeddings(tmp_path):
    """Its tokenizer has the added tokens already; the checkpoint has more embeddings than tokens."""
    tokenizer = write_base(tmp_path)
    count = tokenizer.vocab_size
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 48}
    source = GPT(GPTConfig(vocab_size=count + 64, **sizes))
    task = make_task(tmp_path, "classification")
    again = TASKS["classification"](task.config, task.tokenizer, task.state_dict())
    models = []
    for each in (task, again):
        torch.manual_seed(1)
        models.append(each.model(source).gpt.transformer.wte.weight)
    assert torch.equal(*models) and not torch.equal(models[0][count], source.transformer.wte.weight[count])


def test_the_longest_text_is_cut_first():
    assert shortened([[1] * 9, [2] * 3], 8) == [[1] * 5, [2] * 3]
    assert shortened([[1] * 9, [2] * 8], 5) == [[1] * 3, [2] * 2]
    assert shortened([[1], [2]], 8) == [[1], [2]]
    with pytest.raises(ValueError, match="room for 1 tokens of 2 texts"):
        shortened([[1], [2]], 1)


BAD = {  # name: (task, row in line 3 of otherwise good rows, the error)
    "no text": ("classification", {"label": "good"}, r"rows.jsonl:3: got fields label, expected text in 'text'"),
    "no label": ("classification", {"text": A}, r"rows.jsonl:3: got fields text, expected a label in 'label'"),
    "a number as text": ("classification", {"text": 3, "label": "good"}, r":3: got text=3, expected text in 'text'"),
    "null as label": ("classification", {"text": A, "label": None}, r":3: got label None, expected text or a number"),
    "the only one": ("classification", {"text": A, "label": "new"}, r":3: got the only example of label 'new'"),
    "no hypothesis": ("entailment", {"premise": A, "label": 1}, r":3: got fields premise, label, expected text in"),
    "text as score": ("similarity", {"sentence1": A, "sentence2": B, "label": "x"}, r":3: got label 'x', expected a n"),
    "one choice": ("multiple-choice", {"context": A, "choices": [B], "label": 0}, r":3: got \['the song was sad'\], "),
    "label past the choices": (
        "multiple-choice", {"context": A, "choices": [B, C], "label": 2}, r":3: got label 2, expected the number of "
        "one of the 2 choices",
    ),
    "fewer labels": (
        "token-classification", {"tokens": ["a", "b"], "label": ["D"]}, r":3: got \['D'\], expected a list of 2 labels",
    ),
    "no words": ("token-classification", {"tokens": [], "label": []}, r":3: got \[\], expected a list of words"),
    "too long": (
        "classification", {"text": " ".join([A] * 20), "label": "good"}, r":3: got an example of \d+ tokens, expected "
        "at most 48: --truncate cuts it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_by_file_and_line(case, base):
    name, row, message = BAD[case]
    rows = rows_of(name)
    rows[2] = row
    with pytest.raises(ValueError, match=message):
        make_task(base, name, rows).encode(places(rows))


def test_a_label_that_training_has_not_seen_is_named(base):
    task = make_task(base, "classification")
    message = "rows.jsonl:1: got label 'ugly', expected one of the training examples: 'bad', 'good'"
    with pytest.raises(ValueError, match=message):
        task.encode(places([{"text": A, "label": "ugly"}]))


def test_one_class_and_wrong_fields_are_refused(base):
    with pytest.raises(ValueError, match="got label 'x' in all examples, expected two classes or more"):
        make_task(base, "classification", [{"text": A, "label": "x"}] * 3)
    with pytest.raises(ValueError, match=r"got label 1\.5 in all examples, expected two values"):
        make_task(base, "similarity", [{"sentence1": A, "sentence2": B, "label": 1.5}] * 3)
    with pytest.raises(ValueError, match="text_fields are a, expected 2 for task entailment"):
        make_task(base, "entailment", text_fields=("a",)).encode(places(rows_of("entailment")))
    with pytest.raises(ValueError, match="problem_type: got it with task multiple-choice"):
        make_config(base, "multiple-choice", problem_type="regression")
    with pytest.raises(ValueError, match="lm_loss_weight: got it with task sft"):
        make_config(base, "sft", lm_loss_weight=0.1)


def test_defaults_are_the_papers(base):
    config = make_config(base, "classification")
    train = config.train
    assert (train.lr, train.batch, train.epochs, train.warmup) == (6.25e-5, 32, 3.0, 0.002)
    assert (train.schedule, train.betas, train.weight_decay, train.max_norm) == ("linear", (0.9, 0.999), 0.01, 1.0)
    assert (config.labels.lm_loss_weight, config.labels.classifier_dropout) == (0.5, 0.1)


def test_metrics_of_known_predictions():
    """Matthews of a table with 2 true and 1 false positives, 1 false and 2 true negatives: (4 - 1) / 9."""
    found = class_metrics([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], 2)
    assert found == pytest.approx({"accuracy": 4 / 6, "f1_macro": 2 / 3, "matthews": 1 / 3, "f1": 2 / 3})
    assert "f1" not in class_metrics([0, 1, 2], [0, 1, 2], 3)
    found = score_metrics([1.0, 2.0, 3.0, 10.0], [1.0, 2.0, 3.0, 4.0])
    pearson = np.corrcoef([1, 2, 3, 10], [1, 2, 3, 4])[0, 1]
    assert found == pytest.approx({"pearson": pearson, "spearman": 1.0})
    assert score_metrics([1.0, 1.0], [1.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("name", LABEL_TASKS)
def test_validation_loss_is_the_mean_over_all_labels(name, base):
    """It does not depend on how the examples are split into batches."""
    task = make_task(base, name)
    torch.manual_seed(0)
    model = task.model(GPT.from_pretrained(base)).eval()
    examples = task.encode(places(rows_of(name)))
    batches = [task.collate(examples[i : i + 7]) for i in range(0, 24, 7)]
    with torch.no_grad():
        split, whole = task.evaluate(model, batches), task.evaluate(model, [task.collate(examples)])
        model.lm_loss_weight = 0.0
        expected = float(model(*task.collate(examples)))
    assert split.loss == pytest.approx(whole.loss, rel=1e-5) == pytest.approx(expected, rel=1e-5)
    assert split.tokens == (4 * 24 if name == "token-classification" else 24)
