"""The thread that owns the engine, and how others speak to it: messages in, outputs back into asyncio's loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from peakgpt.engine.scheduler import Engine, Output, SamplingParams

log = logging.getLogger("peakgpt.serve")


@dataclass(eq=False)
class Job:
    """What one HTTP request wants: prompts, each with its parameters.

    `events` gets (prompt's number, output), or an exception, after which nothing comes.
    """

    prompts: Sequence[tuple[Sequence[int], SamplingParams]]
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    numbers: dict[int, int] = field(default_factory=dict)  # the engine's ids -> prompts

    @property
    def continuations(self) -> int:
        return sum(params.n for _, params in self.prompts)

    def tell(self, event: tuple[int, Output] | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed, and nobody listens
            log.debug("an output came after the loop had ended")


class Worker(threading.Thread):
    """Runs the engine for as long as there is work; sleeps otherwise."""

    def __init__(self, engine: Engine):
        super().__init__(name="engine", daemon=True)
        self.engine, self.inbox, self.wake, self.ending = engine, deque(), threading.Condition(), False
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
            job.tell(error)

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
            for job in {id(job): job for job in self.jobs.values()}.values():
                self._cancel(job)
                job.tell(RuntimeError(f"the engine failed: {type(error).__name__}"))
            return
        for output in outputs:
            if job := self.jobs.get(output.request):
                job.tell((job.numbers[output.request], output))
