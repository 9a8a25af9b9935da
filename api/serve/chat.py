"""From the messages of a request to a prompt, with the chat templates of the checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from peakgpt.engine.data.chat_template import ChatTemplates
from peakgpt.engine.data.template_sandbox import TemplateFailure, UnreadVariables
from peakgpt.serve.errors import BadRequest

PROBE = "probe"  # the text of a message that shows how a template reads parts


class Chat:
    """Renders requests, one after the other, in a thread of its own: the threads of asyncio have other work."""

    def __init__(self, templates: ChatTemplates):
        """
        Args:
            templates: of the tokenizer.
        Raises:
            ValueError: a template is not Jinja, or takes too long to compile, or none is the default.
        """
        templates.select()
        templates.compile()
        self.templates = templates
        self._reads_parts: dict[str, bool] = {}  # by source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat template")

    async def render_async(self, fields: Mapping[str, Any]) -> str:
        """As `render`, in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(self.render, fields))

    def render(self, fields: Mapping[str, Any]) -> str:
        """Return the prompt of a request.

        Args:
            fields: checked fields of the request.
        Raises:
            BadRequest: the template rejects the messages, fails on them, or does not read a field.
        """
        continues = fields.get("continue_final_message", False)
        tools = None if fields.get("tool_choice") == "none" else fields.get("tools")
        effort = {"reasoning_effort": fields["reasoning_effort"]} if "reasoning_effort" in fields else {}
        try:
            return self.templates.render(
                self._messages(fields["messages"], self.templates.select(tools=tools)), tools=tools,
                documents=fields.get("documents"), continue_final_message=continues,
                add_generation_prompt=fields.get("add_generation_prompt", not continues),
                variables={**effort, **fields.get("chat_template_kwargs", {})},
            ).text  # fmt: skip
        except UnreadVariables as error:
            name = error.names[0] if error.names[0] in fields else "chat_template_kwargs"
            raise BadRequest(f"{name}: {error}", param=name, code="unsupported_parameter") from None
        except ValueError as error:
            raise BadRequest(f"messages: {error}", param="messages") from None

    def _messages(self, messages: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
        """Return the messages with texts in place of parts, if the template does not read parts."""
        if not any(isinstance(message.get("content"), list) for message in messages):
            return messages
        if source not in self._reads_parts:
            self._reads_parts[source] = self._probe(source)
        if self._reads_parts[source]:
            return messages
        return [{**message, "content": _text_of(message["content"])} if "content" in message else message
                for message in messages]  # fmt: skip

    def _probe(self, source: str) -> bool:
        """Return whether a template writes a part as it writes a text; many write the list as Python shows it."""
        try:
            text, parts = (
                self.templates.render([{"role": "user", "content": content}], chat_template=source).text
                for content in (PROBE, [{"type": "text", "text": PROBE}])
            )
        except TemplateFailure:
            return False
        return text == parts


def _text_of(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
