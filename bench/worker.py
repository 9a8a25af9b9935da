"""A contender in a process of its own: allocator settings and page faults belong to a process.

Protocol: a JSON request in argv[1]; then for each line on standard input one training step and one JSON line
{"loss", "faults", "peak_bytes"} on standard output. It ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from typing import Any

CLOSE_S = 20.0  # for a process to end by itself


class Worker:
    """The parent's side: starts the process, makes it step, and stops it."""

    def __init__(self, name: str, request: dict[str, Any], environment: dict[str, str]):
        """
        Args:
            name: for error messages.
            request: contender, config, batch, tokens, dtype, warmup, threads.
            environment: variables beside this process's own.
        """
        self.name, self.last = name, {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peakgpt.bench.worker", json.dumps(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        self.pid = self.process.pid

    def step(self) -> float:
        """One training step; waits for it and returns its loss.

        Raises:
            RuntimeError: the process has ended; what it said is on standard error.
        """
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"benchmark worker {self.name!r} ended with exit code {code}; its message is above")
        self.last = json.loads(line)
        return self.last["loss"]

    def memory_bytes(self) -> int | None:
        """The most that the process held."""
        return self.last.get("peak_bytes")

    @property
    def note(self) -> str:
        return f"{self.name}: {self.last['faults']} page faults in the last step" if self.last else ""

    def close(self) -> None:
        """End the process and wait for it; one that does not end is killed."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def _usage() -> resource.struct_rusage:
    return resource.getrusage(resource.RUSAGE_SELF)


def main() -> None:
    """The child's side."""
    request = json.loads(sys.argv[1])
    import torch

    from peakgpt.bench.contenders import CONTENDERS, start
    from peakgpt.engine.config import GPTConfig
    from peakgpt.engine.train import Recipe

    torch.set_num_threads(request["threads"])
    device = torch.device("cpu")
    config = GPTConfig(**request["config"])
    recipe = Recipe(batch=request["batch"], tokens=request["tokens"], dtype=getattr(torch, request["dtype"]),
                    warmup=request["warmup"])  # fmt: skip
    state, batch = start(config, recipe, device)
    trainer = CONTENDERS[request["contender"]].build(state, config, recipe, device)
    for _ in sys.stdin:
        before = _usage().ru_minflt
        loss = float(trainer.step(*batch))
        usage = _usage()
        answer = {"loss": loss, "faults": usage.ru_minflt - before, "peak_bytes": usage.ru_maxrss * 1024}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
