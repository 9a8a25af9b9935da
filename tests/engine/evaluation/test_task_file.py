"""Task files: BIG-bench's JSON, the same as JSON lines, and the tasks of examples/tasks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from peakgpt.engine.evaluation.example_file import read_examples
from peakgpt.engine.evaluation.metrics import Answer, metrics_of
from peakgpt.engine.evaluation.task import Example, Shots, Task
from peakgpt.engine.evaluation.task_file import read_task

SHIPPED = sorted((Path(__file__).parents[3] / "examples" / "tasks").iterdir())
ROWS = [{"input": "1 + 1", "target": ["2", "two"]}, {"input": "2 + 2", "target": "4", "id": 7}]
CHOICE = {"input": "Is it?", "target_scores": {"yes": 1, "no": 0, "maybe": 0.5}}


def write(folder, name, content):
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(content))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_prompts_have_the_defaults_of_big_bench(tmp_path):
    """Choices are appended in an order that depends on the question only."""
    task = read_task(write(tmp_path, "t.json", {"metrics": ["multiple_choice_grade"], "examples": [CHOICE, CHOICE]}))
    (example, _), question = task.examples, task.question(task.examples[0])
    assert example.targets == ("yes",) and example.target_scores == CHOICE["target_scores"]
    head, *choices = question.removesuffix("\nA: ").split("\n  choice: ")
    assert head == "\nQ: Is it?" and sorted(choices) == ["maybe", "no", "yes"]
    assert task.prompt(example, [example]) == f"{question}yes\n{question}"
    assert task.answer_of(" yes. And more\nno") == "yes"
    orders = {tuple(task.question(replace(example, input=str(i))).split("choice: ")[1:]) for i in range(20)}
    assert len(orders) > 3


def test_json_lines_are_the_same_task(tmp_path):
    """A first line without an input has the settings; blank lines count."""
    settings = {"name": "sums", "metrics": ["exact_str_match", "rouge", "bleurt"], "preferred_score": "rougeLsum",
                "stop_string": "\n", "human_baseline": 0.9, "task_prefix": "Add.", "keywords": ["x"]}  # fmt: skip
    whole = read_task(write(tmp_path, "a.json", {**settings, "examples": ROWS, "shots": ROWS}))
    path = write(tmp_path, "a.jsonl", [{**settings, "shots": ROWS}, *ROWS])
    path.write_text(path.read_text().replace("\n", "\n\n", 1))
    lines = read_task(path)
    assert [example.name for example in lines.examples] == [f"{path}:3", f"{path}:4"]
    assert [example.name for example in whole.examples] == [f"{tmp_path}/a.json examples[{i}]" for i in range(2)]
    nameless = [replace(task, examples=tuple(replace(e, name="") for e in task.examples),
                        shots=tuple(replace(e, name="") for e in task.shots)) for task in (whole, lines)]  # fmt: skip
    assert nameless[0] == nameless[1]
    assert lines.metrics == ("exact_str_match", "rouge1", "rouge2", "rougeLsum")
    assert lines.not_computed == ("bleurt",) and lines.human_baseline == {"rougeLsum": 0.9}
    assert [text for _, text in read_examples(path)] == ["1 + 1\n2\ntwo", "2 + 2\n4"]
    assert len(read_examples(tmp_path / "a.json")) == 2


def test_a_file_without_settings_has_defaults(tmp_path):
    task = read_task(write(tmp_path, "sums.jsonl", ROWS))
    assert (task.name, task.metrics, task.examples[0].targets) == ("sums", ("exact_match",), ("2", "two"))
    assert read_task(write(tmp_path, "c.jsonl", [CHOICE])).metrics == ("acc",)


def test_choices_of_the_task_are_those_of_each_example(tmp_path):
    rows = [{"metrics": ["acc"], "choices": ["a", "b"]}, {"input": "x", "target": "b"}]
    assert read_task(write(tmp_path, "t.jsonl", rows)).examples[0].target_scores == {"a": 0.0, "b": 1.0}


HEAD = {"metrics": ["acc"]}


@pytest.mark.parametrize(("name", "content", "message"), [
    ("t.txt", [], "got a suffix '.txt', expected one of .json, .jsonl, .ndjson"),
    ("t.jsonl", [], "t.jsonl: got an empty file"),
    ("t.jsonl", [{"metrics": ["acc"]}], "t.jsonl:1: got no examples, expected at least one"),
    ("t.jsonl", [[1]], "t.jsonl:1: got list, expected a JSON object a line"),
    ("t.jsonl", [{"question": "x"}], "t.jsonl:1: got fields question, expected text in the field 'input'"),
    ("t.jsonl", [ROWS[0], {"input": " ", "target": "x"}], "t.jsonl:2: got input=' ', expected text"),
    ("t.jsonl", [{"input": "x"}], "t.jsonl:1: got fields input, expected 'target' or 'target_scores'"),
    ("t.jsonl", [{"input": "x", "target": 3}], "t.jsonl:1: got target 3, expected texts"),
    ("t.jsonl", [{"input": "x", "target": []}], "t.jsonl:1: got an empty list in 'target'"),
    ("t.jsonl", [{"input": "x", "target": ["a", ""]}], "got target ['a', ''], expected texts, none of them empty"),
    ("t.jsonl", [{"input": "x", "target_scores": {"a": 1}}], "t.jsonl:1: got target_scores {'a': 1}, expected"),
    ("t.jsonl", [{"input": "x", "target_scores": {"a": 0, "b": 0}}], "one of them above 0"),
    ("t.jsonl", [{**HEAD, "choices": ["a", "b"]}, {"input": "x", "target": "c"}], "t.jsonl:2: got target 'c'"),
    ("t.jsonl", [{"input": "x", "target": "y", "rationale": 1}], "t.jsonl:1: got rationale=1, expected text"),
    ("t.jsonl", [{**HEAD, "stop": "x"}, CHOICE], "t.jsonl:1: got the field 'stop', expected only append_choices"),
    ("t.jsonl", [{"metrics": ["accuracy"]}, CHOICE], "t.jsonl:1: got metric 'accuracy', expected one of acc, acc_norm"),
    ("t.jsonl", [{"metrics": ["bleurt"]}, CHOICE], "t.jsonl:1: got metrics bleurt, expected one of acc"),
    ("t.jsonl", [{**HEAD, "preferred_score": "bleu"}, CHOICE], "got preferred_score 'bleu', expected one of acc"),
    ("t.jsonl", [{**HEAD, "human_baseline": {"bleu": 1}}, CHOICE], "got human_baseline {'bleu': 1}, expected a number"),
    ("t.jsonl", [{**HEAD, "max_tokens": True}, CHOICE], "got max_tokens=True, expected an integer of at least 1"),
    ("t.jsonl", [{**HEAD, "task_prefix": 1}, CHOICE], "got task_prefix=1, expected text"),
    ("t.jsonl", [{**HEAD, "append_choices_to_input": 1}, CHOICE], "expected true or false"),
    ("t.jsonl", [{**HEAD, "output_regex": "("}, CHOICE], "got output_regex '(': "),
    ("t.jsonl", [{**HEAD, "output_regex": "(a)(b)"}, CHOICE], "with 2 groups, expected at most one"),
    ("t.jsonl", [{**HEAD, "shots": 3}, CHOICE], "t.jsonl:1 shots: got 3, expected a list of examples"),
    ("t.jsonl", [{**HEAD, "shots": [{"input": "x"}]}, CHOICE], "t.jsonl:1 shots[0]: got fields input"),
    ("t.json", [ROWS], "t.json: got [[{"),
    ("t.json", {"metrics": ["acc"]}, "t.json: got fields metrics, expected a list in 'examples'"),
    ("t.json", {"examples": [CHOICE, {}]}, "t.json examples[1]: got fields , expected text in the field 'input'"),
])  # fmt: skip
def test_wrong_files_are_one_sentence_with_the_place(name, content, message, tmp_path):
    with pytest.raises(ValueError) as error:
        read_task(write(tmp_path, name, content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_damaged_json_is_named_with_its_line(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"input": "x", "target": "y"}\n{"input": ')
    with pytest.raises(ValueError, match=r"t\.jsonl:2: got .*, expected a JSON object a line$"):
        read_task(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match=r"none\.json: No such file"):
        read_task(tmp_path / "none.json")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_right_answers_score_fully_in_the_shipped_tasks(path):
    """Each text that a shot would show, cut at the stop string, is recognized as the right answer."""
    task = read_task(path)
    answers = []
    for example in (*task.examples, *task.shots):
        answer = example.shown_answer if example.rationale or not task.shots else f"The answer is {example.targets[0]}."
        text = f" {answer}"
        cut = min((text.find(stop) for stop in task.stop_string if stop in text), default=len(text))
        answers.append(Answer(example, "", example.target_scores, (text,), (), task.answer_of(text[:cut])))
    for name, metric in metrics_of(task).items():
        assert metric.estimate(answers, 0).value == pytest.approx(100 if name in ("bleu", "chrf") else 1), name


def test_metrics_of_choices_need_choices(tmp_path):
    task = read_task(write(tmp_path, "t.jsonl", [CHOICE, ROWS[0]]))
    assert list(metrics_of(task)) == ["exact_match"]
    with pytest.raises(ValueError, match=r"t\.jsonl:2: got no target_scores, expected choices for the metric acc$"):
        metrics_of(task, "multiple_choice")


# ---- shots


def make_task(**fields):
    examples = tuple(Example(str(i), f"question {i}", (f"answer {i}",)) for i in range(8))
    return Task(name="t", examples=examples, metrics=("exact_match",), preferred_score="exact_match", **fields)


def test_shots_are_equal_for_all_questions_except_those_that_are_shown():
    """A question never shows its own answer; another seed draws other shots."""
    task = make_task()
    shots = Shots(task.examples, 3, seed=1)
    names = lambda shots: [tuple(shot.name for shot in shots.of(example)) for example in task.examples]  # noqa: E731
    drawn = names(shots)
    usual = max(drawn, key=drawn.count)
    for example, found in zip(task.examples, drawn, strict=True):
        assert len(set(found)) == 3 and example.name not in found
        assert (found == usual) == (example.name not in usual)
    assert drawn.count(usual) == 5
    assert names(Shots(task.examples, 3, seed=2)) != drawn == names(Shots(task.examples, 3, seed=1))


def test_too_few_shots_are_refused():
    task = make_task()
    same = (replace(task.examples[0], name="again"), task.examples[1])
    with pytest.raises(ValueError, match=r"^0: got 1 examples of other questions, expected --shots 2 of them$"):
        Shots(same, 2, seed=0).check(task.examples)


def test_chats_have_a_message_for_each_question_and_answer():
    task = make_task(task_prefix="Answer.\n\n", example_input_prefix="Q: ", example_output_prefix="\nA: ")
    shot = replace(task.examples[1], rationale="Because. answer 1")
    assert task.messages(task.examples[0], [shot]) == [
        {"role": "user", "content": "Answer.\n\nQ: question 1\nA:"},
        {"role": "assistant", "content": "Because. answer 1"},
        {"role": "user", "content": "Q: question 0\nA:"},
    ]
    assert task.messages(task.examples[0]) == [{"role": "user", "content": "Answer.\n\nQ: question 0\nA:"}]
