"""The C++ kernels under every instruction set: counts around the lanes, misalignment, tails, special values.

Values and gradients of whole ops are in test_ops.py; here the widest set's neighbours run too, and memory around a
result must stay as it was. Mutations seen to fail: a tail that stores one lane too many, Exp without its lower clamp,
bfloat16 rounded by truncation, dw partials added by one thread only.
"""

import math
import os
import re
import subprocess
import sys

import pytest
import torch

from peakgpt import _C
from peakgpt.bench.check import double, join_master
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.dispatch import OPS, use_backend
from peakgpt.kernels.cpu import ext
from peakgpt.kernels.cpu.gemm import ACTIVATE, SLOPE, gemm
from peakgpt.kernels.hardware.device import last_level_cache_bytes

POISON = 1234.0
LANES = 16  # of the widest set
COUNTS = (*range(2 * LANES + 1), 1000)
DTYPES = (torch.float32, torch.bfloat16)


def placed(values, offset):
    """The values at an address `offset` elements into a poisoned buffer, with poison behind; and that buffer."""
    buffer = torch.full((offset + values.numel() + LANES,), POISON, dtype=values.dtype)
    inside = buffer[offset : offset + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside, buffer


def assert_untouched(buffer, offset, count):
    outside = torch.cat([buffer[:offset], buffer[offset + count :]])
    assert (outside == POISON).all(), "wrote outside its result"


def activation(name, pre):
    """Through a product with one: it leaves every value as it is."""
    one = torch.ones(1, 1, dtype=pre.dtype)
    return gemm(pre.view(-1, 1), one, torch.empty(pre.numel(), 1, dtype=pre.dtype), epilogue=ACTIVATE,
                activation=name).view(pre.shape)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_of_every_size_of_number(isa, dtype):
    """Every finite bfloat16, and every 99991st float32: as near to float64 as torch is, and digits in the left tail.

    Measured: bfloat16 7.8e-3 forward as torch, 4.1e-3 backward (torch 3.9e-3); float32 5.1e-7 (4.3e-7), 2e-6 (1e-6).
    """
    step = 1 << 16 if dtype == torch.bfloat16 else 99991
    x = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32).view(torch.float32).to(dtype)
    x = x[x.isfinite() & (x.abs() < 1e30)]  # no further does float64's cube go, in torch's backward
    truth, wide = torch.nn.functional.gelu, x.double().requires_grad_()
    (slope,) = torch.autograd.grad(truth(wide, approximate="tanh").sum(), wide)
    ones, one = torch.ones(x.numel(), 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    ours, dx = activation("gelu_tanh", x), torch.empty_like(ones)
    dx = gemm(ones, one, dx, epilogue=SLOPE, pre=x.view(-1, 1), activation="gelu_tanh").view(-1)
    value, near = truth(wide.detach(), approximate="tanh"), x.abs() <= 16
    error, slope_error = (ours.double() - value).abs(), (dx.double() - slope).abs()
    assert error[near].max() <= {torch.float32: 6e-7, torch.bfloat16: 7.8e-3}[dtype]
    assert slope_error.max() <= {torch.float32: 3.2e-6, torch.bfloat16: 4.2e-3}[dtype]
    tail = (x > -5) & (x.abs() > 1e-30)  # further down tanh itself has no digits left in float64's sum with 1
    assert (error[tail] / value[tail].abs()).max() <= {torch.float32: 2.5e-6, torch.bfloat16: 4e-3}[dtype]
    special = torch.tensor([-1e30, -20.0, 1e30, math.inf, math.nan]).to(dtype)
    got = activation("gelu_tanh", special)
    assert got[:2].eq(0).all() and got[2:4].equal(special[2:4]) and got[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", (0, 1, 3))
def test_layernorm_every_width(isa, dtype, offset):
    for width in COUNTS[1:]:
        values, w, b = 3 + torch.randn(3, width).to(dtype), torch.randn(width), torch.randn(width)
        x, _ = placed(values, offset)
        y, buffer = placed(torch.full_like(values, math.nan), offset)
        mu, r = torch.empty(3), torch.empty(3)
        _C.norm_forward(
            dtype=ext.DTYPES[dtype], w_dtype=0, rows=3, width=width, x=x, x_stride=width, w=w, b=b, y=y, mu=mu, r=r,
            eps=1e-5, threads=2,
        )  # fmt: skip
        assert_untouched(buffer, offset, values.numel())
        truth = torch.nn.functional.layer_norm(values.double(), (width,), w.double(), b.double(), 1e-5)
        error = (y.double() - truth).abs().max()
        assert error <= truth.abs().max() * {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype] + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (96, 97))  # rows of whole lines, which go past the caches, and others
def test_large_layernorm_is_its_pieces_to_the_bit(isa, dtype, width):
    """What does not fit the cache is stored past it; and an odd number of rows goes otherwise in pieces of 7."""
    cache = last_level_cache_bytes()
    if cache > 1 << 27:
        pytest.skip(f"a last-level cache of {cache >> 20} MiB")
    rows = max(cache, 32 << 20) // 2 // (width * dtype.itemsize) + 50
    x, residual, up, up_sum = (torch.randn(rows, width).to(dtype) for _ in range(4))
    w, b = torch.randn(2, width)

    def results(part):
        tensors = x[part].requires_grad_(), residual[part].requires_grad_(), w, b
        outputs = [OPS["add_layernorm"](*tensors), (OPS["layernorm"](tensors[0], w, b),)]
        found = [t for ts, ups in zip(outputs, ((up_sum[part], up[part]), (up[part],)), strict=True)
                 for t in (*ts, *torch.autograd.grad(ts, tensors[:1], ups))]  # fmt: skip
        return [t.detach() for t in found]

    whole = results(slice(rows))
    for at in (0, 7, rows - 7):
        for one, piece in zip(whole, results(slice(at, at + 7)), strict=True):
            assert torch.equal(one[at : at + 7], piece)
    assert not any(t.isnan().any() for t in whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (96, 97))
def test_large_embedding(isa, dtype, width):
    """Past the caches, or not: the sum of two rows, to the bit."""
    cache = last_level_cache_bytes()
    if cache > 1 << 27:
        pytest.skip(f"a last-level cache of {cache >> 20} MiB")
    tokens = max(cache, 32 << 20) // 2 // (3 * width * dtype.itemsize) + 50
    ids, wte = torch.randint(50, (3, tokens)), torch.randn(50, width).to(dtype)
    wpe = torch.randn(tokens, width).to(dtype)
    assert torch.equal(OPS["embedding"](ids, wte, wpe), torch.nn.functional.embedding(ids, wte) + wpe)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", (0, 1, 3))
def test_cross_entropy_every_vocabulary(isa, dtype, offset):
    for vocab in COUNTS[1:]:
        values, target = (3 * torch.randn(2, vocab)).to(dtype), torch.tensor([vocab - 1, vocab // 2])
        logits, buffer = placed(values, offset)
        loss, stats = torch.empty(2), torch.empty(2, 2)
        _C.cross_entropy_forward(
            dtype=ext.DTYPES[dtype], rows=2, vocab=vocab, logits=logits, target=target, ignore_index=-100, loss=loss,
            stats=stats, with_gradient=True, scale=0.5, smoothing=0.0, z_loss=0.0, threads=2,
        )  # fmt: skip
        assert_untouched(buffer, offset, values.numel())
        wide = values.double().requires_grad_()
        truth = torch.nn.functional.cross_entropy(wide, target, reduction="none")
        (gradient,) = torch.autograd.grad(truth.sum() * 0.5, wide)
        torch.testing.assert_close(loss.double(), truth.detach(), rtol=2e-6, atol=2e-6)
        m = values.double().amax(1)
        assert torch.equal(stats[:, 0].double(), m)
        torch.testing.assert_close(stats[:, 1].double(), (values - m[:, None]).exp().sum(1), rtol=1e-6, atol=0)
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
        # Powers are right to 2e-7, and 1 - p shows it; times the scale.
        torch.testing.assert_close(logits.double(), gradient, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", (0, 1, 3))
def test_adamw_every_count(isa, dtype, offset):
    options = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.3}
    op, norm = OPS["adamw"], torch.tensor(2.0)
    for count in COUNTS:
        start = op.sample(count, dtype=dtype)[:5]
        held = [(None, None) if t is None else placed(t, offset) for t in start]
        ours, buffers = [inside for inside, _ in held], [buffer for _, buffer in held if buffer is not None]
        step = torch.tensor(3.0)
        with use_backend("cpu"):
            op(*ours, step, norm, **options, max_norm=1.0)
        truth = double(join_master(op, start))
        truth_step = torch.tensor(3.0, dtype=torch.float64)
        with torch.no_grad():
            op.eager(*truth, truth_step, norm.double(), **options, max_norm=1.0)
        assert step == truth_step == 4
        for buffer in buffers:
            assert_untouched(buffer, offset, count)
        for got, expected in zip(double(join_master(op, ours)), truth, strict=True):
            assert got is None or torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-7) is None


def test_adamw_skips_a_step_whose_norm_is_not_finite(isa):
    for bad in (math.nan, math.inf):
        tensors = [torch.randn(33), torch.randn(33), None, torch.randn(33), torch.rand(33), torch.tensor(3.0)]
        before = [None if t is None else t.clone() for t in tensors]
        with use_backend("cpu"):
            OPS["adamw"](*tensors, torch.tensor(bad), lr=0.1, max_norm=1.0)
        assert all(t is None or torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_bfloat16_rounds_as_torch_does(isa):
    """Every upper half with the lower halves around a tie; the native instruction takes subnormals for zero."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (upper[:, None] + lower).flatten().view(torch.float32)
    if isa == "avx512bf16":
        values = values[~(values.abs() < torch.finfo(torch.float32).tiny)]
    # A norm of equal values stores its bias, rounded; NaN payloads may differ, being NaN may not.
    x, weight = torch.ones(1, values.numel(), dtype=torch.bfloat16), torch.copysign(torch.zeros(1), values)
    with use_backend("cpu"):
        (got,) = OPS["layernorm"](x, weight, values)
    expected = values.to(torch.bfloat16)
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int16), expected[~nan].view(torch.int16))


def test_gelu_over_the_whole_range(isa):
    """exp and erf over their range: relative where gelu_tanh has no cancellation, absolute for erf's left tail."""
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30, math.inf])])
    truth = torch.nn.functional.gelu(x.double(), approximate="tanh")
    wide = x.double()
    truth[:200_001] = (wide / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))))[:200_001]
    got = activation("gelu_tanh", x).double()
    error = (got - truth).abs() / truth.abs().clamp_min(1e-37)
    # The exponent, up to 170 here, carries its own rounding into the tail.
    assert error[x.abs() < 3].max() < 2e-6
    assert (got - truth)[:-1].abs().div(x.double()[:-1].abs().clamp_min(1)).max() < 3e-7
    assert got[-1] == math.inf
    got = activation("gelu_erf", x).double()
    truth = torch.nn.functional.gelu(x.double())
    assert (got - truth)[:-1].abs().div(x.double()[:-1].abs().clamp_min(1)).max() < 2e-7
    assert activation("gelu_tanh", torch.tensor([math.nan])).isnan().all()
    assert activation("gelu_erf", torch.tensor([math.nan])).isnan().all()
    assert activation("relu", torch.tensor([math.nan])).isnan().all()


