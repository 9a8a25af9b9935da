"""Protect every route: size and time limits, host and API key checks, errors in the format of OpenAI."""

from __future__ import annotations

import asyncio
import http
import ipaddress
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence

import h11
import uvicorn
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from peakgpt.engine.inference.interrupts import INTERRUPTS
from peakgpt.serve.errors import BadRequest, code_of
from peakgpt.serve.keys import Keys
from peakgpt.serve.limits import LIMITS, Limits
from peakgpt.serve.worker import engine_stopped

OPEN = "/health"  # needs no key
CHUNK = "peakgpt.chunk"  # ASGI extension: Protocol.chunk
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")  # RFC 9110, 7.2: host, then an optional port

log = logging.getLogger("peakgpt.serve")


class Guard:
    """ASGI middleware that checks headers, host, API key and engine, and turns every exception into an error."""

    def __init__(self, app, *, key: Sequence[str] | None, hosts: tuple[str, ...] | None, limits: Limits,
                 is_alive: Callable[[], bool] = lambda: True):  # fmt: skip
        """
        Args:
            key: API keys; clients must send one of them. None: no key is needed.
            hosts: allowed names in the Host header. They prevent DNS rebinding: a web page that reaches a loopback
                server through its own host name. None: any host.
            is_alive: whether the engine can answer requests.
        Raises:
            ValueError: a blank key.
        """
        self.app, self.limits, self.is_alive = app, limits, is_alive
        self.hosts = hosts and {_normal(host) for host in hosts}
        self.keys = None if key is None else Keys(key)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def observed(message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, observed)
        except BadRequest as refusal:
            await refuse(refusal, send)
        except (*INTERRUPTS, asyncio.CancelledError):
            raise
        except BaseException as error:
            if started:
                raise
            log.exception("a request failed")
            await refuse(internal_error(error), send)

    def _check(self, scope) -> None:
        headers, target = scope["headers"], len(scope["raw_path"]) + len(scope["query_string"])
        if target + sum(len(name) + len(value) + 4 for name, value in headers) > self.limits.header_bytes:
            raise BadRequest(f"header: got more than {self.limits.header_bytes} bytes", code="header_too_large")
        if len(headers) > self.limits.headers:
            raise BadRequest(f"header: got {len(headers)} lines, expected up to {self.limits.headers}",
                             code="header_too_large")  # fmt: skip
        header = dict(headers)
        if b"transfer-encoding" in header and b"content-length" in header:  # RFC 9112, 6.3: perhaps an attack
            raise BadRequest("header: got Content-Length and Transfer-Encoding, expected one", code="invalid_http")
        host = header.get(b"host", b"").decode("latin-1")
        if self.hosts and _host_name(host) not in self.hosts:
            raise BadRequest(f"host: got {host[:64]!r}, expected one of {', '.join(sorted(self.hosts))}",
                             code="host_not_allowed")  # fmt: skip
        if scope["path"] == OPEN:
            return
        if self.keys and not self.keys.accept(header.get(b"authorization", b"")):
            raise BadRequest("no valid API key, expected Authorization: Bearer KEY", code="invalid_api_key")
        if not self.is_alive():
            raise engine_stopped()


def _host_name(header: str) -> str | None:
    """Return the name in a Host header without its port; None if it has another form."""
    match = _HOST.fullmatch(header.strip())
    return match and _normal(match[1].removeprefix("[").removesuffix("]"))


def _normal(host: str) -> str:
    """Return the one spelling of a host: names in small letters, addresses in their shortest form."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().removesuffix(".")


def internal_error(error: BaseException) -> BadRequest:
    return BadRequest(f"the server failed: {type(error).__name__}", code="internal_error")


async def refuse(refusal: BadRequest, send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    if refusal.body["error"]["code"] == "invalid_http":
        headers["connection"] = "close"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def read_body(request, limits: Limits) -> bytes:
    """Read the body of a JSON request.

    Raises:
        BadRequest: wrong content type, too large, or too slow.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A web page cannot send this type to another site without a CORS preflight, which this server never grants.
        raise BadRequest("content-type: expected application/json", code="unsupported_media_type")
    large = BadRequest(f"body: got more than {limits.body_bytes} bytes", code="request_too_large")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limits.body_bytes:
        raise large
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > limits.body_bytes:
                raise large

    try:
        await asyncio.wait_for(read(), limits.body_s)
    except asyncio.TimeoutError:
        raise BadRequest(f"body: got {len(body)} bytes after {limits.body_s} s, expected all",
                         code="request_timeout") from None  # fmt: skip
    except ClientDisconnect:
        raise BadRequest("the client has disconnected", code="client_disconnected") from None
    return bytes(body)


def protocol(limits: Limits = LIMITS) -> type[H11Protocol]:
    """Return uvicorn's HTTP/1.1 protocol with limits on connections, header time, body time and unread responses."""
    seconds = {"head": limits.header_s, "body": limits.body_s + 1}  # 1 s more, so that read_body can answer first

    class Protocol(H11Protocol):
        reading: str | None = None  # part of the request with a running timer
        reading_timer: asyncio.TimerHandle | None = None
        writing_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(0)  # call pause_writing as soon as the client does not read
            if len(self.connections) > limits.connections:
                self._refuse(BadRequest("too many connections", code="too_many_connections"))
            else:
                self._expect("head")

        def handle_events(self) -> None:
            super().handle_events()
            begun = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
            self._expect("body" if self.conn.their_state is h11.SEND_BODY else "head" if begun else None)
            if self.scope is not None and self.scope["http_version"] == "1.1":
                self.scope["extensions"] = {CHUNK: self.chunk}

        async def chunk(self, data: bytes) -> None:
            """Send a chunk of a started response: the same bytes as `send` in a tenth of the time."""
            await self.flow.drain()
            if not self.transport.is_closing():
                self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

        def send_400_response(self, msg: str) -> None:
            """Answer with the status of the h11 exception that is being handled."""
            status = getattr(sys.exc_info()[1], "error_status_hint", 400)
            self._refuse(BadRequest(f"{msg} {sys.exc_info()[1]}", code=code_of(status)))

        def connection_lost(self, exc) -> None:
            self._expect(None)
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.writing_timer = self.writing_timer or self.loop.call_later(limits.write_s, self.transport.abort)

        def resume_writing(self) -> None:
            if self.writing_timer is not None:
                self.writing_timer.cancel()
                self.writing_timer = None
            super().resume_writing()

        def _expect(self, part: str | None) -> None:
            """Start the timer for the next part of a request; data that arrives does not restart it."""
            if part == self.reading:
                return
            if self.reading_timer is not None:
                self.reading_timer.cancel()
            self.reading = part
            self.reading_timer = part and self.loop.call_later(seconds[part], self.transport.abort)

        def _refuse(self, refusal: BadRequest) -> None:
            """Send an error without a request and close the connection. A response that has started is cut off."""
            if self.cycle is not None and not self.cycle.response_complete:
                return self.transport.abort()
            body = json.dumps(refusal.body)
            head = f"connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            status = http.HTTPStatus(refusal.status)
            self.transport.write(f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n\r\n{body}".encode())
            self.transport.close()

    return Protocol


def config(app, limits: Limits = LIMITS) -> uvicorn.Config:
    """Return the uvicorn configuration of the server."""
    return uvicorn.Config(
        app, http=protocol(limits), h11_max_incomplete_event_size=limits.header_bytes, ws="none",
        timeout_keep_alive=limits.keep_alive_s, timeout_graceful_shutdown=limits.drain_s, server_header=False,
        log_level="warning",
    )  # fmt: skip
