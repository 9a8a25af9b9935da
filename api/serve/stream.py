"""Iterate over the outputs of a job, and stream them in a response.

Starlette's StreamingResponse would double the cost of each message. This response is cheaper: it detects a client that
disconnects through the queue of outputs on which it waits anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from peakgpt.engine.inference.engine import Output
from peakgpt.serve.guard import CHUNK
from peakgpt.serve.schema import BadRequest
from peakgpt.serve.worker import Job, Worker


class Outputs:
    """Iterate over (prompt number, output) until all sequences of a job end or the client disconnects.

    The job counts in the load of the worker until `end`, which also cancels its unfinished sequences. Iterating raises
    BadRequest.
    """

    def __init__(self, job: Job, worker: Worker, request: Request):
        self.job, self.worker, self.unfinished, self.first = job, worker, job.continuations, None
        worker.load += job.continuations
        worker.submit(job)
        self.watch = asyncio.ensure_future(self._watch_disconnect(request))

    async def begin(self) -> float:
        """Wait for the first output and keep it for the iteration. Returns the waiting time in seconds."""
        begin = time.perf_counter()
        self.first = await self._next()
        return time.perf_counter() - begin

    def end(self) -> None:
        if self.watch is not None:
            self.watch.cancel()
            self.watch = None
            self.worker.cancel(self.job)
            self.worker.load -= self.job.continuations

    def __aiter__(self) -> Outputs:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        if not self.unfinished:
            raise StopAsyncIteration
        item, self.first = self.first or await self._next(), None
        self.unfinished -= item[1].finish_reason is not None
        return item

    async def _next(self) -> tuple[int, Output]:
        event = await self.job.events.get()
        if isinstance(event, BadRequest):
            raise event
        if isinstance(event, Exception):
            raise BadRequest(str(event), status=400 if isinstance(event, ValueError) else 500)
        return event

    async def _watch_disconnect(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.job.events.put_nowait(BadRequest("the client went away", status=499))


class EventStream(Response):
    """A response of server-sent events, each sent at once. Always ends the outputs, also after an error."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], outputs: Outputs):
        self.events, self.outputs, self.status_code, self.background = events, outputs, 200, None
        self.init_headers({"cache-control": "no-cache"})

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with contextlib.aclosing(self.events):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                write = scope.get("extensions", {}).get(CHUNK)
                async for data in self.events:
                    await (write(data) if write else send(body(data, more=True)))
                await send(body(b"", more=False))
        finally:
            self.outputs.end()


def body(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def sse(data: dict[str, Any]) -> bytes:
    """Encode one server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()
