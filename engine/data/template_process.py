"""The process that renders chat templates: `python template_process.py`, with a socket as its standard input.

A template is a program of the checkpoint, and others write its input. It runs here, in Jinja's sandbox, because only a
process can be stopped at a deadline and has a memory limit. It imports nothing of peakgpt, to start quickly.

A message is its length in 8 bytes, then JSON. The process says when it is ready, with an empty message. A request has
the source of a template, the variables that it gets, and the names that it must read; without variables the template
is only compiled. The environment is the one of transformers' apply_chat_template.
"""

from __future__ import annotations

import datetime
import json
import signal
import socket
import sys
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_BYTES = 512 << 20  # of address space; the process without a template has 30 MB
MAX_CHARS = 1 << 22  # of a prompt
MAX_ERROR_CHARS = 500
MAX_TEMPLATES = 8  # that are kept compiled


# ---- the environment


class Generation(Extension):
    """{% generation %}...{% endgeneration %} marks text of the assistant.

    The environment counts the rendered characters and lists where each marked text begins and ends.
    """

    tags = {"generation"}  # noqa: RUF012, the form that Jinja asks for

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        environment.extend(num_chars=0, spans=[])

    def parse(self, parser: jinja2.parser.Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: jinja2.runtime.Macro) -> str:
        text, start = caller(), self.environment.num_chars
        self.environment.spans.append((start, start + len(text)))
        return text


class Dict:
    """dict(...) of templates, without the attributes of Python's class."""

    def __call__(self, *args: Any, **items: Any) -> dict:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class PublicNamespace(Namespace):
    """namespace(...) of templates. It has no names with an underscore in front, which lead into Python."""

    def __init__(*args: Any, **attributes: Any):  # without `self`, which may be an attribute
        self, *args = args
        attributes = dict(*args, **attributes)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"got the attribute {name!r} of a namespace, expected no underscore in front")


@lru_cache(MAX_TEMPLATES)
def compile_template(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """Compile a template in the environment of transformers' apply_chat_template.

    Returns:
        The template, and the names of the variables that it reads.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise, "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dict(), "namespace": PublicNamespace,
    }  # fmt: skip
    return environment.from_string(source), frozenset(meta.find_undeclared_variables(environment.parse(source)))


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Write JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


# ---- requests


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request.

    Args:
        request: "source"; then "variables", by name, and "required", names that the template must read.
    Returns:
        "text" and the "spans" of its generation blocks, or "unread" names.
    """
    template, names = compile_template(request["source"])
    if "variables" not in request:
        return {"text": "", "spans": []}
    if unread := [name for name in request["required"] if name not in names]:
        return {"unread": unread}
    environment, parts = template.environment, []
    environment.num_chars, environment.spans = 0, []
    for part in template.generate(request["variables"]):
        parts.append(part)
        environment.num_chars += len(part)
    return {"text": _checked("".join(parts)), "spans": environment.spans}


def _checked(text: str) -> str:
    if len(text) > MAX_CHARS:
        raise ValueError(f"got a prompt of {len(text)} characters, expected up to {MAX_CHARS}")
    text.encode()  # raises for a lone surrogate
    return text


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
    connection = socket.socket(fileno=0)
    _limit_memory()
    send(connection, {})  # ready
    while True:
        try:
            request = receive(connection)
        except (EOFError, ConnectionError):
            return
        try:
            message = answer(request)
        except Exception as error:  # a template raises anything, such as ZeroDivisionError
            message = {"error": (str(error) or type(error).__name__)[:MAX_ERROR_CHARS]}
        send(connection, message)


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
