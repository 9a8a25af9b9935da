"""Train a tiny run in processes that are killed at random moments; print what came out of it as JSON.

    python killed_run.py FOLDER KILLS STEPS SEED

This process imports everything and then only forks, so that a new process costs milliseconds.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from tiny_run import checkpoint_bytes, losses, make_loop, new_run, train

from peakgpt.engine.checkpoint.run_checkpoints import run_faults
from peakgpt.engine.data.run_layout import saved_steps, step_folder
from peakgpt.engine.training.run_folder import RunFolder

SAVE_EVERY = 3


def go(path, steps):
    """Start the run, or continue it."""
    run = RunFolder.reopen(path) if (path / "manifest.json").exists() else new_run(path)
    train(run, make_loop(run.tokens, steps=steps), save_every=SAVE_EVERY, validate_every=7)


def process(path, steps):
    """Fork a process that runs `go`; return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        warnings.simplefilter("error")
        go(path, steps)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(folder, kills, steps, seed):
    torch.set_num_threads(1)
    draw, killed, counts = random.Random(seed), 0, []
    start = time.perf_counter()
    code = os.waitpid(process(folder / "whole", steps), 0)[1]
    assert code == 0, code
    longest = 2.5 * (time.perf_counter() - start) / (1 + kills)
    path = folder / "killed"
    for _ in range(kills):
        child = process(path, steps)
        time.sleep(draw.uniform(0, longest + 0.1))
        os.kill(child, signal.SIGKILL)
        code = os.waitpid(child, 0)[1]
        assert code in (0, signal.SIGKILL), code
        killed += code == signal.SIGKILL
        if (path / "manifest.json").exists():
            assert list(run_faults(path)) == []
        counts.append(len(saved_steps(path)))
    assert os.waitpid(process(path, steps), 0)[1] == 0
    whole, again = (RunFolder.reopen(folder / name) for name in ("whole", "killed"))
    hidden = [str(p) for p in path.rglob(".*")]
    same = [checkpoint_bytes(step_folder(run.path, steps)) for run in (whole, again)]
    print(json.dumps({
        "killed": killed, "most_checkpoints": max(counts), "hidden": hidden,
        "same_losses": losses(whole) == losses(again),
        "same_checkpoint": same[0] == same[1], "rows": len(losses(again)),
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
