"""Checks of the fields that only a chat has: messages, tools, and what the chat template gets.

OpenAI, "API reference", /v1/chat/completions. The names of fields that OpenAI does not have are vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peakgpt.engine.data.chat_template import RESERVED
from peakgpt.serve.checks import Check, Unsupported, boolean, expected, text
from peakgpt.serve.json_body import load
from peakgpt.serve.limits import Limits


def messages(value: Any, limits: Limits) -> list[dict[str, Any]]:
    """Check the messages. A field that is null is absent; arguments of tool calls become objects."""
    if not isinstance(value, list) or not 0 < len(value) <= limits.messages:
        expected(f"1 to {limits.messages} messages")
    return [_message(message, limits) for message in value]


def _message(value: Any, limits: Limits) -> dict[str, Any]:
    if not isinstance(value, dict):
        expected("objects of role and content")
    value = {name: part for name, part in value.items() if part is not None}
    if unknown := [name for name in value if name not in MESSAGE]:
        expected(f"messages without {unknown[0][:64]!r}, of {', '.join(MESSAGE)}")
    if "role" not in value or not value.keys() & {"content", "tool_calls"}:
        expected("messages with role and content")
    return {name: MESSAGE[name](part, limits) for name, part in value.items()}


def _content(value: Any, limits: Limits) -> str | list[dict[str, str]]:
    """Check the content of a message: text, or parts of text."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in parts):
        expected("content that is a string, or a list of objects of type and text")
    for part in parts:
        if part["type"] != "text":
            raise Unsupported(f"parts of type text, not {part['type'][:64]!r}: the model reads text only")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            expected("parts of content with type and text")
    return value


def _tool_calls(value: Any, limits: Limits) -> list[dict[str, Any]]:
    """Check the calls that an answer made. Templates read the arguments as objects, OpenAI sends them as JSON."""
    if not isinstance(value, list) or not 0 < len(value) <= limits.tools:
        expected(f"1 to {limits.tools} tool_calls")
    return [_tool_call(call, limits) for call in value]


def _tool_call(call: Any, limits: Limits) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    good = isinstance(function, dict) and function.keys() == {"name", "arguments"}
    if not good or not all(isinstance(part, str) for part in function.values()) or call.get("type") != "function":
        expected("tool_calls of type function, with name and arguments, both strings")
    if not call.keys() <= {"id", "type", "function", "index"}:
        expected("tool_calls of id, type and function")
    try:
        arguments = load(function["arguments"], limits)
    except (ValueError, RecursionError) as error:
        expected(f"JSON in the arguments of {function['name'][:64]!r}, and got {str(error)[:80]}")
    if not isinstance(arguments, dict):
        expected(f"a JSON object as the arguments of {function['name'][:64]!r}")
    return {**call, "function": {"name": function["name"], "arguments": arguments}}


MESSAGE: Mapping[str, Check] = {
    "role": text, "content": _content, "name": text, "tool_calls": _tool_calls, "tool_call_id": text,
    "reasoning_content": text, "reasoning": text,
}  # fmt: skip


def tools(value: Any, limits: Limits) -> list[dict[str, Any]]:
    """Check the tools, which the template writes into the prompt as they are."""
    if not isinstance(value, list) or not 0 < len(value) <= limits.tools:
        expected(f"1 to {limits.tools} tools")
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.keys() != {"type", "function"} or tool["type"] != "function":
            expected("objects of type function, and the function")
        if not isinstance(function.get("name"), str):
            expected("functions with a name")
        if function.get("strict"):
            raise Unsupported("functions without strict: the server does not force an answer into their schema")
    return value


def tool_choice(value: Any, limits: Limits) -> str:
    """Check the choice of a tool: the model chooses, or the template does not show it the tools."""
    if value in ("none", "auto"):
        return value
    raise Unsupported('"auto" or "none": the server does not force a call')


def parallel_tool_calls(value: Any, limits: Limits) -> bool:
    if boolean(value, limits):
        return True
    raise Unsupported("true: the server does not limit the number of calls")


def documents(value: Any, limits: Limits) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(document, dict) for document in value):
        expected("a list of objects, such as of title and text")
    return value


def template_variables(value: Any, limits: Limits) -> dict[str, Any]:
    if not isinstance(value, dict):
        expected("an object of variables of the chat template")
    if reserved := sorted(value.keys() & RESERVED):
        expected(f"{reserved[0]} as a field of the request")
    return value


CHAT_FIELDS: Mapping[str, Check] = {
    "messages": messages,
    "tools": tools,
    "tool_choice": tool_choice,
    "parallel_tool_calls": parallel_tool_calls,
    "documents": documents,
    "chat_template_kwargs": template_variables,
    "reasoning_effort": text,
    "add_generation_prompt": boolean,
    "continue_final_message": boolean,
}
