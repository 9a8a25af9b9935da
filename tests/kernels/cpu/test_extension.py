"""The C++ extension: which instruction set it chooses, arguments that it refuses, tensors without memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peakgpt import _C
from peakgpt.kernels.core.dispatch import OPS, use_backend


def test_unknown_instruction_set_raises():
    with pytest.raises(ValueError, match="'sse9', expected one of scalar"):
        _C.set_isa_cap("sse9")
    code = "import torch; from peakgpt import _C"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PEAKGPT_ISA": "sse9"}, capture_output=True, text=True
    )
    assert result.returncode != 0 and "'sse9', expected one of scalar" in result.stderr


def test_environment_variable_limits_the_instruction_set():
    assert _active_isa({**os.environ, "PEAKGPT_ISA": "scalar"}) == "scalar"


def test_intels_cpus_multiply_bf16_in_float32():
    """There the instruction for pairs of bf16 is slower than two multiply-adds. PEAKGPT_ISA chooses it all the same."""
    env = {name: value for name, value in os.environ.items() if name != "PEAKGPT_ISA"}
    is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    widest = _C.isas[-1]
    assert _active_isa(env) == ("avx512vnni" if is_intel and widest == "avx512bf16" else widest)
    assert _active_isa({**env, "PEAKGPT_ISA": widest}) == widest


def _active_isa(env):
    code = "import torch; from peakgpt import _C; print(_C.isa())"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip()


def test_invalid_argument_raises_an_error_with_its_name():
    """Required arguments have no default, and arguments have no positions."""
    good = {"dtype": 0, "count": 0, "x": None, "total": torch.zeros(()), "threads": 1}
    _C.sum_of_squares(**good)
    _C.sum_of_squares(**dict(reversed(good.items())))  # in any order
    for wrong, message in (
        ({"counts": 0}, "sum_of_squares: got an unknown argument 'counts', expected dtype, count, x, total, threads"),
        ({"count": 0.5}, "sum_of_squares: argument 'count' is 0.5, expected int"),
        ({"count": 2**63}, "sum_of_squares: argument 'count' is 9223372036854775808, expected int"),
        ({"dtype": 2**31}, "sum_of_squares: argument 'dtype' is 2147483648, expected int"),
        ({"x": "x"}, "sum_of_squares: argument 'x' is a str, expected a tensor, an address or None"),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            _C.sum_of_squares(**good | wrong)
    for name in good:
        with pytest.raises(TypeError, match=f"sum_of_squares: missing arguments: {name}$"):
            _C.sum_of_squares(**{key: value for key, value in good.items() if key != name})
    with pytest.raises(TypeError, match="sum_of_squares: got 5 positional arguments, expected keyword arguments only"):
        _C.sum_of_squares(*good.values())
    with pytest.raises(TypeError, match="missing arguments: dtype, count, x, total, threads"):
        _C.sum_of_squares()


def test_invalid_argument_of_a_program_raises_an_error_with_its_name():
    program = _C.Program(dtype=0)
    x, out = program.buffer(width=8), program.buffer(width=8)
    with pytest.raises(TypeError, match="norm: missing arguments: w, w_dtype, eps, rms"):
        program.norm(x=x, out=out)
    with pytest.raises(TypeError, match="linear: got an unknown argument 'gates', expected x, out, bias, epilogue"):
        program.linear(weight=_C.DenseWeight(dtype=0, n=8, k=8, w=None, w_row=8), x=x, gates=out)
    with pytest.raises(TypeError, match="DenseWeight: missing arguments: w, w_row"):
        _C.DenseWeight(dtype=0, n=8, k=8)
    with pytest.raises(TypeError, match=r"run: missing arguments: rows, ids, .*logits, threads"):
        program.run()


def test_tensor_with_strided_last_axis_raises():
    x = torch.zeros(1, 2, 3, 16)
    fields = {"dtype": 0, "batch": 1, "tokens": 2, "heads": 3, "width": 8, "pairs": 4, "rotated_heads": 3,
              "interleaved": False, "cos": x, "sin": x, "y": x, "threads": 1}  # fmt: skip
    for wrong in (x[..., ::2], x[0], 0, x.data_ptr()):
        with pytest.raises(TypeError, match=r"rotary: argument 'x' is a .*, expected a tensor .*contiguous features"):
            _C.rotary(x=wrong, **fields)


WORKSPACES = """
import torch, peakgpt
model = peakgpt.GPT(peakgpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=31))
ids = torch.randint(31, (2, 8))
"""


@pytest.mark.parametrize(
    "code",
    [
        "with torch.inference_mode():\n    model(ids), model(ids, ids)\nmodel(ids, ids).backward()\n",
        "with torch.device('meta'):\n    model(ids, ids).backward()\n",
    ],
    ids=["after inference_mode", "under another default device"],
)
def test_workspaces_work_in_training_after_their_first_use_elsewhere(code):
    """A tensor made in inference mode cannot be written outside of it. A tensor on meta has no memory."""
    done = subprocess.run([sys.executable, "-c", WORKSPACES + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["layernorm", "linear", "attention"])
def test_a_tensor_without_memory_is_refused_in_forward_and_backward(name):
    """torch's zero tensors have no address, nor has storage that was released: a kernel would read address 0."""
    op = OPS[name]
    tensors = {
        "layernorm": [torch.randn(8, 64), torch.ones(64), torch.zeros(64)],
        "linear": [torch.randn(8, 64), torch.randn(32, 64), None],
        "attention": [torch.randn(1, 5, 2, 16) for _ in "qkv"],
    }[name]
    with use_backend("cpu"):
        out = op(tensors[0].clone().requires_grad_(), *tensors[1:])
        with pytest.raises(ValueError, match="without memory"):
            out.backward(torch._efficientzerotensor(out.shape))
        tensors[0].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="without memory"):
            op(*tensors)
