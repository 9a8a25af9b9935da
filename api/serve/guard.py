"""Protect every route: size and time limits, host and API key checks, errors in the format of OpenAI."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import http
import json
import sys

import h11
import uvicorn
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from peakgpt.serve.limits import LIMITS, Limits
from peakgpt.serve.schema import BadRequest

OPEN = "/health"  # needs no key
CHUNK = "peakgpt.chunk"  # ASGI extension: Protocol.chunk
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """ASGI middleware that checks headers, host and API key."""

    def __init__(self, app, *, key: str | None, hosts: tuple[str, ...] | None, limits: Limits):
        """
        Args:
            key: API key that clients must send. None: no key is needed.
            hosts: allowed values of the Host header. They keep web pages from reaching a loopback server through
                their own name (DNS rebinding). None: any.
        """
        self.app, self.hosts, self.limits = app, hosts, limits
        self.digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        try:
            self._check(scope)
        except BadRequest as refusal:
            return await refuse(refusal, send)
        await self.app(scope, receive, send)

    def _check(self, scope) -> None:
        headers, target = scope["headers"], len(scope["raw_path"]) + len(scope["query_string"])
        if target + sum(len(name) + len(value) + 4 for name, value in headers) > self.limits.header_bytes:
            raise BadRequest(f"header: got more than {self.limits.header_bytes} bytes", status=431)
        if len(headers) > self.limits.headers:
            raise BadRequest(f"header: got {len(headers)} lines, expected up to {self.limits.headers}", status=431)
        found = dict(headers)
        host = found.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0] if self.hosts else None
        if self.hosts and host not in self.hosts:
            raise BadRequest(f"host: got {host[:64]!r}, expected one of {', '.join(self.hosts)}", status=403)
        if self.digest and scope["path"] != OPEN and not self._known(found.get(b"authorization", b"")):
            raise BadRequest("no valid API key, expected Authorization: Bearer KEY", status=401, code="invalid_api_key")

    def _known(self, header: bytes) -> bool:
        """Accept Bearer KEY, or Basic with the key as password for browsers. Compares in constant time."""
        kind, _, value = header.partition(b" ")
        if kind.lower() == b"basic":
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                value = b""
        return hmac.compare_digest(hashlib.sha256(value.strip()).digest(), self.digest)


async def refuse(refusal: BadRequest, send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="peakgpt"'))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(request, limits: Limits) -> bytes:
    """Read the body of a JSON request.

    Raises:
        BadRequest: wrong content type, too large, or too slow.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A web page cannot send this type to another site without a CORS preflight, which this server never grants.
        raise BadRequest("content-type: expected application/json", status=415)
    large = BadRequest(f"body: got more than {limits.body_bytes} bytes", status=413)
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
        raise BadRequest(f"body: not there after {limits.body_s} s", status=408) from None
    except ClientDisconnect:
        raise BadRequest("the client went away", status=499) from None
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
                self._refuse(BadRequest("too many connections", status=503))
            else:
                self._expect("head")

        def handle_events(self) -> None:
            super().handle_events()
            begun = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
            self._expect("body" if self.conn.their_state is h11.SEND_BODY else "head" if begun else None)
            if self.scope is not None and self.scope["http_version"] == "1.1":
                self.scope["extensions"] = {CHUNK: self.chunk}

        async def chunk(self, data: bytes) -> None:
            """Send a chunk of a response that has started. Same bytes as `send`, in a tenth of its time."""
            await self.flow.drain()
            if not self.transport.is_closing():
                self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

        def send_400_response(self, msg: str) -> None:
            """Answer with the status of the h11 exception that is being handled."""
            status = getattr(sys.exc_info()[1], "error_status_hint", 400)
            self._refuse(BadRequest(f"{msg} {sys.exc_info()[1]}", status=status))

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

        def _expect(self, what: str | None) -> None:
            """Start the timer for the next part of a request; data that arrives does not restart it."""
            if what == self.reading:
                return
            if self.reading_timer is not None:
                self.reading_timer.cancel()
            self.reading = what
            self.reading_timer = what and self.loop.call_later(seconds[what], self.transport.abort)

        def _refuse(self, refusal: BadRequest) -> None:
            """Answer without a request and close. A response that has started is cut off."""
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
