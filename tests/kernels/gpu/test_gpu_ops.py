"""Properties of the Triton ops beyond test_ops.py: every tile row, several blocks, float16, frozen inputs.

Uses the interpreter if there is no GPU. New tensors hold NaN, so an element that a kernel does not write is noticed.
Docstrings name mutations that a test caught if they are not obvious.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from peakgpt.bench.check import judge, leaf, run, run_mutating, sample, whole
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.dispatch import OPS, load, use_backend
from peakgpt.kernels.gpu import reduce

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill torch.empty with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def double(tensors):
    """Return the tensors in float64 with the same requires_grad."""
    return [
        t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_(t.requires_grad)
        for t in tensors
    ]


def assert_right(name, tensors, dtype, **params):
    """Check the error rule and that a second run gives the same bits; return the results."""
    op = OPS[name]
    go = run_mutating if op.mutates else run
    torchs, truth = go("eager", op, tensors, params), go("eager", op, double(whole(op, tensors)), params)
    ours, again = go("gpu", op, tensors, params), go("gpu", op, tensors, params)
    for i, verdict in enumerate(judge(ours, torchs, truth, dtype)):
        assert verdict.passed, f"result {i}: {verdict}"
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "not repeatable"
    return ours


def gpu(name):
    module = load("gpu", name)
    assert not isinstance(module, str), module
    return module


@pytest.mark.parametrize(
    ("name", "sizes", "params"),
    [
        ("layernorm", {"rows": 5, "width": 129}, {}),
        ("add_layernorm", {"rows": 5, "width": 129}, {}),
        ("mlp", {"rows": 9, "width": 16, "hidden": 129}, {}),
        ("linear_cross_entropy", {"rows": 9, "width": 16, "vocab": 129}, {}),
        ("linear_cross_entropy", {"rows": 9, "width": 16, "vocab": 129}, {"reduction": "none"}),
        ("embedding", {"batch": 2, "tokens": 9, "vocab": 5, "width": 65}, {}),
    ],
)
def test_float16_passes_the_error_rule(name, sizes, params):
    tensors = sample(name, sizes, torch.float16, DEVICE)
    assert_right(name, tensors, torch.float16, **params)


# ---- layernorm ----


@pytest.mark.parametrize(
    ("name", "width"),
    [*(("layernorm", c) for c in (1, 513, 1025, 2049, 4097)), *(("add_layernorm", c) for c in (513, 1025, 8193))],
)
def test_norm_is_right_for_every_tile_row(name, width):
    """Widths one past each row of the table; the last two compute dw and db in a separate kernel."""
    assert_right(name, sample(name, {"rows": 6, "width": width}, torch.float32, DEVICE), torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("layernorm", "add_layernorm", "rmsnorm", "add_rmsnorm"))
def test_wide_norm_is_right_for_a_large_mean(name, dtype, monkeypatch):
    """Five blocks, the last of one column; a mean of 1e3 deviations, which a sum of squares would lose in float32."""
    for limit, value in (("MAX_BLOCK_C", 512), ("WIDE_BLOCK_C", 256)):
        monkeypatch.setattr(gpu("norm"), limit, value)
    tensors = sample(name, {"rows": 3, "width": 1025}, dtype, DEVICE)
    if dtype == torch.float32:
        tensors[0] = leaf(tensors[0].detach() + 1e3)
    assert_right(name, tensors, dtype)


@pytest.fixture
def broad(monkeypatch):
    """Sum over rows in blocks of 1024 columns: 32 or 64 take ten times as long in the interpreter."""
    monkeypatch.setattr(gpu("norm"), "DWDB_BLOCK_C", 1024)
    monkeypatch.setattr(reduce, "BLOCK_C", 1024)


def test_norm_is_right_for_rows_wider_than_16384(broad):
    assert_right("layernorm", sample("layernorm", {"rows": 2, "width": 16385}, torch.bfloat16, DEVICE), torch.bfloat16)


@pytest.mark.parametrize(("name", "width"), [("rmsnorm", 513), ("rmsnorm", 4100), ("add_rmsnorm", 2049)])
def test_rmsnorm_is_right_with_fused_and_separate_sums(name, width, broad):
    """There are more rows than programs."""
    assert_right(name, sample(name, {"rows": 37, "width": width}, torch.float32, DEVICE), torch.float32)


@pytest.mark.parametrize("frozen", range(2))
def test_rmsnorm_is_right_with_frozen_inputs(frozen):
    tensors = sample("rmsnorm", {"rows": 5, "width": 33}, torch.float16, DEVICE)
    tensors[frozen].requires_grad_(False)
    assert_right("rmsnorm", tensors, torch.float16)


def test_norm_is_right_for_more_rows_than_programs(broad):
    """Several blocks a program in both kernels that sum over rows; the last block is partial."""
    for rows, width in ((131, 8), (70, 4100)):
        tensors = sample("layernorm", {"rows": rows, "width": width}, torch.bfloat16, DEVICE)
        assert_right("layernorm", tensors, torch.bfloat16)


def test_add_layernorm_normalizes_the_rounded_sum():
    x, residual, w, b = sample("add_layernorm", {"rows": 5, "width": 33}, torch.bfloat16, DEVICE)
    with use_backend("gpu"):
        total, normed = OPS["add_layernorm"](x, residual, w, b)
        assert torch.equal(total, x + residual) and torch.equal(normed, OPS["layernorm"](total, w, b))


def test_column_sum_is_right_for_several_blocks_of_programs():
    """70 partial sums: two full blocks and a partial one."""
    partial = torch.randn(2, 70, 33, device=DEVICE)
    outs = torch.empty(2, 33, device=DEVICE)
    reduce.sum_partials(partial, *outs)
    torch.testing.assert_close(outs, partial.double().sum(1).float(), rtol=1e-5, atol=1e-5)


def test_norm_is_right_without_bias_and_with_float32_weights():
    x, w, _ = sample("layernorm", {"rows": 5, "width": 33}, torch.bfloat16, DEVICE)
    assert_right("layernorm", [x, leaf(w.float())], torch.bfloat16)


@pytest.mark.parametrize("frozen", range(3))
def test_norm_is_right_with_frozen_inputs(frozen):
    tensors = sample("layernorm", {"rows": 5, "width": 33}, torch.float32, DEVICE)
    tensors[frozen].requires_grad_(False)
    assert_right("layernorm", tensors, torch.float32)


@pytest.mark.parametrize("used", (0, 1))
def test_add_layernorm_gradients_are_right_if_one_result_is_used(used):
    op, tensors = OPS["add_layernorm"], sample("add_layernorm", {"rows": 5, "width": 33}, torch.float32, DEVICE)
    gradients = {}
    for backend in ("eager", "gpu"):
        with use_backend(backend):
            loss = (op(*tensors)[used] ** 3).sum()
        gradients[backend] = torch.autograd.grad(loss, tensors, allow_unused=True)
    for expected, ours in zip(gradients["eager"], gradients["gpu"], strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if expected is None else expected, rtol=1e-4, atol=1e-4)


def test_add_layernorm_leaf_gradients_do_not_share_memory():
    """x and residual have equal gradients, but adding to one must not change the other."""
    op, tensors = OPS["add_layernorm"], sample("add_layernorm", {"rows": 5, "width": 33}, torch.float32, DEVICE)
    for _ in range(2):
        with use_backend("gpu"):
            torch.autograd.backward(sum((t * t).sum() for t in op(*tensors)))
    x, residual = tensors[:2]
    once = x.grad.clone()
    residual.grad.zero_()
    assert x.grad.data_ptr() != residual.grad.data_ptr() and torch.equal(x.grad, once)


def test_norm_objects_with_a_reason():
    x, w, b = sample("layernorm", {"rows": 2, "width": 16}, torch.bfloat16, DEVICE, grad=False)
    objection = gpu("layernorm").objection
    assert objection(x, w, b) is None
    assert "float64" in objection(x.double(), w.double(), None)
    assert "one dtype" in objection(x, w, b.float())
    assert "at least 1" in objection(x[:, :0], w[:0], None)


# ---- mlp ----


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_mlp_weight_gradients_keep_transposed_strides(dtype):
    """The layout of Conv1D."""
    tensors = sample("mlp", {"rows": 9, "width": 16, "hidden": 65}, dtype, DEVICE)
    for i in (1, 3):
        tensors[i] = tensors[i].detach().t().contiguous().t().requires_grad_()
    results = assert_right("mlp", tensors, dtype)
    dw_up, dw_down = results[2], results[4]
    assert dw_up.stride() == tensors[1].stride() and dw_down.stride() == tensors[3].stride()


def test_mlp_is_right_without_biases():
    x, w_up, _, w_down, _ = sample("mlp", {"rows": 9, "width": 16, "hidden": 65}, torch.float32, DEVICE)
    assert_right("mlp", [x, w_up, None, w_down, None], torch.float32)


@pytest.mark.parametrize("wanted", ((0,), (1,), (2,), (3,), (4,), (1, 3)))
def test_mlp_is_right_with_frozen_inputs(wanted):
    tensors = sample("mlp", {"rows": 9, "width": 16, "hidden": 65}, torch.float32, DEVICE)
    for i, t in enumerate(tensors):
        t.requires_grad_(i in wanted)
    assert_right("mlp", tensors, torch.float32)


def test_mlp_gives_the_same_bits_under_no_grad():
    op, tensors = OPS["mlp"], sample("mlp", {"rows": 9, "width": 16, "hidden": 65}, torch.bfloat16, DEVICE)
    with use_backend("gpu"):
        with_grad = op(*tensors)
        with torch.no_grad():
            assert torch.equal(op(*tensors), with_grad)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # 1 / (1 + inf) is 0, which is right
@pytest.mark.parametrize("act", ("gelu_tanh", "gelu_erf", "relu"))
def test_mlp_activations_are_right_far_from_zero(act):
    """Catches cancellation near 1 and an overflowing exponential."""
    x = leaf(torch.tensor([-90.0, -30.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 30.0, 90.0], device=DEVICE)[:, None])
    one = torch.ones(1, 1, device=DEVICE)
    assert_right("mlp", [x, one, None, one, None], torch.float32, activation=act)


FUSED_CASES = [
    ("sm_80", torch.bfloat16, {}),
    ("sm_90", torch.bfloat16, {"activation": "gelu_erf"}),  # TMA, and a tail in every direction
    ("sm_100", torch.float16, {"activation": "relu"}),
    ("sm_90", torch.float32, {}),
    ("sm_90", torch.bfloat16, {"recompute": True}),
]


@pytest.mark.parametrize(("arch", "dtype", "params"), FUSED_CASES, ids=str)
def test_fused_mlp_is_right_with_the_tiles_of_every_architecture(arch, dtype, params, monkeypatch):
    """Fails if both halves of the epilogue write the same columns."""
    monkeypatch.setattr(gpu("mlp").launch, "arch", lambda x: arch)
    tensors = sample("mlp", {"rows": 131, "width": 40, "hidden": 264}, dtype, DEVICE)
    _, arguments = gpu("gemm")._launch(gpu("gemm").FORWARD, tensors[0].detach(), tensors[1].detach().t(), "relu")
    assert arguments["TMA"] == (arch != "sm_80" and dtype != torch.float32)
    with gpu("mlp").use_strategy("fused"):
        assert_right("mlp", tensors, dtype, **params)


@pytest.mark.parametrize("transposed", (False, True))
def test_fused_mlp_is_right_without_tma(transposed, monkeypatch):
    """Rows that do not start at multiples of 16 bytes, and the transposed weights of Conv1D."""
    monkeypatch.setattr(gpu("mlp").launch, "arch", lambda x: "sm_90")
    tensors = sample("mlp", {"rows": 9, "width": 16, "hidden": 67 if not transposed else 72}, torch.bfloat16, DEVICE)
    for i in (1, 3) if transposed else ():
        tensors[i] = tensors[i].detach().t().contiguous().t().requires_grad_()
    with gpu("mlp").use_strategy("fused"):
        results = assert_right("mlp", tensors, torch.bfloat16)
        assert results[2].stride() == tensors[1].stride()
        tensors[2] = tensors[4] = None
        assert_right("mlp", tensors, torch.bfloat16)


def test_mlp_recompute_gives_the_same_bits_as_saving():
    op, tensors = OPS["mlp"], sample("mlp", {"rows": 9, "width": 16, "hidden": 65}, torch.bfloat16, DEVICE)
    for name in ("fused", "library"):
        with gpu("mlp").use_strategy(name):
            saved, recomputed = (run("gpu", op, tensors, {"recompute": recompute}) for recompute in (False, True))
        assert all(torch.equal(a, b) for a, b in zip(saved, recomputed, strict=True))


def test_fused_table_chooses_by_architecture_direction_and_shape(monkeypatch):
    """Without an entry for the architecture, direction and shape, cuBLAS runs."""
    module, called = gpu("mlp"), []
    for name in ("gemm_act_forward", "gemm_act_backward"):
        real = getattr(module.gemm, name)
        monkeypatch.setattr(module.gemm, name, lambda *a, n=name, f=real: called.append(n) or f(*a))
    tensors = sample("mlp", {"rows": 17, "width": 16, "hidden": 64}, torch.bfloat16, DEVICE)  # 16 are few rows
    assert not module.FUSED, "an entry needs a committed measurement"
    here = module.launch.arch(tensors[0])
    for table, expected in (
        ({}, []),
        ({(here, "forward"): {(16, 64)}}, ["gemm_act_forward"]),
        ({(here, "backward"): {(16, 64)}}, ["gemm_act_backward"]),
        ({(here, "forward"): {(64, 16)}, ("sm_90x", "backward"): {(16, 64)}}, []),
    ):
        monkeypatch.setattr(module, "FUSED", table)
        called.clear()
        run("gpu", OPS["mlp"], tensors, {})
        assert called == expected


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_gated_mlp_is_right_for_more_rows_than_programs(dtype):
    tensors = sample("gated_mlp", {"rows": 131, "width": 16, "hidden": 129}, dtype, DEVICE)
    assert_right("gated_mlp", tensors, dtype)


@pytest.mark.parametrize("wanted", ((0,), (1, 4), (2,), (3,), (5,), (6,)))
def test_gated_mlp_is_right_with_frozen_inputs(wanted):
    tensors = sample("gated_mlp", {"rows": 9, "width": 16, "hidden": 65}, torch.float32, DEVICE)
    for i, t in enumerate(tensors):
        t.requires_grad_(i in wanted)
    assert_right("gated_mlp", tensors, torch.float32)


# ---- linear cross-entropy ----


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_cross_entropy_is_right_in_several_blocks(reduction, dtype, monkeypatch):
    """Seven blocks of rows, three of the vocabulary, one target ignored."""
    monkeypatch.setattr(gpu("linear_cross_entropy"), "BLOCK_BYTES", {"memory": 3 * 192 * dtype.itemsize})
    monkeypatch.setattr(gpu("linear_cross_entropy"), "BLOCK_V", 64)
    x, w, target = sample("linear_cross_entropy", {"rows": 20, "width": 16, "vocab": 129}, dtype, DEVICE)
    target[3], target[4] = -100, 128
    assert_right("linear_cross_entropy", [x, w, target], dtype, reduction=reduction, prefer="memory")


def test_cross_entropy_sums_dw_over_blocks_in_float32(monkeypatch):
    """128 blocks add the same value: a bfloat16 sum would stop growing."""
    monkeypatch.setattr(gpu("linear_cross_entropy"), "BLOCK_BYTES", {"memory": 1})
    x, w = torch.ones(128, 4, device=DEVICE).bfloat16(), torch.zeros(4, 4, device=DEVICE).bfloat16()
    tensors = [leaf(x), leaf(w), torch.zeros(128, dtype=torch.long, device=DEVICE)]
    dw = assert_right("linear_cross_entropy", tensors, torch.bfloat16, reduction="sum", prefer="memory")[2]
    assert (dw[:, 0] / dw[1, 0]).tolist() == [-3.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("frozen", (0, 1))
def test_cross_entropy_is_right_with_frozen_inputs(frozen, reduction):
    tensors = sample("linear_cross_entropy", {"rows": 9, "width": 16, "vocab": 9}, torch.float32, DEVICE)
    tensors[frozen].requires_grad_(False)
    assert_right("linear_cross_entropy", tensors, torch.float32, reduction=reduction)


def test_cross_entropy_is_right_for_strided_input_and_int32_targets():
    x, w, target = sample("linear_cross_entropy", {"rows": 12, "width": 16, "vocab": 33}, torch.float32, DEVICE)
    x = x.detach().view(3, 4, 16).transpose(0, 1).requires_grad_()
    assert_right("linear_cross_entropy", [x, w, target.view(4, 3).int()], torch.float32)


def test_cross_entropy_float16_mean_survives_loss_scaling():
    """Tokens that are no target get 1 / 5000 / 64, a subnormal float16 until the loss scale multiplies it."""
    op = OPS["linear_cross_entropy"]
    x, w, target = sample("linear_cross_entropy", {"rows": 64, "width": 8, "vocab": 5000}, torch.float16, DEVICE)
    target.clamp_(max=9)
    _, truth = run_scaled("eager", op, double([x, w, target]), 4096.0)
    _, dw = run_scaled("gpu", op, [x, w, target], 4096.0)
    assert dw.dtype == torch.float16
    error, size = (dw.double() - truth)[10:].norm(), truth[10:].norm()
    assert error < 1e-3 * size


def test_cross_entropy_float16_gradients_are_zero_if_all_targets_are_ignored():
    op = OPS["linear_cross_entropy"]
    x, w, target = sample("linear_cross_entropy", {"rows": 4, "width": 8, "vocab": 9}, torch.float16, DEVICE)
    assert not any(g.any() for g in run_scaled("gpu", op, [x, w, torch.full_like(target, -100)], 1.0))


def run_scaled(backend, op, tensors, scale):
    with use_backend(backend):
        loss = op(*tensors)
    return torch.autograd.grad(loss * scale, tensors[:2])


def test_cross_entropy_gradient_scale_is_not_rounded_to_bfloat16():
    """loss / 3: a scale rounded to bfloat16 is 0.1 % off in every entry, so the mean of the errors shows it."""
    op = OPS["linear_cross_entropy"]
    tensors = sample("linear_cross_entropy", {"rows": 64, "width": 32, "vocab": 64}, torch.bfloat16, DEVICE)
    truth, ours = run_scaled("eager", op, double(tensors), 1 / 3), run_scaled("gpu", op, tensors, 1 / 3)
    for a, t in zip(ours, truth, strict=True):
        assert abs((a.double() * t).sum() / (t * t).sum() - 1) < 5e-4


def test_cross_entropy_target_out_of_range_gives_nan_for_its_token():
    sizes = {"rows": 4, "width": 8, "vocab": 9}
    x, w, target = sample("linear_cross_entropy", sizes, torch.float32, DEVICE, grad=False)
    target[1], target[2] = 9, -7
    loss = torch.empty(4, device=DEVICE)
    params = OPS["linear_cross_entropy"].bind((x, w, target), {"reduction": "none"})[1]
    gpu("linear_cross_entropy").forward((loss,), (), x, w, target, None, **params)
    assert loss.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("prefer", ("memory", "time"))
def test_cross_entropy_prefer_sets_the_number_of_blocks(prefer, monkeypatch):
    """Blocks of 3 rows for "memory", all 9 rows at once for "time"; the values are right in both."""
    module, shapes = gpu("linear_cross_entropy"), []
    monkeypatch.setattr(module, "BLOCK_BYTES", {"memory": 4 * 192 * 4, "time": 1 << 62})
    whole_mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kw: shapes.append(len(a)) or whole_mm(a, b, **kw))
    tensors = sample("linear_cross_entropy", {"rows": 9, "width": 16, "vocab": 129}, torch.float32, DEVICE)
    assert_right("linear_cross_entropy", tensors, torch.float32, prefer=prefer)
    assert set(shapes) == ({3} if prefer == "memory" else {9})


def test_cross_entropy_auto_uses_blocks_for_large_logits(monkeypatch):
    module = gpu("linear_cross_entropy")
    x, w = torch.ones(6, 4, device=DEVICE), torch.ones(33, 4, device=DEVICE)
    monkeypatch.setattr(module, "BLOCK_BYTES", {"memory": 2 * 64 * 4, "time": 1 << 62})
    for limit, blocks in ((6 * 64 * 4, 1), (6 * 64 * 4 - 1, 3)):
        monkeypatch.setattr(module, "AT_ONCE_BYTES", limit)
        assert len(list(module._blocks(x, w, None, None, "auto", None))) == blocks


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_cross_entropy_is_right_with_every_term(dtype, reduction):
    sizes = {"rows": 9, "width": 16, "vocab": 129, "weighted": 1}
    tensors = sample("linear_cross_entropy", sizes, dtype, DEVICE)
    tensors[2][4] = -100
    params = {"reduction": reduction, "label_smoothing": 0.2, "z_loss": 0.05}
    assert_right("linear_cross_entropy", tensors, dtype, **params)


# ---- embedding ----


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "ids",
    [
        [7] * 131,  # one run over five chunks
        [3] * 31 + [5] * 2 + [4] * 31 + [6] * 40,  # runs that end on, before and after an edge
        [3] * 32 + [4] * 32 + [5],
        list(range(16)) * 4,
        [2],
        [],
    ],
    ids=("one", "edges", "exact", "cycle", "single", "none"),
)
def test_embedding_gradient_is_right_for_runs_over_chunk_edges(ids, dtype):
    """`edges` or `one` fail if a sum misses the last chunk of a run or adds the head of the next run."""
    torch.manual_seed(1)
    ids = torch.tensor([ids], dtype=torch.int32, device=DEVICE)
    wte = leaf(torch.randn(17, 5, device=DEVICE).to(dtype))
    assert_right("embedding", [ids, wte], dtype)


def test_embedding_is_right_for_wide_rows_and_later_positions():
    ids, wte, wpe = sample("embedding", {"batch": 3, "tokens": 5, "vocab": 7, "width": 1025}, torch.float32, DEVICE)
    wpe = leaf(torch.cat([wpe.detach(), wpe.detach(), wpe.detach()]))
    dwpe = assert_right("embedding", [ids, wte, wpe], torch.float32, start=4)[2]
    assert not dwpe[:4].any() and not dwpe[9:].any()


@pytest.mark.parametrize("frozen", (1, 2))
def test_embedding_is_right_with_a_frozen_table(frozen):
    tensors = sample("embedding", {"batch": 2, "tokens": 5, "vocab": 7, "width": 8}, torch.float32, DEVICE)
    tensors[frozen].requires_grad_(False)
    assert_right("embedding", tensors, torch.float32)


def test_embedding_nan_and_bad_ids_affect_only_their_rows():
    module, width = gpu("embedding"), 8
    wte = torch.ones(4, width, device=DEVICE)
    ids = torch.tensor([[0, 4, 1, -1, 1]], device=DEVICE)
    y = torch.empty(1, 5, width, device=DEVICE)
    module.forward((y,), (), ids, wte, None, None, start=0)
    assert y.isnan().any(-1).tolist() == [[False, True, False, True, False]]
    module.forward((y,), (), torch.ones_like(ids), wte, wte, ids, start=0)
    assert y.isnan().any(-1).tolist() == [[False, True, False, True, False]]
    dy = torch.ones(1, 5, width, device=DEVICE)
    dy[0, 0] = math.nan
    needs = False, True, False, False
    _, dwte, _, _ = module.backward((dy,), (ids, wte, None, None), (), (), needs, start=0)
    assert dwte[0].isnan().all() and dwte[1:].tolist() == [[2.0] * width, [0.0] * width, [0.0] * width]


def test_embedding_adds_to_the_gradient_of_a_tied_head():
    """In place, summed in float32, repeatable; rows without a token keep the head's bits.

    Fails if a run over several chunks, or a run inside a chunk, overwrites the sink.
    """
    ids = torch.tensor([[7] * 70 + [3, 5, 3]], device=DEVICE)
    wte, wpe = leaf(torch.randn(17, 5, device=DEVICE).bfloat16()), leaf(torch.randn(80, 5, device=DEVICE).bfloat16())
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        sinks = {t: torch.randn(t.shape, device=DEVICE).bfloat16() for t in (wte, wpe)}
        heads = [sink.clone() for sink in sinks.values()]
        up = torch.randn(1, 73, 5, device=DEVICE).bfloat16()
        with use_backend("gpu"), accumulate_into(sinks):
            OPS["embedding"](ids, wte, wpe, start=2).backward(up)
        runs.append(list(sinks.values()))
    rows = torch.zeros(17, 5, dtype=torch.float64, device=DEVICE).index_add_(0, ids[0], up[0].double())
    positions = torch.nn.functional.pad(up[0].double(), (0, 0, 2, 5))
    for sink, head, truth, again in zip(runs[0], heads, (rows, positions), runs[1], strict=True):
        assert torch.equal(sink, (head.float() + truth.float()).bfloat16()) and torch.equal(sink, again)
    assert wte.grad is None and torch.equal(runs[0][0][8:], heads[0][8:])


# ---- adamw ----


@pytest.mark.parametrize("step", (0.0, 1.0, 498.0, 1e5))
@pytest.mark.parametrize("betas", ((0.9, 0.999), (0.9, 0.95), (0.0, 0.99999)))
def test_adamw_bias_correction_has_float32_accuracy(step, betas):
    """1 - 0.99999^1 as a float32 subtraction has a relative error of 1e-3."""
    param, grad, _, m, v, _, _ = sample("adamw", {"count": 65}, torch.float32, DEVICE, grad=False)
    counted = torch.full((), step, device=DEVICE)
    truth = torch.nn.Parameter(param.double())
    reference = torch.optim.AdamW([truth], lr=1e-1, betas=betas)
    reference.state[truth] = {"step": counted.clone().cpu(), "exp_avg": m.double(), "exp_avg_sq": v.double()}
    truth.grad = grad.double()
    reference.step()
    with use_backend("gpu"):
        OPS["adamw"](param, grad, None, m, v, counted, lr=1e-1, beta1=betas[0], beta2=betas[1])
    moved = (truth.detach() - param.double()).abs().max() / truth.detach().abs().max()
    assert moved < 3e-7 and counted.item() == step + 1.0


@pytest.mark.parametrize("norm", (math.nan, math.inf, -math.inf))
def test_adamw_skips_the_update_if_the_norm_is_not_finite(norm):
    tensors = sample("adamw", {"count": 1030}, torch.bfloat16, DEVICE, grad=False)
    tensors[-1] = torch.full((), norm, device=DEVICE)
    after = run_mutating("gpu", OPS["adamw"], tensors, {"lr": 1e-2, "max_norm": 1.0})
    param, _, _, *rest = whole(OPS["adamw"], tensors[:-1])
    assert all(torch.equal(a, b) for a, b in zip(after, (param, *rest), strict=True))


def test_adamw_of_zero_parameters_counts_the_step():
    tensors = sample("adamw", {"count": 0}, torch.float32, DEVICE, grad=False)
    assert run_mutating("gpu", OPS["adamw"], tensors, {"lr": 1e-2})[-1].item() == 4.0


def test_adamw_objects_to_float64():
    param, grad, remainder, *rest = sample("adamw", {"count": 5}, torch.bfloat16, DEVICE, grad=False)
    objection = gpu("adamw").objection
    assert objection(param, grad, remainder, *rest) is None
    assert "float64" in objection(*double([param, grad, None, *rest]))
