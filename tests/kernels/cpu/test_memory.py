"""Memory: training steps touch no fresh pages, and building a trainer makes no second copy of the model."""

import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from peakgpt.kernels.cpu.memory import keep_pages
assert keep_pages() is None
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return (torch.ones(1 << 24) * 2).sum()  # two blocks of 64 MB
for _ in range(3):
    step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


def test_keep_pages_avoids_page_faults_in_steady_state():
    """Without keep_pages a step has about 32,000 page faults."""
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


BUILD = """
import re, sys, torch, peakgpt
from pathlib import Path
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
status = lambda key: int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
config = peakgpt.GPTConfig(n_layer=1, n_head=2, n_embd=256, block_size=8, vocab_size=100_000)
base = status("VmRSS")
trainer = Trainer(peakgpt.GPT(config), TrainConfig(dtype=getattr(torch, sys.argv[1])), steps=1)
print((status("VmHWM") - base) / sum(p.numel() for p in trainer.model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "state"), [("float32", 4 * 4), ("bfloat16", 3 * 2 + 2 * 4)])
def test_building_a_trainer_needs_memory_for_one_copy_of_the_state(dtype, state):
    """Parameter, gradient, moments, and in bfloat16 the remainder. Fails if a whole parameter is split at once."""
    done = subprocess.run([sys.executable, "-c", BUILD, dtype], capture_output=True, text=True, check=True)
    assert float(done.stdout) < state + 1.5, "bytes per parameter"
