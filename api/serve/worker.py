"""The thread that owns the engine: it takes messages from the server and posts outputs to the asyncio loop."""

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
    """The prompts of one HTTP request, each with its sampling parameters.

    `events` receives (prompt number, output) items, or an exception as its last item.
    """

    prompts: Sequence[tuple[Sequence[int], SamplingParams]]
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    numbers: dict[int, int] = field(default_factory=dict)  # request id of the engine -> prompt number

    @property
    def continuations(self) -> int:
        return sum(params.n for _, params in self.prompts)


class Worker(threading.Thread):
    """Run the engine while it has work; sleep otherwise."""

    def __init__(self, engine: Engine):
        super().__init__(name="engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None  # receives the events; set before start()
        self.engine, self.inbox, self.wake = engine, deque(), threading.Condition()
        self.jobs: dict[int, Job] = {}  # request id of the engine -> job
        self.load = 0  # sequences not ended; used by the asyncio thread only

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
            for action, job in messages:
                if action == "stop":
                    return
                (self._submit if action == "submit" else self._cancel)(job)
            if self.engine.has_work:
                self._step()

    def _post(self, action: str, job: Job | None) -> None:
        with self.wake:
            self.inbox.append((action, job))
            self.wake.notify()

    def _submit(self, job: Job) -> None:
        try:
            for number, (ids, params) in enumerate(job.prompts):
                request = self.engine.submit(ids, params)
                self.jobs[request], job.numbers[request] = job, number
        except Exception as error:  # any error here belongs to this request
            self._cancel(job)
            self._post_events([(job, error)])

    def _cancel(self, job: Job) -> None:
        for request in job.numbers:
            self.engine.cancel(request)
            self.jobs.pop(request, None)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            # The failing request is unknown: end all of them and keep the engine running.
            log.exception("a step failed")
            jobs = {id(job): job for job in self.jobs.values()}.values()
            for job in jobs:
                self._cancel(job)
            self._post_events([(job, RuntimeError(f"the engine failed: {type(error).__name__}")) for job in jobs])
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
        self._post_events(events)

    def _post_events(self, events: list[tuple[Job, Any]]) -> None:
        """Post the events of a step together, because each call wakes the loop through a pipe."""
        try:
            self.loop.call_soon_threadsafe(_put, events)
        except RuntimeError:  # the loop is closed
            log.debug("outputs after the end of the loop")


def _put(events: list[tuple[Job, Any]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)
