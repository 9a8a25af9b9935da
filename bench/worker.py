"""A contender in a process of its own: allocator settings and page faults belong to a process.

Protocol: a JSON request in argv[1]; then for each line on standard input one training step and one JSON line
{"loss", "faults", "peak_bytes"} on standard output. It ends with its input.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any


class Worker:
    """The parent's side: starts the process, makes it step, and stops it."""

    def __init__(self, request: dict[str, Any], environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peakgpt.bench.worker", json.dumps(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        self.last: dict[str, Any] = {}

    def step(self) -> None:
        """One training step; waits for it."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"benchmark worker ended with exit code {self.process.wait()}; its message is above")
        self.last = json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _usage() -> resource.struct_rusage:
    return resource.getrusage(resource.RUSAGE_SELF)


def main() -> None:
    """The child's side."""
    request = json.loads(sys.argv[1])
    import torch

    from peakgpt.bench.contenders import CONTENDERS, random_batch
    from peakgpt.engine.config import GPTConfig
    from peakgpt.engine.train import Recipe

    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    device = torch.device("cpu")
    config = GPTConfig(**request["config"])
    recipe = Recipe(batch=request["batch"], tokens=request["tokens"], dtype=getattr(torch, request["dtype"]))
    trainer = CONTENDERS[request["contender"]].build(config, recipe, device)
    batch = random_batch(config, recipe, device)
    for _ in sys.stdin:
        before = _usage().ru_minflt
        loss = float(trainer.step(*batch))
        usage = _usage()
        answer = {"loss": loss, "faults": usage.ru_minflt - before, "peak_bytes": usage.ru_maxrss * 1024}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
