"""Evaluation files: JSON lines, JSON, prompt files, and text."""

import json

import pytest

from peakgpt.engine.evaluation.example_file import read_examples

ROW = {"question": "Why?", "n": 3, "choices": ["a b", {"text": "c"}], "none": None}


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder / name


def test_every_format_gives_its_examples(tmp_path):
    path = write(tmp_path, "a.jsonl", f"{json.dumps(ROW)}\n\n{json.dumps({'question': 'Who?'})}\n")
    assert read_examples(path) == [(f"{path}:1", "Why?\na b\nc"), (f"{path}:3", "Who?")]
    assert read_examples(path, "question") == [(f"{path}:1", "Why?"), (f"{path}:3", "Who?")]
    path = write(tmp_path, "a.json", [ROW, {"question": "Who?"}])
    assert read_examples(path, "question") == [(f"{path}:1", "Why?"), (f"{path}:2", "Who?")]
    path = write(tmp_path, "prompt.json", {"input": "milk", "examples": [["cheese", "fromage"]], "instruction": "x"})
    assert read_examples(path) == [(f"{path}:examples[0]", "cheese\nfromage"), (f"{path}:input", "milk")]
    path = write(tmp_path, "a.txt", "first line\n\n second line")
    assert read_examples(path) == [(f"{path}:1", "first line"), (f"{path}:3", " second line")]


@pytest.mark.parametrize(("name", "content", "field", "message"), [
    ("a.jsonl", "{}\n{", None, r"^evaluation file .*a\.jsonl:2: got .*, expected JSON"),
    ("a.jsonl", "[1]", None, r"a\.jsonl:1: got list, expected an object"),
    ("a.jsonl", '{"b": 1}', "a", r"a\.jsonl:1: got fields b, expected text in 'a'"),
    ("a.json", {"input": "x"}, "a", r"got --eval-field 'a', expected it only for files of objects"),
    ("a.json", {"output": "x"}, None, r"a\.json: got .*, expected an object with input"),
    ("a.txt", "x", "a", r"got --eval-field 'a'"),
])  # fmt: skip
def test_damaged_file_is_one_sentence(name, content, field, message, tmp_path):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        read_examples(path, field)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^evaluation file .*none\.jsonl: No such file"):
        read_examples(tmp_path / "none.jsonl")