def test_special_rows(isa):
    """What torch makes of subnormal, infinite and NaN rows, we make of them."""
    tiny = 1e-40
    rows = torch.tensor([[tiny, -tiny, 0.0, tiny] * 9, [math.inf, *[1.0] * 35], [math.nan, *[1.0] * 35],
                         [-math.inf, *[1.0] * 35], [1.0] * 36])  # fmt: skip
    w, b = torch.ones(36), torch.zeros(36)
    with use_backend("cpu"):
        got = OPS["layernorm"](rows, w, b)
    torch.testing.assert_close(got, torch.nn.functional.layer_norm(rows, (36,), w, b), equal_nan=True)
    loss, stats, target = torch.empty(5), torch.empty(5, 2), torch.full((5,), 3)
    _C.cross_entropy_forward(
        dtype=0, rows=5, vocab=36, logits=rows, target=target, ignore_index=-100, loss=loss, stats=stats,
        with_gradient=False, scale=1.0, smoothing=0.0, z_loss=0.0, threads=1,
    )  # fmt: skip
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(rows, target, reduction="none"), equal_nan=True, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    ("layernorm", "add_layernorm", "rmsnorm", "add_rmsnorm", "mlp", "gated_mlp", "linear_cross_entropy", "embedding"),
)
def test_every_isa_gives_the_gradients(isa, name, dtype):
    """Widths off the lanes; more rows than parts, so every stage of a reduction runs."""
    sizes = {
        "mlp": {"rows": 70, "width": 19, "hidden": 37},
        "gated_mlp": {"rows": 70, "width": 19, "hidden": 37},
        "linear_cross_entropy": {"rows": 70, "width": 19, "vocab": 131},
        "embedding": {"batch": 3, "tokens": 9, "vocab": 5, "width": 35},
    }.get(name, {"rows": 70, "width": 35})
    torch.manual_seed(0)
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in OPS[name].sample(**sizes, dtype=dtype)]

    def run(backend, tensors):
        with use_backend(backend):
            results = OPS[name](*tensors)
        results = results if isinstance(results, tuple) else (results,)
        wanted = [t for t in tensors if t.requires_grad]
        return *results, *torch.autograd.grad([(r.double() ** 2).sum() for r in results], wanted)

    truth = run("eager", [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors])
    torchs = run("eager", tensors)
    floor = {torch.float32: 1e-6, torch.bfloat16: 2e-3}[dtype]
    for got, eager, true in zip(run("cpu", tensors), torchs, truth, strict=True):
        limit = 2 * (eager.double() - true).abs().max() + floor * true.abs().max()
        assert (got.double() - true).abs().max() <= limit


