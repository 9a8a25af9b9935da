"""Chat templates: messages to the text that a model was trained on, as transformers' apply_chat_template does it.

A template is Jinja. It sees `messages`, `tools`, `documents`, `add_generation_prompt`, the special tokens by name, and
variables of its own, such as `enable_thinking`. transformers, "Chat templates", and its utils/chat_template_utils.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peakgpt.engine.data.template_sandbox import Rendered, TemplateFailure, TemplateSandbox

DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates
RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}  # variables that are arguments
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; templates read one or another
# Marks in the rendered text where the final message ends. If the blank at its end is missing, the template trims text.
END_MARK = "PEAKGPT_END_OF_FINAL_MESSAGE "


class ChatTemplates:
    """The chat templates of a tokenizer by name, and the special tokens that a template may use."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]):
        """
        Args:
            sources: name -> Jinja; the usual name is "default".
            special_tokens: name -> text, such as {"eos_token": "</s>"}.
        """
        self.sources, self.special_tokens = dict(sources), dict(special_tokens)
        self._sandbox = TemplateSandbox()

    def select(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """Return the source of the template to use.

        Args:
            chat_template: the name of a template, or Jinja. None: "tool_use" if there are tools and it exists, else
                "default".
            tools: of the conversation.
        Raises:
            ValueError: there is no such template.
        """
        if chat_template is not None:
            return self.sources.get(chat_template, chat_template)
        for name in (TOOL_USE, DEFAULT) if tools is not None else (DEFAULT,):
            if name in self.sources:
                return self.sources[name]
        found = f"templates named {', '.join(self.sources)}" if self.sources else "a tokenizer without one"
        raise ValueError(f"chat template: got {found}, expected one named {DEFAULT}, or the argument chat_template")

    def compile(self) -> None:
        """Compile all templates, to find their errors before the first conversation.

        Raises:
            ValueError: a template is not Jinja, or takes too long to compile.
        """
        for name, source in self.sources.items():
            try:
                self._sandbox.compile(source)
            except TemplateFailure as failure:
                raise ValueError(f"chat template {name}: got {failure}, expected Jinja") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None, chat_template: str | None = None, add_generation_prompt: bool = False,
        continue_final_message: bool | str = False, variables: Mapping[str, Any] | None = None,
    ) -> Rendered:  # fmt: skip
        """Render a conversation; the arguments are those of `Tokenizer.apply_chat_template`.

        Raises:
            TemplateFailure: the template rejects the conversation, or fails on it.
            UnreadVariables: tools, documents or variables that the template does not read.
            ValueError: an argument that is not JSON.
        """
        source, own = self.select(chat_template, tools), dict(variables or {})
        if reserved := sorted(own.keys() & RESERVED):
            raise ValueError(f"chat: got {reserved[0]} as a variable of the template, expected it as an argument")
        conversation = _conversation(messages)
        field = _field_to_continue(continue_final_message, add_generation_prompt)
        given = {name: value for name, value in (("tools", tools), ("documents", documents)) if value is not None}
        for name, values in given.items():
            _check_objects(name, values)
        final = _mark_end(conversation[-1], field, source) if field else ""
        seen = {
            **self.special_tokens, "tools": None, "documents": None, **_plain("chat", {**given, **own}),
            "messages": conversation, "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        try:
            rendered = self._sandbox.render(source, seen, required=(*given, *own))
        except TemplateFailure as failure:
            raise TemplateFailure(f"the chat template says {failure}") from None
        return Rendered(_cut_at_mark(rendered.text, final), []) if field else rendered


# ---- messages


def _conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as a template sees them.

    A field that is None is absent: many templates would write "None". The text of reasoning is there under every name
    that templates read.
    """
    _check_objects("messages", messages)
    if not messages:
        raise ValueError("chat: got no messages, expected at least one")
    conversation = []
    for message in _plain("messages", list(messages)):
        message = {name: value for name, value in message.items() if value is not None}
        reasoning = next((message[name] for name in REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        conversation.append(message)
    return conversation


def _check_objects(name: str, values: Any) -> None:
    """Check for a list of objects. A tool may not be a function: its schema is the caller's to make."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"chat: got {name} {values!r:.60}, expected a list of objects")
    for value in values:
        if callable(value) and name == "tools":
            raise ValueError(f"chat: got the function {getattr(value, '__name__', value)} as a tool, expected its JSON "
                             "schema, as transformers.utils.get_json_schema makes it")  # fmt: skip
        if not _is_object(value):
            raise ValueError(f"chat: got {value!r:.60} in {name}, expected an object")


def _is_object(value: Any) -> bool:
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, Mapping) or is_data or callable(getattr(value, "model_dump", None))


def _plain(name: str, value: Any) -> Any:
    """Rebuild a value of JSON's types, which is all that a template gets; dataclasses and pydantic models are objects.

    Raises:
        ValueError: a value of another type, or a key that is not text.
    """
    try:
        return _rebuild(value)
    except (TypeError, RecursionError) as error:
        reason = "values in values without end" if isinstance(error, RecursionError) else error
        raise ValueError(f"chat: got {reason} in {name}, expected text, numbers, lists and objects") from None


def _rebuild(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the key {wrong[0]!r}")
        return {key: _rebuild(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rebuild(item) for item in value]
    if isinstance(value, np.generic):
        return _rebuild(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _rebuild(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return _rebuild(dump())
    raise TypeError(type(value).__name__)


# ---- continue_final_message


def _field_to_continue(continue_final_message: bool | str, add_generation_prompt: bool) -> str:
    """Return the field of the final message that the model continues; "" if it begins a message."""
    if continue_final_message and add_generation_prompt:
        raise ValueError("chat: got continue_final_message and add_generation_prompt, expected one of them")
    if isinstance(continue_final_message, str):
        return continue_final_message
    return "content" if continue_final_message else ""


def _mark_end(message: dict[str, Any], field: str, source: str) -> str:
    """Put END_MARK behind the text of a field, in place; return the text before.

    Raises:
        ValueError: there is no text, or the template does not read the field.
    """
    value = message.get(field)
    if not isinstance(value, (str, list)):
        raise ValueError(f"chat: got a final message without text in {field}, expected one to continue")
    names = [name for name in REASONING if message.get(name) == value] if field in REASONING else [field]
    if not any(name in source for name in names):
        raise ValueError(f"chat template: got continue_final_message {field!r}, expected a field that it reads")
    if isinstance(value, list):
        part = next((part for part in reversed(value) if isinstance(part, dict) and "text" in part), None)
        if part is None:
            raise ValueError("chat: got a final message without text, expected one to continue")
        text = part["text"]
        part["text"] = text + END_MARK
        return text
    for name in names:
        message[name] = value + END_MARK
    return value


def _cut_at_mark(text: str, final: str) -> str:
    """Return the text up to END_MARK, which ends the final message."""
    if final.strip() not in text or END_MARK.strip() not in text:
        raise ValueError("chat template: got a text without the final message, expected it there to continue")
    position = text.rindex(END_MARK.strip())
    is_trimmed = not text.startswith(END_MARK, position)
    return text[:position].rstrip() if is_trimmed else text[:position]
