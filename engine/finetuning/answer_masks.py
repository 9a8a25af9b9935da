"""Which characters of a rendered conversation are answers of the model.

A template may mark them itself, with {% generation %} blocks. For any other template the answer i is what message i
adds to the text, behind the prompt that a generation would begin with:

    prompt_i = render(messages[:i], add_generation_prompt=True)      answer i: from len(prompt_i)
    until_i  = render(messages[: i + 1])                             to len(until_i), if both begin the whole text

A template that renders a turn differently once others follow, such as one that leaves out the reasoning of earlier
turns, breaks that. Then the text is rendered with a mark in place of each answer, and what surrounds the marks tells
where the answers are. The end of a turn, such as "<|im_end|>", belongs to its answer: the model has to learn to stop.
It is what the text behind the answer has in common with the text behind the last answer. The last answer still begins
behind its prompt: what a template writes there before its content, such as empty reasoning, has to be learned too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import tokenizers

from peakgpt.engine.data.chat_template import ChatTemplates
from peakgpt.engine.data.template_sandbox import Rendered
from peakgpt.engine.finetuning.conversations import Chat

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK = "PEAKGPT_ANSWER_{}_END"


def render_answers(chat: Chat, templates: ChatTemplates, *, is_all: bool) -> Rendered:
    """Render a conversation.

    Args:
        chat: the conversation.
        templates: of the tokenizer.
        is_all: the whole text is trained on, so that answers need not be found.
    Returns:
        The text, and where each answer with a loss begins and ends, in characters.
    Raises:
        ValueError: the template rejects the conversation, or its answers cannot be found.
    """
    whole = _render(chat, templates, len(chat.messages))
    if is_all:
        return Rendered(whole.text, [(0, len(whole.text))])
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if GENERATION.search(templates.select(tools=chat.tools)):
        spans = _blocks(whole, answers)
    else:
        spans = _by_prompts(chat, templates, whole.text, answers) or _by_marks(chat, templates, whole.text, answers)
    return Rendered(whole.text, [span for i, span in zip(answers, spans, strict=True) if chat.trained[i]])


def _render(chat: Chat, templates: ChatTemplates, count: int, **options: Any) -> Rendered:
    """Render the first `count` messages."""
    return templates.render(chat.messages[:count], tools=chat.tools, variables=chat.variables, **options)


def _blocks(whole: Rendered, answers: list[int]) -> list[tuple[int, int]]:
    if len(whole.spans) != len(answers):
        raise ValueError(f"chat template: got {len(whole.spans)} generation blocks for {len(answers)} answers, "
                         "expected one for each")  # fmt: skip
    return whole.spans


def _by_prompts(
    chat: Chat, templates: ChatTemplates, text: str, answers: list[int]
) -> list[tuple[int, int]] | None:  # fmt: skip
    """Return the spans of answers; None if a turn is rendered differently once others follow."""
    spans = []
    for i in answers:
        prompt = _render(chat, templates, i, add_generation_prompt=True).text
        until = text if i + 1 == len(chat.messages) else _render(chat, templates, i + 1).text
        if not (text.startswith(until) and until.startswith(prompt)):
            return None
        spans.append((len(prompt), len(until)))
    return spans


def _by_marks(chat: Chat, templates: ChatTemplates, text: str, answers: list[int]) -> list[tuple[int, int]]:
    """Return the spans of answers, found by marks in their place."""
    marks = [MARK.format(i) for i in answers]
    marked = [dict(message) for message in chat.messages]
    for i, mark in zip(answers, marks, strict=True):
        marked[i]["content"] = mark
    found = templates.render(marked, tools=chat.tools, variables=chat.variables).text
    pieces = re.split("|".join(marks), found)
    contents = [chat.messages[i]["content"] for i in answers]
    if len(pieces) == len(marks) + 1 and all(contents):
        for variant in (str, str.strip):
            written = [variant(content) for content in contents]
            if text == "".join(a + b for a, b in zip(pieces, [*written, ""], strict=True)):
                return _behind_prompt(chat, templates, text, _between(pieces, written))
    raise ValueError("chat template: got answers that cannot be found in its text, expected a template with "
                     "{% generation %} blocks, or --train-on all")  # fmt: skip


def _between(pieces: list[str], answers: list[str]) -> list[tuple[int, int]]:
    """Return the spans of answers that are written between pieces of text."""
    spans, position = [], 0
    for before, answer, behind in zip(pieces[:-1], answers, pieces[1:], strict=True):
        start = position + len(before)
        position = start + len(answer)
        spans.append((start, position + common_prefix(behind, pieces[-1])))
    return spans


def _behind_prompt(
    chat: Chat, templates: ChatTemplates, text: str, spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:  # fmt: skip
    """Return spans whose last one begins behind the prompt of a generation.

    A template may write something before the last answer alone, such as empty reasoning: the model has to write it too.
    """
    start, end = spans[-1]
    prompt = _render(chat, templates, len(chat.messages) - 1, add_generation_prompt=True).text
    return [*spans[:-1], (min(start, len(prompt)) if text.startswith(prompt) else start, end)]


def on_tokens(rendered: Rendered, encoding: tokenizers.Encoding) -> Rendered:
    """Return a text whose spans begin and end with a character of a token.

    A tokenizer that trims offsets (ByteLevel with trim_offsets) has no token for the blanks at the ends of an answer.
    """
    spans = []
    for start, end in rendered.spans:
        first = _first_of(encoding, range(start, end))
        last = _first_of(encoding, reversed(range(start, end)))
        spans += [] if first is None or last is None else [(first, last + 1)]
    return Rendered(rendered.text, spans)


def _first_of(encoding: tokenizers.Encoding, characters: Iterable[int]) -> int | None:
    """Return the first of some characters that a token stands for; None if there is none."""
    return next((index for index in characters if encoding.char_to_token(index) is not None), None)


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return with how many equal items two sequences begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
