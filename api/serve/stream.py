"""A job's outputs as they come, and the response that streams them.

Starlette's StreamingResponse costs as much a message as all else that a token's text costs here, so this one does less:
it watches for the client's going away with the queue that it waits at anyway.
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
    """(prompt's number, output) until all of a job's continuations have ended, or the client is gone.

    From the beginning until `end` the job counts among the worker's load; `end` makes the engine forget what is left.
    Iterating raises BadRequest.
    """

    def __init__(self, job: Job, worker: Worker, request: Request):
        self.job, self.worker, self.left, self.held = job, worker, job.continuations, None
        worker.load += job.continuations
        worker.submit(job)
        self.watch = asyncio.ensure_future(self._gone(request))

    async def begin(self) -> float:
        """Wait for the first output, which comes again; returns the seconds it took."""
        begin = time.perf_counter()
        self.held = await self._next()
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
        if not self.left:
            raise StopAsyncIteration
        found, self.held = self.held or await self._next(), None
        self.left -= found[1].finish_reason is not None
        return found

    async def _next(self) -> tuple[int, Output]:
        event = await self.job.events.get()
        if isinstance(event, BadRequest):
            raise event
        if isinstance(event, Exception):
            raise BadRequest(str(event), status=400 if isinstance(event, ValueError) else 500)
        return event

    async def _gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.job.events.put_nowait(BadRequest("the client went away", status=499))


class EventStream(Response):
    """Events made of outputs, each sent at once; in the end the outputs are told so, however it ends."""

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
    """One server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()
