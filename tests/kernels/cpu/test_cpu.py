"""The C++ kernels on every instruction set: sizes around the vector width, misalignment, tails, special values.

test_ops.py tests values and gradients of whole ops on the widest set. These tests run every set and check that memory
around an output is unchanged. Mutations that they catch: a tail that stores one lane too many, Exp without its lower
clamp, bfloat16 rounded by truncation, dw partials added by one thread only.
"""

import math

import pytest
import torch

from peakgpt import _C
from peakgpt.bench.check import double, whole
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.dispatch import OPS, use_backend
from peakgpt.kernels.cpu import ext
from peakgpt.kernels.cpu.gemm import ACTIVATE, SLOPE, gemm
from peakgpt.kernels.hardware.device import last_level_cache_bytes

POISON = 1234.0
LANES = 16  # float32 lanes of the widest instruction set
COUNTS = (*range(2 * LANES + 1), 1000)
DTYPES = (torch.float32, torch.bfloat16)


def in_poison(values, offset):
    """Copy the values into a poisoned buffer, at `offset` elements. Return the copy and the buffer."""
    buffer = torch.full((offset + values.numel() + LANES,), POISON, dtype=values.dtype)
    inside = buffer[offset : offset + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside, buffer


def assert_untouched(buffer, offset, count):
    outside = torch.cat([buffer[:offset], buffer[offset + count :]])
    assert (outside == POISON).all(), "wrote outside of the output"


def activation(name, pre):
    """Apply the activation as the epilogue of a product with 1, which changes no value."""
    one = torch.ones(1, 1, dtype=pre.dtype)
    return gemm(pre.view(-1, 1), one, torch.empty(pre.numel(), 1, dtype=pre.dtype), epilogue=ACTIVATE,
                activation=name).view(pre.shape)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_its_derivative_are_as_exact_as_torchs(isa, dtype):
    """Every finite bfloat16, and every 99991st float32. In the left tail the relative error is small too.

    Measured errors, torch's in parentheses: bfloat16 7.8e-3 (7.8e-3) forward, 4.1e-3 (3.9e-3) backward; float32 5.1e-7
    (4.3e-7) forward, 2e-6 (1e-6) backward.
    """
    step = 1 << 16 if dtype == torch.bfloat16 else 99991
    x = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32).view(torch.float32).to(dtype)
    x = x[x.isfinite() & (x.abs() < 1e30)]  # `special` below has larger values
    gelu, wide = torch.nn.functional.gelu, x.double().requires_grad_()
    (derivative,) = torch.autograd.grad(gelu(wide, approximate="tanh").sum(), wide)
    ones, one = torch.ones(x.numel(), 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    ours, dx = activation("gelu_tanh", x), torch.empty_like(ones)
    dx = gemm(ones, one, dx, epilogue=SLOPE, pre=x.view(-1, 1), activation="gelu_tanh").view(-1)
    truth, near = gelu(wide.detach(), approximate="tanh"), x.abs() <= 16
    error, dx_error = (ours.double() - truth).abs(), (dx.double() - derivative).abs()
    assert error[near].max() <= {torch.float32: 6e-7, torch.bfloat16: 7.8e-3}[dtype]
    assert dx_error.max() <= {torch.float32: 3.2e-6, torch.bfloat16: 4.2e-3}[dtype]
    tail = (x > -5) & (x.abs() > 1e-30)  # below, 1 + tanh has no correct digits in float64
    assert (error[tail] / truth[tail].abs()).max() <= {torch.float32: 2.5e-6, torch.bfloat16: 4e-3}[dtype]
    special = torch.tensor([-1e30, -20.0, 1e30, math.inf, math.nan]).to(dtype)
    got = activation("gelu_tanh", special)
    assert got[:2].eq(0).all() and got[2:4].equal(special[2:4]) and got[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", (0, 1, 3))
def test_layernorm_of_every_width(isa, dtype, offset):
    for width in COUNTS[1:]:
        values, w, b = 3 + torch.randn(3, width).to(dtype), torch.randn(width), torch.randn(width)
        x, _ = in_poison(values, offset)
        y, buffer = in_poison(torch.full_like(values, math.nan), offset)
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
@pytest.mark.parametrize("width", (96, 97))  # 96: rows are whole cache lines and use non-temporal stores; 97: not
def test_large_layernorm_is_bitwise_equal_to_its_pieces(isa, dtype, width):
    """Outputs larger than the cache use non-temporal stores. Pieces of 7 rows use ordinary stores."""
    cache = last_level_cache_bytes()
    if cache > 1 << 27:
        pytest.skip(f"the last-level cache is too large: {cache >> 20} MiB")
    rows = max(cache, 32 << 20) // 2 // (width * dtype.itemsize) + 50
    x, residual, dy, dsum = (torch.randn(rows, width).to(dtype) for _ in range(4))
    w, b = torch.randn(2, width)

    def results(part):
        tensors = x[part].requires_grad_(), residual[part].requires_grad_(), w, b
        outputs = [OPS["add_layernorm"](*tensors), (OPS["layernorm"](tensors[0], w, b),)]
        grads = (dsum[part], dy[part]), (dy[part],)
        pairs = zip(outputs, grads, strict=True)
        values = [t for ts, gs in pairs for t in (*ts, *torch.autograd.grad(ts, tensors[:1], gs))]
        return [t.detach() for t in values]

    complete = results(slice(rows))
    for start in (0, 7, rows - 7):
        for tensor, piece in zip(complete, results(slice(start, start + 7)), strict=True):
            assert torch.equal(tensor[start : start + 7], piece)
    assert not any(t.isnan().any() for t in complete)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (96, 97))
def test_large_embedding_is_bitwise_equal_to_torchs(isa, dtype, width):
    """With non-temporal stores (width 96) and without (97)."""
    cache = last_level_cache_bytes()
    if cache > 1 << 27:
        pytest.skip(f"the last-level cache is too large: {cache >> 20} MiB")
    tokens = max(cache, 32 << 20) // 2 // (3 * width * dtype.itemsize) + 50
    ids, wte = torch.randint(50, (3, tokens)), torch.randn(50, width).to(dtype)
    wpe = torch.randn(tokens, width).to(dtype)
    assert torch.equal(OPS["embedding"](ids, wte, wpe), torch.nn.functional.embedding(ids, wte) + wpe)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", (0, 1, 3))
def test_cross_entropy_of_every_vocabulary_size(isa, dtype, offset):
    for vocab in COUNTS[1:]:
        values, target = (3 * torch.randn(2, vocab)).to(dtype), torch.tensor([vocab - 1, vocab // 2])
        logits, buffer = in_poison(values, offset)
        loss, stats = torch.empty(2), torch.empty(2, 2)
        _C.cross_entropy_forward(
            dtype=ext.DTYPES[dtype], rows=2, vocab=vocab, logits=logits, target=target, ignore_index=-100, loss=loss,
            stats=stats, with_gradient=True, scale=torch.tensor(0.5), smoothing=0.0, z_loss=0.0, threads=2,
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
        # exp has a relative error of 2e-7. It is the absolute error of 1 - p near p = 1, and the scale halves it.
        torch.testing.assert_close(logits.double(), gradient, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", (0, 1, 3))
def test_adamw_of_every_count(isa, dtype, offset):
    options = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.3}
    op, norm = OPS["adamw"], torch.tensor(2.0)
    for count in COUNTS:
        start = op.sample(count, dtype=dtype)[:5]
        pairs = [(None, None) if t is None else in_poison(t, offset) for t in start]
        ours, buffers = [inside for inside, _ in pairs], [buffer for _, buffer in pairs if buffer is not None]
        step = torch.tensor(3.0)
        with use_backend("cpu"):
            op(*ours, step, norm, **options, max_norm=1.0)
        truth = double(whole(op, start))
        truth_step = torch.tensor(3.0, dtype=torch.float64)
        with torch.no_grad():
            op.eager(*truth, truth_step, norm.double(), **options, max_norm=1.0)
        assert step == truth_step == 4
        for buffer in buffers:
            assert_untouched(buffer, offset, count)
        for got, expected in zip(double(whole(op, ours)), truth, strict=True):
            assert got is None or torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-7) is None


def test_adamw_skips_a_step_whose_norm_is_not_finite(isa):
    for bad in (math.nan, math.inf):
        tensors = [torch.randn(33), torch.randn(33), None, torch.randn(33), torch.rand(33), torch.tensor(3.0)]
        before = [None if t is None else t.clone() for t in tensors]
        with use_backend("cpu"):
            OPS["adamw"](*tensors, torch.tensor(bad), lr=0.1, max_norm=1.0)
        assert all(t is None or torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_bfloat16_rounds_as_torch_does(isa):
    """Every upper half, with the lower halves around a tie. The native instruction rounds subnormals to zero."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (upper[:, None] + lower).flatten().view(torch.float32)
    if isa == "avx512bf16":
        values = values[~(values.abs() < torch.finfo(torch.float32).tiny)]
    # A LayerNorm of equal values returns its rounded bias. NaN stays NaN, with any payload.
    x, weight = torch.ones(1, values.numel(), dtype=torch.bfloat16), torch.copysign(torch.zeros(1), values)
    with use_backend("cpu"):
        (got,) = OPS["layernorm"](x, weight, values)
    expected = values.to(torch.bfloat16)
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int16), expected[~nan].view(torch.int16))


def test_gelu_of_minus_12_to_12_and_extreme_values(isa):
    """Relative error for gelu_tanh where it has no cancellation, absolute error for the left tail of gelu_erf."""
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30, math.inf])])
    truth = torch.nn.functional.gelu(x.double(), approximate="tanh")
    wide = x.double()
    truth[:200_001] = (wide / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))))[:200_001]
    got = activation("gelu_tanh", x).double()
    error = (got - truth).abs() / truth.abs().clamp_min(1e-37)
    # In the tail the exponent is up to 170, so its rounding error is large.
    assert error[x.abs() < 3].max() < 2e-6
    assert (got - truth)[:-1].abs().div(x.double()[:-1].abs().clamp_min(1)).max() < 3e-7
    assert got[-1] == math.inf
    got = activation("gelu_erf", x).double()
    truth = torch.nn.functional.gelu(x.double())
    assert (got - truth)[:-1].abs().div(x.double()[:-1].abs().clamp_min(1)).max() < 2e-7
    assert activation("gelu_tanh", torch.tensor([math.nan])).isnan().all()
    assert activation("gelu_erf", torch.tensor([math.nan])).isnan().all()
    assert activation("relu", torch.tensor([math.nan])).isnan().all()


def test_subnormal_infinite_and_nan_rows_equal_torchs(isa):
    """LayerNorm and cross-entropy."""
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
        with_gradient=False, smoothing=0.0, z_loss=0.0, threads=1,
    )  # fmt: skip
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(rows, target, reduction="none"), equal_nan=True, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    ("layernorm", "add_layernorm", "rmsnorm", "add_rmsnorm", "mlp", "gated_mlp", "linear_cross_entropy", "embedding"),
)
def test_values_and_gradients_are_within_twice_torchs_error(isa, name, dtype):
    """Widths are no multiple of the lanes. With more rows than partial sums every stage of a reduction runs."""
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
        leaves = [t for t in tensors if t.requires_grad]
        return *results, *torch.autograd.grad([(r.double() ** 2).sum() for r in results], leaves)

    truth = run("eager", [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors])
    torchs = run("eager", tensors)
    floor = {torch.float32: 1e-6, torch.bfloat16: 2e-3}[dtype]
    for got, eager, true in zip(run("cpu", tensors), torchs, truth, strict=True):
        limit = 2 * (eager.double() - true).abs().max() + floor * true.abs().max()
        assert (got.double() - true).abs().max() <= limit


def test_reductions_do_not_depend_on_the_number_of_threads(isa, threads):
    torch.manual_seed(0)
    x, w, b = OPS["layernorm"].sample(rows=130, width=70)
    dy = torch.randn_like(x)
    gradients = []
    for count in (1, 2, 3):
        threads(count)
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        with use_backend("cpu"):
            OPS["layernorm"](*leaves).backward(dy)
        gradients.append([t.grad for t in leaves])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_linear_cross_entropy_over_many_blocks(monkeypatch, dtype, reduction):
    """Nine blocks, some of them with ignored rows only. A bfloat16 dw is added to its float32 sum twice."""
    module = pytest.importorskip("peakgpt.kernels.cpu.linear_cross_entropy")
    monkeypatch.setattr(module, "BLOCK_ROWS", dict.fromkeys(DTYPES, (8, 8)))
    monkeypatch.setattr(module, "LEAST_ROWS", 8)
    torch.manual_seed(0)
    x, w, target = OPS["linear_cross_entropy"].sample(rows=67, width=48, vocab=129, dtype=dtype)
    target[20:40] = -100

    def run(backend, *tensors, before=None):
        leaves = [t.detach().requires_grad_() for t in tensors]
        buffers = {} if before is None else {leaves[1]: before.clone()}
        with use_backend(backend), accumulate_into(buffers):
            loss = OPS["linear_cross_entropy"](*leaves, target, reduction=reduction)
            weights = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
            (loss * weights).sum().backward()
        return loss.detach(), leaves[0].grad, buffers.get(leaves[1], leaves[1].grad)

    truth, torchs, ours = run("eager", x.double(), w.double()), run("eager", x, w), run("cpu", x, w)
    for got, eager, true in zip(ours, torchs, truth, strict=True):
        limit = 2 * (eager.double() - true).abs().max() + 1e-6 * true.abs().max()
        assert (got.double() - true).abs().max() <= limit
    before = (torch.randn_like(true) * true.std()).to(dtype)
    total = run("cpu", x, w, before=before)[2].double() - before.double()
    assert (total - true).abs().max() <= limit + 2 * torch.finfo(dtype).eps * (true.abs() + before.abs()).max()


def test_mean_loss_without_targets_is_nan_with_zero_gradients():
    """As in torch."""
    x, w, target = OPS["linear_cross_entropy"].sample(rows=3, width=8, vocab=5)
    x.requires_grad_(), w.requires_grad_(), target.fill_(-100)
    with use_backend("cpu"):
        loss = OPS["linear_cross_entropy"](x, w, target)
    loss.backward(torch.tensor(1.0))
    assert loss.isnan() and not x.grad.any() and not w.grad.any()


def test_retained_graph_gives_the_same_gradient_of_the_head_again():
    """Fails if backward returns or overwrites its saved tensors although the graph is retained."""
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
