"""Settings that must stand before torch's and Triton's first use."""

import importlib.util
import os

import interpreter
import torch

# Two threads: parallel code runs for real, and a shared machine is not oversubscribed.
torch.set_num_threads(2)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any test module is imported
    if importlib.util.find_spec("triton"):
        interpreter.patch()  # imports Triton, 0.2 s, once a run
