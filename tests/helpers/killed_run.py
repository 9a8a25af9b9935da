"""Train a tiny run in processes that are killed at random moments; print what came out of it as JSON.

    python killed_run.py FOLDER KILLS STEPS SEED

This process imports everything and then only forks, so that a new process costs milliseconds.
"""

import json
import os
import random
import shutil
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


def bits(path, steps):
    """Return all losses of a finished run, and the files of its last checkpoint."""
    with RunFolder.reopen(path) as run:
        return losses(run), checkpoint_bytes(step_folder(path, steps))


def main(folder, kills, steps, seed):
    torch.set_num_threads(1)
    draw, killed, most = random.Random(seed), 0, 0
    start_s = time.perf_counter()
    assert os.waitpid(process(folder / "whole", steps), 0)[1] == 0
    longest_s = 2.5 * (time.perf_counter() - start_s) / (1 + kills) + 0.1
    whole, path = bits(folder / "whole", steps), folder / "killed"
    while killed < kills:
        child = process(path, steps)
        time.sleep(draw.uniform(0, longest_s))
        os.kill(child, signal.SIGKILL)
        code = os.waitpid(child, 0)[1]
        assert code in (0, signal.SIGKILL), code
        killed += code == signal.SIGKILL
        if (path / "manifest.json").exists():
            assert list(run_faults(path)) == []
        most = max(most, len(saved_steps(path)))
        if code == 0:  # it was faster than expected: once more from the start
            assert bits(path, steps) == whole
            shutil.rmtree(path)
    assert os.waitpid(process(path, steps), 0)[1] == 0
    again, hidden = bits(path, steps), [str(entry) for entry in path.rglob(".*")]
    print(json.dumps({"killed": killed, "most_checkpoints": most, "hidden": hidden, "same_losses": again[0] == whole[0],
                      "same_checkpoint": again[1] == whole[1], "rows": len(again[0])}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
