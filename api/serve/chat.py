"""Render chat messages into one prompt with the chat template of the checkpoint."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from peakgpt.engine.data.tokenizer_files import CONFIG, read_chat_templates, read_folder
from peakgpt.serve import template_process
from peakgpt.serve.schema import BadRequest

START_S = 30.0  # for starting Python; it takes 0.1 s on an idle machine
RENDER_S = 3.0  # for compiling, and for rendering; both take about 1 ms


class TemplateFailure(Exception):
    """The template raised an error, took too long, or took too much memory."""


class ChatTemplate:
    """A template that runs in a process of its own, which is started again after it was stopped.

    The deadline and the memory limit hold for each rendering. Renderings wait for each other.
    """

    def __init__(self, source: str, tokens: dict[str, str]):
        """
        Args:
            source: Jinja.
            tokens: names and texts of the special tokens, which the template may use.
        Raises:
            ValueError: the template is not Jinja, or takes too long to compile.
        """
        self.source, self.tokens = source, tokens
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat template")
        try:
            self._process = _Process(source)
        except TemplateFailure as failure:
            raise ValueError(f"chat template: got {failure}, expected Jinja") from None

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt for these messages.

        Args:
            messages: as in the chat API of OpenAI.
            add_generation_prompt: end with the beginning of an answer, if the template has one.
        Raises:
            BadRequest: the template rejects the messages, or fails on them.
        """
        variables = {"messages": list(messages), "tools": None, "documents": None,
                     "add_generation_prompt": add_generation_prompt}  # fmt: skip
        try:
            with self._lock:
                if not self._process.is_alive:
                    self._process = _Process(self.source)
                return self._process.ask({**self.tokens, **variables}, RENDER_S)
        except TemplateFailure as failure:
            raise BadRequest(f"messages: the chat template says {failure}", param="messages") from None

    async def render_async(self, messages: Sequence[dict[str, Any]]) -> str:
        """As `render`. The waiting is done in a thread of its own: the threads of asyncio have other work."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(self.render, messages))


class _Process:
    """One run of template_process.py."""

    def __init__(self, source: str):
        """
        Raises:
            TemplateFailure: the source does not compile.
        """
        self.socket, child = socket.socketpair()
        with child:
            command = [sys.executable, template_process.__file__]
            environment = {**os.environ, "PYTHONSAFEPATH": "1"}
            self.process = subprocess.Popen(command, stdin=child, stdout=subprocess.DEVNULL, env=environment)
        self._stop = weakref.finalize(self, _stop, self.process, self.socket)
        self.ask(None, START_S)  # it says when it is ready
        self.ask({"source": source}, RENDER_S)

    @property
    def is_alive(self) -> bool:
        return self._stop.alive and self.process.poll() is None

    def ask(self, request: dict[str, Any] | None, seconds: float) -> str:
        """Send a request, if there is one, and return the text of the answer.

        Raises:
            TemplateFailure: an error of the template, or no answer in time. After the latter the process is stopped.
        """
        self.socket.settimeout(seconds)
        try:
            if request is not None:
                template_process.send(self.socket, request)
            answer = template_process.receive(self.socket)
        except TimeoutError:
            self._stop()
            raise TemplateFailure(f"nothing for {seconds:g} s, the limit") from None
        except (EOFError, OSError):
            self._stop()
            raise TemplateFailure("nothing, and its process ended; it may need too much memory") from None
        if (error := answer.get("error")) is not None:
            raise TemplateFailure(error.encode(errors="backslashreplace").decode())
        return answer["text"]


def _stop(process: subprocess.Popen, connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def read_chat_template(folder: Path | str, end_of_text: str | None) -> ChatTemplate | None:
    """Read the chat template of a checkpoint, and its special tokens.

    Args:
        folder: with chat_template.jinja, or a template in tokenizer_config.json. Of several named templates the one
            named "default" is taken, as in transformers.
        end_of_text: `bos_token` and `eos_token` of a checkpoint without tokenizer_config.json.
    Returns:
        The template; None if the checkpoint has none.
    Raises:
        ValueError: a file is damaged, there are named templates without "default", or the template is not Jinja.
    """
    templates = read_chat_templates(folder)
    if not templates:
        return None
    if "default" not in templates:
        raise ValueError(f"chat template: got templates named {', '.join(templates)}, expected one named default")
    tokens = read_folder(folder).special_tokens
    if end_of_text is not None and not Path(folder, CONFIG).exists():
        tokens = {"bos_token": end_of_text, "eos_token": end_of_text, **tokens}
    return ChatTemplate(templates["default"], tokens)
