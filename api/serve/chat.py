"""Render chat messages into one prompt with the chat template of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peakgpt.serve.schema import BadRequest


class ChatTemplate:
    """A Jinja template in a sandbox, because a checkpoint must not be able to run code."""

    def __init__(self, source: str, end_of_text: str):
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"chat template: got {error}, expected Jinja") from None
        self.tokens = {"bos_token": end_of_text, "eos_token": end_of_text}

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return the prompt for these messages.

        Raises:
            BadRequest: the template rejects the messages.
        """
        try:
            return self.template.render(messages=messages, add_generation_prompt=True, **self.tokens)
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise BadRequest(f"messages: the chat template says {error}", param="messages") from None


def read_chat_template(folder: Path | str, end_of_text: str) -> ChatTemplate | None:
    """Read chat_template.jinja or the template in tokenizer_config.json; return None if the checkpoint has neither."""
    path, config = Path(folder, "chat_template.jinja"), Path(folder, "tokenizer_config.json")
    source = path.read_text(encoding="utf-8") if path.exists() else None
    if source is None and config.exists():
        source = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    return ChatTemplate(source, end_of_text) if isinstance(source, str) else None


def _raise(message: str) -> None:
    raise TemplateError(message)
