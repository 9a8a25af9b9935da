"""The thread that owns the engine: it takes messages from the server and posts outputs to the asyncio loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peakgpt.engine.inference.engine import Engine
from peakgpt.engine.inference.interrupts import INTERRUPTS
from peakgpt.engine.inference.sequence import RunningSequence
from peakgpt.serve.errors import BadRequest

log = logging.getLogger("peakgpt.serve")


@dataclass(eq=False)
class Job:
    """The prompts of one HTTP request, each with the sequences that continue it.

    `events` receives (prompt number, output) items, or an exception as its last item.
    """

    prompts: Sequence[list[RunningSequence]] = ()
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    numbers: dict[int, int] = field(default_factory=dict)  # request id of the engine -> prompt number


class Worker(threading.Thread):
    """Run the engine while it has work; sleep otherwise."""

    def __init__(self, engine: Engine):
        super().__init__(name="engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None  # receives the events; set before start()
        self.on_failure: Callable[[], None] = lambda: None  # called in the loop if the thread ends by an exception
        self.engine, self.inbox, self.wake = engine, deque(), threading.Condition()
        self.jobs: dict[int, Job] = {}  # request id of the engine -> job
        self.load = 0  # unfinished sequences; used by the asyncio thread only
        self.failed = False  # the thread has ended by an exception

    def submit(self, job: Job) -> None:
        self._post("submit", job)

    def cancel(self, job: Job) -> None:
        self._post("cancel", job)

    def stop(self) -> None:
        self._post("stop", None)
        self.join()

    def run(self) -> None:
        try:
            self._run()
        except BaseException:
            log.critical("the engine thread has ended", exc_info=True)
            self._fail()

    def _run(self) -> None:
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

    def _fail(self) -> None:
        """End all jobs, including those submitted while this method runs."""
        with self.wake:
            self.failed = True
            jobs = {*self.jobs.values(), *(job for action, job in self.inbox if action == "submit")}
        self._post_events([(job, engine_stopped()) for job in jobs])
        self._call_in_loop(self.on_failure)

    def _post(self, action: str, job: Job | None) -> None:
        with self.wake:
            self.inbox.append((action, job))
            self.wake.notify()
            failed = self.failed
        if failed and action == "submit":
            job.events.put_nowait(engine_stopped())

    def _submit(self, job: Job) -> None:
        for number, sequences in enumerate(job.prompts):
            request = sequences[0].request.request_id
            self.jobs[request], job.numbers[request] = job, number
            try:
                self.engine.add(sequences)
            except Exception as error:
                self._cancel(job)
                return self._post_events([(job, engine_error(error))])

    def _cancel(self, job: Job) -> None:
        for request in job.numbers:
            self.engine.cancel(request)
            self.jobs.pop(request, None)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except INTERRUPTS:
            raise
        except BaseException as error:
            # The failing request is unknown: end all of them and keep the engine running.
            log.exception("a step failed")
            jobs = {id(job): job for job in self.jobs.values()}.values()
            for job in jobs:
                self._cancel(job)
            self._post_events([(job, engine_error(error)) for job in jobs])
            return
        events = []
        for output in outputs:
            job = self.jobs.get(output.request_id)
            if job and output.error:
                log.error("request %d failed", output.request_id, exc_info=output.error)
                self._cancel(job)
                events.append((job, engine_error(output.error)))
            elif job:
                events.append((job, (job.numbers[output.request_id], output)))
        self._post_events(events)

    def _post_events(self, events: list[tuple[Job, Any]]) -> None:
        """Post all events of a step in one call, because each call wakes the loop through a pipe."""
        self._call_in_loop(_put, events)

    def _call_in_loop(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed
            log.debug("dropped outputs: the event loop is closed")


def engine_error(error: BaseException) -> BadRequest:
    return BadRequest(f"the engine failed: {type(error).__name__}", code="internal_error")


def engine_stopped() -> BadRequest:
    return BadRequest("the engine has stopped, and the server is about to exit", code="engine_stopped")


def _put(events: list[tuple[Job, Any]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)
