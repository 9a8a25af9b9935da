"""Render Jinja templates in a process of its own, with a deadline and a memory limit; see template_process.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

START_S = 30.0  # for starting Python; it takes 0.1 s on an idle machine
RENDER_S = 3.0  # for compiling and rendering a template


class TemplateFailure(ValueError):
    """A template raised an error, or took too long or too much memory."""


class UnreadVariables(ValueError):
    """A template does not read variables that should have an effect; `names` are theirs."""

    def __init__(self, names: Sequence[str]):
        super().__init__(f"chat template: got {', '.join(names)}, expected only what the template reads")
        self.names = tuple(names)


class Rendered(NamedTuple):
    """A rendered text.

    Args:
        text: the prompt.
        spans: where each `{% generation %}` block begins and ends, in characters.
    """

    text: str
    spans: list[tuple[int, int]]


class TemplateSandbox:
    """Renders templates in one process. It starts at first use, and again after it was stopped.

    The deadline and the memory limit hold for each rendering. Renderings wait for each other.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def __reduce__(self) -> tuple[type[TemplateSandbox], tuple[()]]:
        return TemplateSandbox, ()  # a copy starts its own process

    def compile(self, source: str) -> None:
        """Compile a template, to find its errors before it is used.

        Raises:
            TemplateFailure: the source is not Jinja, or takes too long to compile.
        """
        self._ask({"source": source})

    def render(self, source: str, variables: Mapping[str, Any], required: Collection[str] = ()) -> Rendered:
        """Render a template.

        Args:
            source: Jinja.
            variables: by name; values of JSON.
            required: names of variables that the template must read, since the caller asks for an effect of them.
        Raises:
            TemplateFailure: the template raises an error, or takes too long or too much memory.
            UnreadVariables: the template does not read a required variable.
        """
        answer = self._ask({"source": source, "variables": dict(variables), "required": list(required)})
        if unread := answer.get("unread"):
            raise UnreadVariables(unread)
        return Rendered(answer["text"], [(start, end) for start, end in answer["spans"]])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._process is None or not self._process.is_alive:
                self._process = _Process()
            return self._process.ask(request, RENDER_S)


class _Process:
    """One run of template_process.py."""

    def __init__(self):
        from peakgpt.engine.data import template_process  # late: it imports Jinja

        self.program, (self.socket, child) = template_process, socket.socketpair()
        with child:
            command = [sys.executable, self.program.__file__]
            environment = {**os.environ, "PYTHONSAFEPATH": "1"}
            self.process = subprocess.Popen(command, stdin=child, stdout=subprocess.DEVNULL, env=environment)
        self._stop = weakref.finalize(self, _stop, self.process, self.socket)
        self.ask(None, START_S)  # it says when it is ready

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked; a process forked from ours sees another process's child as ended."""
        return self._stop.alive and self.process.poll() is None

    def ask(self, request: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        """Send a request, if there is one, and return the answer.

        Raises:
            TemplateFailure: an error of the template, or no answer in time. After the latter the process is stopped.
        """
        self.socket.settimeout(seconds)
        try:
            if request is not None:
                self.program.send(self.socket, request)
            answer = self.program.receive(self.socket)
        except TimeoutError:
            self._stop()
            raise TemplateFailure(f"nothing for {seconds:g} s, the limit") from None
        except (EOFError, OSError):
            self._stop()
            raise TemplateFailure("nothing, and its process ended; it may need too much memory") from None
        except BaseException:  # such as Ctrl-C: the answer to this request must not be taken for that to the next
            self._stop()
            raise
        if (error := answer.get("error")) is not None:
            raise TemplateFailure(error.encode(errors="backslashreplace").decode())
        return answer


def _stop(process: subprocess.Popen, connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
