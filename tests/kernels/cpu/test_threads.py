"""Threads of the C++ kernels, with threads of Python, errors, signals and forked processes.

csrc/base/parallel.h is tested without Python in tests/native/test_parallel.cpp.
"""

import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from peakgpt import _C
from peakgpt.kernels.core.dispatch import OPS
from peakgpt.kernels.cpu.gemm import gemm
from peakgpt.kernels.hardware.cpu_threads import cpu_quota


def without_memory(vocab=1 << 58):
    """Call a kernel whose units allocate more memory than there are addresses, before they read anything."""
    loss, target = torch.empty(64), torch.zeros(64, dtype=torch.int64)
    _C.cross_entropy_forward(
        dtype=1, rows=64, vocab=vocab, logits=loss, target=target, ignore_index=-100, loss=loss,
        stats=torch.empty(64, 2), with_gradient=True, smoothing=0.0, z_loss=0.0, threads=2,
    )  # fmt: skip


def test_an_error_of_a_kernel_stays_in_its_thread():
    """Fails if an error ends the process, reaches the call of another thread, or is lost."""
    tensors, rounds = OPS["layernorm"].sample(rows=500, width=64), 100
    product = torch.randn(300, 200), torch.randn(200, 100)
    calls = [
        without_memory,
        lambda: gemm(*product, torch.empty(300, 100)),
        lambda: OPS["layernorm"](*tensors),
    ]
    results, start = [[] for _ in calls], threading.Barrier(len(calls))

    def run(call, seen):
        start.wait()
        for _ in range(rounds):
            try:
                seen.append(call())
            except Exception as error:
                seen.append(type(error))

    callers = [threading.Thread(target=run, args=pair) for pair in zip(calls, results, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results[0] == rounds * [MemoryError]
    for call, seen in zip(calls[1:], results[1:], strict=True):
        expected = call()
        assert len(seen) == rounds and all(torch.equal(result, expected) for result in seen)


def interrupt_inside_kernel(current, interrupted, stop):
    """Send SIGINT when the first element of the current output is written and the last one is not."""
    while not stop.is_set():
        out = current[0]
        if not out[0, 0].isnan() and out[-1, -1].isnan():
            interrupted.append(out)
            os.kill(os.getpid(), signal.SIGINT)
            return


def test_ctrl_c_during_a_kernel_is_raised_when_the_kernel_has_ended():
    """Fails if a kernel holds the GIL, since the thread that sends the signal cannot look then."""
    a, b = torch.randn(4096, 1024), torch.randn(1024, 1024)
    fresh = torch.full((4096, 1024), math.nan)
    expected = gemm(a, b, torch.empty_like(fresh))
    current, interrupted, stop = [fresh], [], threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = threading.Thread(target=interrupt_inside_kernel, args=(current, interrupted, stop))
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100):
                current[0] = fresh.clone()
                gemm(a, b, current[0])
    finally:
        stop.set()
        watcher.join()
        signal.signal(signal.SIGINT, before)
    assert torch.equal(interrupted[0], expected)
    assert torch.equal(gemm(a, b, torch.empty_like(fresh)), expected)


FORK = """
import os, signal, sys
import torch
import peakgpt
from peakgpt.engine.inference.engine import Engine, SamplingParams

torch.set_num_threads(2)
torch.manual_seed(0)
config = peakgpt.GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=256)
engine = Engine(peakgpt.GPT(config).eval())

def tokens():
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=3)
    return [token for output in engine.stream(list(range(20)), params) for token in output.token_ids]

expected = tokens()
if (child := os.fork()) == 0:
    signal.alarm(60)  # a process that hangs ends itself
    if sys.argv[1] == "one":
        torch.set_num_threads(1)
    try:
        print("child:", tokens() == expected, flush=True)
    except RuntimeError as error:
        print("child:", error, flush=True)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child hung"
print("parent:", len(set(expected)) > 3 and tokens() == expected)
"""

SEVERAL = pytest.param(
    "several", "call torch.set_num_threads(1) in the forked process",
    marks=pytest.mark.skipif(math.ceil(cpu_quota() or 2) == 1, reason="the quota of this process is one CPU"),
)  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("count, answer", [("one", "True"), SEVERAL])
def test_a_forked_process_generates_on_one_thread_and_refuses_several(count, answer):
    """OpenMP's threads exist in the parent only; a team of the child would wait for them forever."""
    done = subprocess.run([sys.executable, "-c", FORK, count], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.splitlines()
    assert child.startswith("child: ") and answer in child
    assert parent == "parent: True"