def test_reductions_do_not_follow_the_thread_count(isa, threads):
    torch.manual_seed(0)
    x, w, b = OPS["layernorm"].sample(rows=130, width=70)
    dy = torch.randn_like(x)
    found = []
    for count in (1, 2, 3):
        threads(count)
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        with use_backend("cpu"):
            OPS["layernorm"](*leaves).backward(dy)
        found.append([t.grad for t in leaves])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_linear_cross_entropy_over_many_blocks(monkeypatch, dtype, reduction):
    """Nine blocks: bfloat16 dw moves to float32 and back twice. Ignored rows and a whole ignored block among them."""
    module = pytest.importorskip("peakgpt.kernels.cpu.linear_cross_entropy")
    monkeypatch.setattr(module, "BLOCK_ROWS", dict.fromkeys(DTYPES, (8, 8)))
    monkeypatch.setattr(module, "LEAST_ROWS", 8)
    torch.manual_seed(0)
    x, w, target = OPS["linear_cross_entropy"].sample(rows=67, width=48, vocab=129, dtype=dtype)
    target[20:40] = -100

    def run(backend, *tensors, before=None):
        leaves = [t.detach().requires_grad_() for t in tensors]
        sinks = {} if before is None else {leaves[1]: before.clone()}
        with use_backend(backend), accumulate_into(sinks):
            loss = OPS["linear_cross_entropy"](*leaves, target, reduction=reduction)
            weights = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
            (loss * weights).sum().backward()
        return loss.detach(), leaves[0].grad, sinks.get(leaves[1], leaves[1].grad)

    truth, torchs, ours = run("eager", x.double(), w.double()), run("eager", x, w), run("cpu", x, w)
    for got, eager, true in zip(ours, torchs, truth, strict=True):
        limit = 2 * (eager.double() - true).abs().max() + 1e-6 * true.abs().max()
        assert (got.double() - true).abs().max() <= limit
    before = (torch.randn_like(true) * true.std()).to(dtype)
    total = run("cpu", x, w, before=before)[2].double() - before.double()
    assert (total - true).abs().max() <= limit + 2 * torch.finfo(dtype).eps * (true.abs() + before.abs()).max()


