"""The client of `bench serve`: keeps one streaming request open for each prompt, counts tokens, records their times.

It runs on the cores of the server, so it counts server-sent events in raw bytes and parses JSON only at the end.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

STATUS, EVENT, LAST = b"HTTP/1.1 200", b"data: ", b"data: [DONE]\n\n"
POLL_S = 0.002  # pause between polls: a client that wakes for each event uses a core for most of a step
WAIT_S = 60.0  # limit for the server to start, to send an event, and to end


def first_request_tokens(stream: int, streams: int, tokens: int) -> int:
    """Return the new tokens of the first request of a stream: staggered, so that later prompts arrive one by one."""
    return -(-tokens * (stream + 1) // streams)


@dataclass
class Stream:
    """An open request."""

    number: int
    socket: socket.socket
    begin: float  # time of the request in seconds, by `clock_s`
    tokens: int = 0
    seen: float = 0.0  # time of its last token
    tail: bytes = b""  # last bytes received


@dataclass
class StreamingClient:
    """Keep one request open for each prompt while `take` runs, and count tokens.

    Args:
        port: port of the server on loopback.
        prompts: token ids, one list for each stream.
        tokens: new tokens per request; the first requests are shorter, to stagger the streams.
    """

    port: int
    prompts: Sequence[Sequence[int]]
    tokens: int
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    ended: int = 0  # completed requests
    paused_s: float = 0.0
    left_at: float | None = None

    def reset(self) -> None:
        """Discard the collected times and counts."""
        self.ended = 0
        self.first_s.clear()
        self.between_s.clear()

    def close(self) -> None:
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()

    def clock_s(self) -> float:
        """Return the time without pauses between calls of `take`."""
        return time.perf_counter() - self.paused_s

    def take(self, tokens: int) -> None:
        """Receive at least `tokens` tokens.

        Raises:
            ValueError: an incomplete response or an error status.
        """
        if self.left_at is None:
            for number in range(len(self.prompts)):
                self._begin(number, first_request_tokens(number, len(self.prompts), self.tokens))
        else:
            self.paused_s += time.perf_counter() - self.left_at
        while tokens > 0:
            time.sleep(POLL_S)
            ready = self.selector.select(WAIT_S)
            if not ready:
                raise ValueError(f"serve: got no data for {WAIT_S} s, expected events of {len(self.prompts)} streams")
            tokens -= sum(self._receive(key.data) for key, _ in ready)
        self.left_at = time.perf_counter()

    def _begin(self, number: int, tokens: int) -> None:
        body = json.dumps({"prompt": self.prompts[number], "max_tokens": tokens, "temperature": 0, "stream": True,
                           "stream_options": {"include_usage": True}}).encode()  # fmt: skip
        head = ("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n")  # fmt: skip
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        connection.sendall(head.encode() + body)
        self.selector.register(connection, selectors.EVENT_READ, Stream(number, connection, self.clock_s()))

    def _receive(self, stream: Stream) -> int:
        """Receive bytes and return the number of token events. The last two events of a response are not tokens."""
        data = stream.socket.recv(1 << 16)
        if not data:
            self._end(stream)
            return 0
        if len(stream.tail) < len(STATUS) and not STATUS.startswith((stream.tail + data)[: len(STATUS)]):
            raise ValueError(f"serve: got {(stream.tail + data).decode(errors='replace')!r}, expected status 200")
        window = stream.tail[1 - len(EVENT) :] + data
        new, now_s, last = window.count(EVENT), self.clock_s(), LAST in stream.tail[1 - len(LAST) :] + data
        stream.tail = (stream.tail + data)[-1024:]
        if new:
            (self.between_s if stream.tokens else self.first_s).append(now_s - (stream.seen or stream.begin))
            stream.tokens, stream.seen = stream.tokens + new, now_s
        return new - 2 * last

    def _end(self, stream: Stream) -> None:
        self.selector.unregister(stream.socket)
        stream.socket.close()
        *_, usage, last = stream.tail.split(EVENT)
        if not last.startswith(b"[DONE]"):
            raise ValueError(f"serve: got a stream that ended with {stream.tail[-200:]!r}, expected [DONE]")
        expected = json.loads(usage.split(b"\r\n")[0])["usage"]["completion_tokens"]
        if expected != stream.tokens - 2:
            raise ValueError(f"serve: got {stream.tokens - 2} tokens, expected {expected}")
        self.ended += 1
        self._begin(stream.number, self.tokens)
