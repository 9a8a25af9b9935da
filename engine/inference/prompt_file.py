"""Prompt files: zero-, one- and few-shot prompts, as text or JSON.

A file whose name ends in .json holds

    {"instruction": "Translate to French.",
     "examples": [["cheese", "fromage"], ["bread", "pain"]],
     "input": "milk",
     "input_prefix": "English: ", "output_prefix": "French:", "separator": "\\n\\n", "stop": ["\\n"]}

and becomes the instruction, each example with its answer, and the input whose answer is to come, by the separator. Only
"input" must be there: without examples it is zero-shot. Any other file is the prompt as it stands, but for one newline
at its end. Brown et al. 2020, "Language Models are Few-Shot Learners", arXiv:2005.14165, section 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Shots:
    """An instruction, solved examples, and the input to solve.

    Raises:
        ValueError: a value of another type.
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
        if not _strings(self.stop) or not all(self.stop):
            raise ValueError(f"prompt file: stop is {self.stop!r}, expected strings, none of them empty")
        listed = isinstance(self.examples, list | tuple)
        if not listed or not all(_strings(pair) and len(pair) == 2 for pair in self.examples):
            raise ValueError(f"prompt file: examples are {self.examples!r}, expected pairs of input and output")

    @property
    def prompt(self) -> str:
        """What the model is to continue; a blank parts the output's prefix from an answer, where none ends it."""
        apart = " " if self.output_prefix.rstrip() == self.output_prefix != "" else ""
        asked = lambda text: f"{self.input_prefix}{text}\n{self.output_prefix}"  # noqa: E731
        solved = [asked(text) + apart + answer for text, answer in self.examples]
        return self.separator.join([*([self.instruction] if self.instruction else ()), *solved, asked(self.input)])


def read_prompt(path: Path | str) -> tuple[str, tuple[str, ...]]:
    """The prompt of a file, and strings that end its continuation.

    Raises:
        ValueError: not text, or JSON of another shape; the message names the file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return text.removesuffix("\n"), ()
        value = json.loads(text)
        known = {f.name for f in fields(Shots)}
        if not isinstance(value, dict) or "input" not in value or not set(value) <= known:
            raise ValueError(f"got {str(value)[:80]}, expected an object with input, of {', '.join(sorted(known))}")
        shots = Shots(**value)
    except (OSError, ValueError) as error:
        raise ValueError(f"prompt file {path}: {error}") from None
    return shots.prompt, tuple(shots.stop)


def _strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
