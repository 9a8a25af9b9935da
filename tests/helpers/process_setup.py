"""Settings of a test process. Import it before the first use of torch or Triton."""

import importlib.util
import os

import interpreter
import torch

# Two threads are enough to test parallel code and do not overload a shared machine.
torch.set_num_threads(2)

# A test that misspells a folder does not ask the hub for it. Tests of the hub have a server of their own.
os.environ["HF_HUB_OFFLINE"] = "1"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any test module is imported
    if importlib.util.find_spec("triton"):
        interpreter.patch()  # imports Triton, 0.2 s, once per run
