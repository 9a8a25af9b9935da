"""The shapes of data for supervised fine-tuning, each recognized by its fields.

    {"messages": [{"role": "user", "content": ...}, ...]}              OpenAI; with "tools", and "weight" of an answer
    {"conversations": [{"from": "human", "value": ...}, ...]}          ShareGPT
    {"prompt": ..., "completion": ...}                                 two texts, or two lists of messages, as in TRL
    {"instruction": ..., "input": ..., "output": ...}                  Alpaca; input may be missing or empty

OpenAI, "Supervised fine-tuning", JSONL format; TRL, "Dataset formats and types"; Taori et al. 2023, "Stanford Alpaca",
train.py, whose prompts are used for a checkpoint without a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peakgpt.engine.finetuning.rows import Row

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "observation": "tool",
}  # fmt: skip
SYSTEM, ANSWERED = ("system", "developer"), ("user", "tool")
# The roles that may come before each role; None: nothing.
BEFORE: Mapping[str, tuple[str | None, ...]] = {
    "system": (None,), "developer": (None,), "user": (None, *SYSTEM, "assistant"), "assistant": ANSWERED,
    "tool": ("assistant", "tool"),
}  # fmt: skip
ALPACA = "Below is an instruction that describes a task{further}. Write a response that appropriately completes the " \
    "request.\n\n### Instruction:\n{instruction}{input}\n\n### Response:\n"  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Args:
        messages: with role and content, as a chat template reads them.
        trained: which of them have a loss: answers.
        tools: JSON schemas of functions; None if there are none.
        variables: of the chat template.
    """

    messages: Sequence[dict[str, Any]]
    trained: Sequence[bool]
    tools: Sequence[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


class Completion(NamedTuple):
    """A text and how it goes on."""

    prompt: str
    completion: str


Conversation = Chat | Completion


class Shape(NamedTuple):
    """A shape of rows.

    Args:
        name: whose it is.
        fields: that a row of this shape has.
        read: returns the conversation of a row, for a checkpoint with a chat template (True) or without one.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Row, bool], Conversation]

    def __str__(self) -> str:
        return f"{' and '.join(self.fields)} ({self.name})"


def read_conversations(rows: Sequence[Row], *, has_template: bool) -> list[Conversation]:
    """Return the conversation of each row; all rows of a file have one shape.

    Raises:
        ValueError: a row of no shape, of another one than the first of its file, or with a bad field.
    """
    first: dict[str, tuple[Row, Shape]] = {}  # by file
    conversations = []
    for row in rows:
        shape = shape_of(row)
        begin, expected = first.setdefault(row.place.rpartition(":")[0], (row, shape))
        if shape is not expected:
            raise row.error(f"got {shape}, expected {expected} as in {begin.place}: a file has rows of one shape")
        conversations.append(shape.read(row, has_template))
    return conversations


def shape_of(row: Row) -> Shape:
    """Return the first shape whose fields a row has.

    Raises:
        ValueError: there is none.
    """
    for shape in SHAPES:
        if all(name in row.values for name in shape.fields):
            return shape
    known = ", or ".join(map(str, SHAPES))
    hint = "; texts without answers are for `peakgpt train --init`" if "text" in row.values else ""
    raise row.error(f"got the fields {', '.join(row.values)!s:.200}, expected {known}{hint}")


# ---- shapes


def _openai(row: Row, has_template: bool) -> Chat:
    return _chat(row, "messages", _messages(row, "messages", "role", "content"))


def _sharegpt(row: Row, has_template: bool) -> Chat:
    values = row.values["conversations"]
    names = ("from", "value") if _is_list_of(values, "from") else ("role", "content")
    return _chat(row, "conversations", _messages(row, "conversations", *names))


def _prompt_completion(row: Row, has_template: bool) -> Conversation:
    if isinstance(row.values["prompt"], str):
        completion = row.text("completion")
        _check_answer(row, "completion", completion)
        return Completion(row.text("prompt"), completion)
    prompt = _messages(row, "prompt", "role", "content")
    chat = _chat(row, "completion", [*prompt, *_messages(row, "completion", "role", "content")])
    trained = [i >= len(prompt) and is_trained for i, is_trained in enumerate(chat.trained)]
    if not any(trained):
        raise row.error("got no answer of the assistant in 'completion', expected one")
    return Chat(chat.messages, trained, chat.tools, chat.variables)


def _alpaca(row: Row, has_template: bool) -> Conversation:
    instruction, output = row.text("instruction"), row.text("output")
    more = row.text("input") if row.values.get("input") else ""
    _check_answer(row, "output", output)
    if has_template:
        question = f"{instruction}\n\n{more}" if more else instruction
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return Chat(messages, (False, True))
    further = ", paired with an input that provides further context" if more else ""
    prompt = ALPACA.format(further=further, instruction=instruction, input=f"\n\n### Input:\n{more}" if more else "")
    return Completion(prompt, output)


SHAPES = (
    Shape("OpenAI", ("messages",), _openai),
    Shape("ShareGPT", ("conversations",), _sharegpt),
    Shape("TRL", ("prompt", "completion"), _prompt_completion),
    Shape("Alpaca", ("instruction", "output"), _alpaca),
)


# ---- messages


def _is_list_of(values: Any, name: str) -> bool:
    return isinstance(values, list) and any(isinstance(value, dict) and name in value for value in values)


def _messages(row: Row, name: str, role_key: str, content_key: str) -> list[dict[str, Any]]:
    """Return the messages of a field, with `role` and `content`."""
    values = row.values[name]
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise row.error(f"got {name}={values!r:.60}, expected a list of messages")
    return [_message(row, f"{name}[{i}]", value, role_key, content_key) for i, value in enumerate(values)]


def _message(row: Row, place: str, value: dict[str, Any], role_key: str, content_key: str) -> dict[str, Any]:
    role = ROLES.get(value.get(role_key)) if isinstance(value.get(role_key), str) else None
    if role is None:
        raise row.error(f"got {role_key}={value.get(role_key)!r:.40} in {place}, expected one of {', '.join(ROLES)}")
    content = value.get(content_key)
    if isinstance(content, list):
        content = _joined(row, place, content)
    has_calls = role == "assistant" and bool(value.get("tool_calls"))
    if not isinstance(content, str) and not (content is None and has_calls):
        raise row.error(f"got {content_key}={content!r:.40} in {place}, expected text")
    if role == "assistant" and not has_calls:
        _check_answer(row, f"{content_key} of {place}", content)
    rest = {key: item for key, item in value.items() if key not in (role_key, content_key, "role", "content")}
    return {"role": role, "content": content if content is None else row.checked(place, content), **rest}


def _joined(row: Row, place: str, parts: list[Any]) -> str:
    """Return the text of a content in parts."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else part
            raise row.error(f"got a part {kind!r:.40} in {place}, expected parts of text")
    return "\n".join(part["text"] for part in parts)


def _check_answer(row: Row, name: str, answer: str) -> None:
    if not answer.strip():
        raise row.error(f"got an empty answer in {name}, expected text")


def _chat(row: Row, name: str, messages: list[dict[str, Any]]) -> Chat:
    """Check the order of the roles; take what belongs to the row and not to the template."""
    before: str | None = None
    for i, message in enumerate(messages):
        if before not in BEFORE[message["role"]]:
            after = "at the start" if before is None else f"after {before}"
            raise row.error(f"got role {message['role']} {after} in {name}[{i}], expected user and assistant in turns, "
                            "with a system message only at the start")  # fmt: skip
        before = message["role"]
    if before != "assistant":
        raise row.error(f"got a last message of {before} in {name}, expected an answer of the assistant")
    trained = [_weight(row, message) and message["role"] == "assistant" for message in messages]
    if not any(trained):
        raise row.error(f"got weight 0 for all answers in {name}, expected one with a loss")
    variables = row.values.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise row.error(f"got chat_template_kwargs={variables!r:.40}, expected an object")
    return Chat(messages, trained, _tools(row), variables)


def _weight(row: Row, message: dict[str, Any]) -> bool:
    """Take OpenAI's `weight` off a message: whether it has a loss."""
    weight = message.pop("weight", 1)
    if weight not in (0, 1) or (message["role"] != "assistant" and weight != 1):
        raise row.error(f"got weight={weight!r:.20} of a message of {message['role']}, expected 0 or 1 of an answer")
    return bool(weight)


def _tools(row: Row) -> list[Any] | None:
    """Return the tools of a row: a list, or its JSON, as TRL takes it."""
    tools = row.values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise row.error(f"got {error} in 'tools', expected JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise row.error(f"got tools={tools!r:.40}, expected a list")
    return tools or None