def test_linear_cross_entropy_of_nothing():
    """No target counts: the mean is NaN and the gradients are zero, as in torch."""
    x, w, target = OPS["linear_cross_entropy"].sample(rows=3, width=8, vocab=5)
    x.requires_grad_(), w.requires_grad_(), target.fill_(-100)
    with use_backend("cpu"):
        loss = OPS["linear_cross_entropy"](x, w, target)
    loss.backward(torch.tensor(1.0))
    assert loss.isnan() and not x.grad.any() and not w.grad.any()


def test_gradient_of_the_head_survives_a_kept_graph():
    """Backward hands out what it saved only where nobody can ask for it again."""
    x, w, target = OPS["linear_cross_entropy"].sample(rows=9, width=8, vocab=5)
    w.requires_grad_()
    with use_backend("cpu"):
        loss = OPS["linear_cross_entropy"](x, w, target)
        loss.backward(retain_graph=True)
        once = w.grad.clone()
        (2 * loss).backward(retain_graph=True)
        torch.testing.assert_close(w.grad, 3 * once)
        loss.backward()
    torch.testing.assert_close(w.grad, 4 * once)


def test_an_unknown_instruction_set_is_an_error():
    with pytest.raises(ValueError, match="'sse9', expected one of scalar"):
        _C.set_isa_cap("sse9")
    code = "import torch; from peakgpt import _C"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PEAKGPT_ISA": "sse9"}, capture_output=True, text=True
    )
    assert result.returncode != 0 and "'sse9', expected one of scalar" in result.stderr


