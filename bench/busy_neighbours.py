"""Processes that keep a core busy, as a compiler or a test run beside a contender does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# argv[1] is the process that started it. When that one is gone, however it ended, the loop ends too.
BUSY_LOOP = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def busy_neighbours(count: int) -> Iterator[list[int]]:
    """Run busy loops until the context ends. They have the priority of this process and are bound to no CPU.

    They are waited for at the end, so the kernel then adds their time to that of the children of this process, and it
    is not foreign (see cpu_load).

    Yields:
        Their process ids; each of them has begun.
    Raises:
        RuntimeError: one has ended at once.
    """
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_busy_loop()) for _ in range(count)]
        for process in processes:
            if not process.stdout.readline():
                raise RuntimeError(f"busy neighbour ended with exit code {process.wait()}, expected it to run")
        yield [process.pid for process in processes]


@contextlib.contextmanager
def _busy_loop() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-I", "-S", "-c", BUSY_LOOP, str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()
