"""Prompt files: the prompts of text and JSON files, and errors that name the file."""

import json
import os

import pytest

from peakgpt.engine.inference.prompt_file import read_prompt


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"input": "milk"}, "milk\n"),
        ({"input": "milk", "output_prefix": "French:"}, "milk\nFrench:"),
        (
            {"instruction": "Translate.", "examples": [["cheese", "fromage"]], "input": "milk", "input_prefix": "E: ",
             "output_prefix": "F:"},
            "Translate.\n\nE: cheese\nF: fromage\n\nE: milk\nF:",
        ),
        ({"examples": [["1", "2"], ["3", "4"]], "input": "5", "separator": "\n"}, "1\n2\n3\n4\n5\n"),
        ({"examples": [["1", "2"]], "input": "5", "output_prefix": "\t", "separator": ";"}, "1\n\t2;5\n\t"),
    ],
)  # fmt: skip
def test_json_files_become_few_shot_prompts(value, expected, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**value, "stop": ["\n"]}))
    assert read_prompt(path) == (expected, ("\n",))


def test_text_files_are_the_prompt_without_one_final_newline(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text('{"input": 1}\n\n')
    assert read_prompt(path) == ('{"input": 1}\n', ())


@pytest.mark.parametrize(
    "text",
    ['{"input": 1}', "{}", "[]", "{", '{"input": "a", "shots": []}', '{"input": "a", "examples": [["b"]]}',
     '{"input": "a", "stop": [""]}', '{"input": "a", "examples": 3}', "[" * 100_000, '{"input":' * 100_000,
     "1" * 5000],
)  # fmt: skip
def test_malformed_files_raise_with_the_name_of_the_file(text, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"prompt file .*p\.json: "):
        read_prompt(path)


def test_what_never_ends_or_cannot_be_read_raises_with_the_name_of_the_file(tmp_path):
    for suffix in ("", ".json"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        for path in (tmp_path / f"pipe{suffix}", "/dev/zero", tmp_path, tmp_path / f"missing{suffix}"):
            with pytest.raises(ValueError, match=f"prompt file {path}: "):
                read_prompt(path)