def test_the_cap_from_the_environment():
    code = "import torch; from peakgpt import _C; print(_C.isa())"
    env = {**os.environ, "PEAKGPT_ISA": "scalar"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "scalar\n"


def test_a_wrong_argument_is_an_error_that_names_it():
    """No default stands in for a required argument, and no position for a name."""
    good = {"dtype": 0, "count": 0, "x": None, "total": torch.zeros(()), "threads": 1}
    _C.sum_of_squares(**good)
    _C.sum_of_squares(**dict(reversed(good.items())))  # any order
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


def test_a_wrong_argument_of_a_program_is_an_error_that_names_it():
    program = _C.Program(dtype=0)
    x, out = program.buffer(width=8), program.buffer(width=8)
    with pytest.raises(TypeError, match="norm: missing arguments: w, w_dtype, eps, rms"):
        program.norm(x=x, out=out)
    with pytest.raises(TypeError, match="linear: got an unknown argument 'gates', expected x, out, bias, epilogue"):
        program.linear(weight=_C.DenseWeight(dtype=0, n=8, k=8, packed=None), x=x, gates=out)
    with pytest.raises(TypeError, match="DenseWeight: missing arguments: packed"):
        _C.DenseWeight(dtype=0, n=8, k=8)
    with pytest.raises(TypeError, match=r"run: missing arguments: rows, ids, .*logits, threads"):
        program.run()


def test_a_tensor_with_strided_features_is_an_error():
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
def test_workspaces_serve_wherever_they_were_first_asked_for(code):
    """A tensor made in inference mode can not be written to outside; one on another device has no memory here."""
    done = subprocess.run([sys.executable, "-c", WORKSPACES + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
