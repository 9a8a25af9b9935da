"""Iterate over the outputs of a job, and stream them in a response.

StreamingResponse of Starlette would double the cost of each message. `EventStream` is cheaper, because it waits on one
queue only: a disconnect of the client arrives there like an output.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from peakgpt.engine.inference.sequence import Output, RunningSequence
from peakgpt.serve.errors import BadRequest
from peakgpt.serve.guard import CHUNK
from peakgpt.serve.worker import Job, Worker

PIECE_BYTES = 1 << 16


class Outputs:
    """Iterate over (prompt number, output) until all sequences of a job end or the client disconnects.

    The job counts in the load of the worker from the beginning, before its prompts are encoded, until `end`, which also
    cancels its unfinished sequences.

    Raises:
        BadRequest: while iterating, if the request fails or the client disconnects.
    """

    def __init__(self, worker: Worker, request: Request, continuations: int, queue: int):
        """
        Args:
            continuations: number of sequences of the job.
            queue: limit of the worker's load.
        Raises:
            BadRequest: the queue is full.
        """
        if worker.load + continuations > queue:
            raise BadRequest(f"the queue of {queue} is full", code="rate_limit_exceeded")
        self.job, self.worker, self.unfinished, self.first = Job(), worker, continuations, None
        self.load, self.is_submitted = continuations, False
        worker.load += continuations
        self.watch = asyncio.ensure_future(self._watch_disconnect(request))

    async def submit(self, prompts: Sequence[list[RunningSequence]]) -> float:
        """Submit the job, wait for the first output and keep it for the iteration. Returns the waiting time in seconds.

        So a request that fails at once gets an error status.
        """
        begin = time.perf_counter()
        self.job.prompts, self.is_submitted = prompts, True
        self.worker.submit(self.job)
        self.first = await self._next()
        return time.perf_counter() - begin

    def end(self) -> None:
        if self.watch is not None:
            self.watch.cancel()
            self.watch = None
            if self.is_submitted:
                self.worker.cancel(self.job)
            self.worker.load -= self.load

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
        return event

    async def _watch_disconnect(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.job.events.put_nowait(BadRequest("the client has disconnected", code="client_disconnected"))


class EventStream(Response):
    """A response of server-sent events, without buffering. It always ends the outputs, also after an error."""

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


class WholeResponse(Response):
    """A JSON response that is sent in pieces, so that a client has `write_s` seconds for each of them."""

    media_type = "application/json"

    def __init__(self, content: bytes):
        super().__init__(content)

    async def __call__(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for begin in range(0, len(self.body), PIECE_BYTES):
            await send(body(self.body[begin : begin + PIECE_BYTES], more=True))
        await send(body(b"", more=False))


def body(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def sse(data: dict[str, Any]) -> bytes:
    """Encode one server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()
