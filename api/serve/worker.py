"""The thread that owns the engine, and how others speak to it: messages in, outputs back into asyncio's loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peakgpt.engine.inference.engine import Engine, SamplingParams

log = logging.getLogger("peakgpt.serve")


@dataclass(eq=False)
class Job:
    """What one HTTP request wants: prompts, each with its parameters.

    `events` gets (prompt's number, output), or an exception, after which nothing comes.
    """

    prompts: Sequence[tuple[Sequence[int], SamplingParams]]
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    numbers: dict[int, int] = field(default_factory=dict)  # the engine's ids -> prompts

    @property
    def continuations(self) -> int:
        return sum(params.n for _, params in self.prompts)


class Worker(threading.Thread):
    """Runs the engine for as long as there is work; sleeps otherwise."""

    def __init__(self, engine: Engine):
        super().__init__(name="engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None  # in which events are put; whoever starts this sets it
        self.engine, self.inbox, self.wake = engine, deque(), threading.Condition()
        self.jobs: dict[int, Job] = {}  # the engine's ids -> who wants the outputs
        self.load = 0  # continuations asked for and not ended; of asyncio's thread

    def submit(self, job: Job) -> None:
        self._post("submit", job)

    def cancel(self, job: Job) -> None:
        self._post("cancel", job)

    def stop(self) -> None:
        self._post("stop", None)
        self.join()

    def run(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.inbox or self.engine.has_work)
                messages = [self.inbox.popleft() for _ in range(len(self.inbox))]
            for what, job in messages:
                if what == "stop":
                    return
                (self._submit if what == "submit" else self._cancel)(job)
            if self.engine.has_work:
                self._step()

    def _post(self, what: str, job: Job | None) -> None:
        with self.wake:
            self.inbox.append((what, job))
            self.wake.notify()

    def _submit(self, job: Job) -> None:
        try:
            for number, (ids, params) in enumerate(job.prompts):
                request = self.engine.submit(ids, params)
                self.jobs[request], job.numbers[request] = job, number
        except Exception as error:  # whatever it is, it is this request's
            self._cancel(job)
            self._tell([(job, error)])

    def _cancel(self, job: Job) -> None:
        for request in job.numbers:
            self.engine.cancel(request)
            self.jobs.pop(request, None)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            # Nobody can tell whose step it was: all of them end, and the engine goes on with none.
            log.exception("a step failed")
            jobs = {id(job): job for job in self.jobs.values()}.values()
            for job in jobs:
                self._cancel(job)
            self._tell([(job, RuntimeError(f"the engine failed: {type(error).__name__}")) for job in jobs])
            return
        events = []
        for output in outputs:
            job = self.jobs.get(output.request_id)
            if job and output.error:
                log.error("request %d failed", output.request_id, exc_info=output.error)
                self._cancel(job)
                events.append((job, RuntimeError(f"the engine failed: {type(output.error).__name__}")))
            elif job:
                events.append((job, (job.numbers[output.request_id], output)))
        self._tell(events)

    def _tell(self, events: list[tuple[Job, Any]]) -> None:
        """Once a step, for all: each call wakes the loop through a pipe."""
        try:
            self.loop.call_soon_threadsafe(_put, events)
        except RuntimeError:  # the loop is closed, and nobody listens
            log.debug("outputs came after the loop had ended")


def _put(events: list[tuple[Job, Any]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)
