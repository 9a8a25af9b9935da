"""Experts on the CPU: the bits of single products, and which memory a decoding step reads."""

import subprocess
import sys

import pytest
import torch

from peakgpt import _C
from peakgpt.bench.check import sample
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.dispatch import OPS, use_backend

experts, gated_mlp = OPS["experts"], OPS["gated_mlp"]
SIZES = {"rows": 45, "width": 72, "hidden": 40, "experts": 6, "choices": 2}


@pytest.mark.parametrize("isa", _C.isas)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_row_has_the_bits_of_its_expert_alone(isa, dtype):
    """For any number of other rows: 1 to 4 take the skinny product, more the panels, and threads share the parts."""
    x, _, _, *weights = sample("experts", SIZES, dtype, grad=False)
    ids, threads = torch.randint(6, (45, 1), generator=torch.Generator().manual_seed(1)), torch.get_num_threads()
    ids[ids == 3] = 2  # an expert without rows
    _C.set_isa_cap(isa)
    try:
        with use_backend("cpu"):
            expected = torch.stack([
                gated_mlp(row[None], *(None if w is None else w[e] for w in weights))[0]
                for row, e in zip(x, ids[:, 0].tolist(), strict=True)
            ])  # fmt: skip
            for count, most in ((45, 3), (45, 1), (7, 2)):
                torch.set_num_threads(most)
                y = experts(x[:count], ids[:count], torch.ones(count, 1), *weights)
                assert torch.equal(y, expected[:count])
    finally:
        torch.set_num_threads(threads)
        _C.set_isa_cap(None)


def test_gradients_added_to_buffers_leave_unused_experts_alone():
    x, ids, weights, *parameters = sample("experts", {**SIZES, "biased": 1}, torch.float32)
    ids = ids.clamp(max=3)
    with use_backend("cpu"):
        experts(x, ids, weights, *parameters).sum().backward()
        expected = [p.grad.clone() for p in parameters]
        buffers = {p: torch.full_like(p, 2.0) for p in parameters}
        with accumulate_into(buffers):
            experts(x, ids, weights, *parameters).sum().backward()
    for p, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(buffers[p], grad + 2.0, rtol=1e-5, atol=1e-5)
        assert torch.equal(buffers[p][4:], torch.full_like(p[4:], 2.0))


READS = """
import ctypes, mmap, torch
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.program_executor import ProgramExecutor
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.grouped_linear import GroupedExpertLinear, GroupedFormat
from peakgpt.kernels.core.dispatch import OPS, use_backend

PAGE, libc = mmap.PAGESIZE, ctypes.CDLL(None)

def protect(tensor):
    "Forbid reading the pages that lie in a tensor entirely."
    begin = -(-tensor.data_ptr() // PAGE) * PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE - begin
    assert size > 0 and libc.mprotect(ctypes.c_void_p(begin), ctypes.c_size_t(size), 0) == 0
    return size

count, width = 6, 128
weights = [torch.randn(count, width, width) for _ in range(3)]
w_gate, w_up, w_down = weights
x, ids = torch.randn(1, width), torch.tensor([[4, 1]])
call = lambda: OPS["experts"](x, ids, torch.ones(1, 2), w_gate, None, w_up, None, w_down, None)
with torch.no_grad(), use_backend("cpu"):
    expected = call()
    protected = sum(protect(w[e]) for w in weights for e in (0, 2, 3, 5))
    assert torch.equal(call(), expected)

config = GPTConfig(n_layer=1, n_head=2, n_embd=width, n_inner=width, block_size=64, vocab_size=64, experts=count,
                   experts_every=1, bias=False)
model = GPT(config).eval()
model.transformer.h[0].mlp.router.weight.data.zero_()  # equal shares: the program takes the first two experts
executor = ProgramExecutor(model, 4)
expected = executor.step([Chunk([1, 2], 0, [0])])
dense = [model.transformer.h[0].mlp.experts.get_submodule(name) for name in ("c_fc", "c_proj")]
protected += sum(protect(layer.weight[e]) for layer in dense for e in range(2, count))
assert torch.equal(executor.step([Chunk([1, 2], 0, [1])]), expected)

packed = {name: torch.randint(256, (count, width, width // 2), dtype=torch.uint8) for name in ("c_fc", "c_proj")}
for name, q in packed.items():
    scale = torch.full((count, width, width // 32), 2.0**-6).bfloat16()
    layer = GroupedExpertLinear(q, scale, None, width, GroupedFormat(4, 32, "fp4"))
    setattr(model.transformer.h[0].mlp.experts, name, layer)
executor = ProgramExecutor(model, 4)
assert not torch.equal(executor.step([Chunk([1, 2], 0, [0])]), expected)
expected = executor.step([Chunk([1, 2], 0, [0])])
for name in packed:
    layer = model.transformer.h[0].mlp.experts._modules[name]
    protected += sum(protect(layer.weight[e]) for e in range(2, count))
assert torch.equal(executor.step([Chunk([1, 2], 0, [1])]), expected)
print(protected > 1 << 19)
import os
os._exit(0)  # freeing would read
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as in Linux")
def test_decoding_reads_the_weights_of_active_experts_only():
    """The pages of all other experts are made unreadable, for the op and for the program."""
    done = subprocess.run([sys.executable, "-c", READS], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True", (done.returncode, done.stderr[-2000:])
