"""The process that renders chat templates: `python template_process.py`, with a socket as its standard input.

A template is a program of the checkpoint, and the client writes its input. It runs here, in Jinja's sandbox, because
only a process can be stopped at a deadline and has a memory limit. It imports nothing of peakgpt, to start quickly.

A message is its length in 8 bytes, then JSON. The first request has the source; each later one has the variables.
The environment is the one of transformers' apply_chat_template.
"""

from __future__ import annotations

import datetime
import json
import signal
import socket
import sys
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20  # of address space; the process without a template has 30 MB
MAX_CHARS = 1 << 22  # of a prompt
MAX_ERROR_CHARS = 500


class Generation(Extension):
    """{% generation %}...{% endgeneration %} marks text of the assistant for training; here it only renders it."""

    tags = {"generation"}  # noqa: RUF012, the form that Jinja asks for

    def parse(self, parser: jinja2.parser.Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def compile_template(source: str) -> jinja2.Template:
    """Compile a template in the environment of transformers' apply_chat_template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Write JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    connection.sendall(len(data).to_bytes(8, "little") + data)


def receive(connection: socket.socket) -> dict[str, Any]:
    """Wait for a message.

    Raises:
        EOFError: the other end is closed.
    """
    return json.loads(_read(connection, int.from_bytes(_read(connection, 8), "little")))


def _read(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError("the other end is closed")
        data += part
    return bytes(data)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes the socket
    connection, template = socket.socket(fileno=0), None
    _limit_memory()
    send(connection, {"text": ""})  # ready
    while True:
        try:
            request = receive(connection)
        except (EOFError, ConnectionError):
            return
        try:
            if template is None:
                template, answer = compile_template(request["source"]), {"text": ""}
            else:
                answer = {"text": _checked(template.render(request))}
        except Exception as error:  # a template raises anything, such as ZeroDivisionError
            answer = {"error": (str(error) or type(error).__name__)[:MAX_ERROR_CHARS]}
        send(connection, answer)


def _checked(text: str) -> str:
    if len(text) > MAX_CHARS:
        raise ValueError(f"got a prompt of {len(text)} characters, expected up to {MAX_CHARS}")
    text.encode()  # raises for a lone surrogate
    return text


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    sys.exit(main())
