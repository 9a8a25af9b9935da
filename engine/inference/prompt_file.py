"""Prompt files: zero-shot, one-shot and few-shot prompts, as text or JSON.

A file whose name ends in .json holds

    {"instruction": "Translate to French.",
     "examples": [["cheese", "fromage"], ["bread", "pain"]],
     "input": "milk",
     "input_prefix": "English: ", "output_prefix": "French:", "separator": "\\n\\n", "stop": ["\\n"]}

The prompt is the instruction, the examples with their answers, and the input without an answer, joined by the
separator. Only "input" is required; without examples the prompt is zero-shot. The text of any other file is the prompt,
without one newline at its end. Brown et al. 2020, "Language Models are Few-Shot Learners", arXiv:2005.14165, section 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from peakgpt.engine.data.text_file import read_text


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """The contents of a JSON prompt file: an instruction, examples with answers, and the input to answer.

    Raises:
        ValueError: a value of a wrong type.
    """

    input: str
    instruction: str = ""
    examples: list[list[str]] | tuple = ()
    input_prefix: str = ""
    output_prefix: str = ""
    separator: str = "\n\n"
    stop: list[str] | tuple = ()

    def __post_init__(self):
        for name in ("input", "instruction", "input_prefix", "output_prefix", "separator"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"prompt file: {name} is {getattr(self, name)!r}, expected a string")
        if not _is_strings(self.stop) or not all(self.stop):
            raise ValueError(f"prompt file: stop is {self.stop!r}, expected strings, none of them empty")
        is_list = isinstance(self.examples, list | tuple)
        if not is_list or not all(_is_strings(pair) and len(pair) == 2 for pair in self.examples):
            raise ValueError(f"prompt file: examples are {self.examples!r}, expected pairs of input and output")

    @property
    def prompt(self) -> str:
        """The text to continue. A space separates the output prefix from an answer unless the prefix ends in one."""
        space = " " if self.output_prefix.rstrip() == self.output_prefix != "" else ""
        question = lambda text: f"{self.input_prefix}{text}\n{self.output_prefix}"  # noqa: E731
        examples = [question(text) + space + answer for text, answer in self.examples]
        instruction = [self.instruction] if self.instruction else []
        return self.separator.join([*instruction, *examples, question(self.input)])


def read_prompt(path: Path | str) -> tuple[str, tuple[str, ...]]:
    """Read a prompt file.

    Returns:
        (prompt, stop): the text to continue, and the strings that end the continuation.
    Raises:
        ValueError: the file cannot be read, is not UTF-8, or is JSON of another structure; the message names the file.
    """
    if Path(path).suffix != ".json":
        return _read(path).removesuffix("\n"), ()
    contents = read_prompt_file(path)
    return contents.prompt, tuple(contents.stop)


def read_prompt_file(path: Path | str) -> PromptFile:
    """Read a prompt file of JSON.

    Raises:
        ValueError: as `read_prompt`.
    """
    text = _read(path)
    try:
        value = json.loads(text)
        known = {f.name for f in fields(PromptFile)}
        if not isinstance(value, dict) or "input" not in value or not set(value) <= known:
            expected = f"an object with input and no keys except {', '.join(sorted(known))}"
            raise ValueError(f"got {str(value)[:80]}, expected {expected}")
        return PromptFile(**value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"prompt file {path}: {error}") from None


def _read(path: Path | str) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise ValueError(f"prompt file {error}") from None


def _is_strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
