"""The skinny GEMM: values of every tile row, bits independent of other rows, and the conditions under which it runs.

Uses the interpreter if there is no GPU. Mutations that these tests caught: a slice of C missing in the sum, a tail of C
or of the outputs unmasked, gate and up exchanged, `pre` stored after the activation, a tile chosen by the number of
rows.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from peakgpt.bench.check import judge, run, sample
from peakgpt.kernels.core.dispatch import OPS, use_backend
from peakgpt.kernels.gpu import overlap
from peakgpt.kernels.gpu.gemm import linear, mlp, skinny_gemm
from peakgpt.kernels.ops.mlp import GATES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = ("wide", "narrow")
# From the interpreter; 1 / (1 + inf) is 0, which is right.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
EVERY_ROW = sorted({(tile, width) for (_, width), tile in skinny_gemm.TILES.items()}, key=str)


def random(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


def fresh(*shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def eager(x, w, b, gate, activation):
    """Return (y, x w^T + b, x g^T + c)."""
    pre = F.linear(x, w, b)
    gate_pre = None if gate is None else F.linear(x, *gate)
    act = GATES.get(activation, lambda t: t)
    return act(pre) if gate is None else act(gate_pre) * pre, pre, gate_pre


def ours(x, w, b, gate, activation):
    y, pre, gate_pre = (fresh(len(x), len(w), dtype=x.dtype) for _ in range(3))
    gates = {} if gate is None else {"gate": (*gate, gate_pre)}
    skinny_gemm.skinny_gemm_out(x, w, b, y, pre=pre, activation=activation, **gates)
    return y, pre, None if gate is None else gate_pre


def wide_as(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 129, 33), (3, 272, 17), (16, 1025, 9), (5, 7, 1)])
@pytest.mark.parametrize(("gated", "activation"), [(False, None), (False, "gelu_tanh"), (True, "silu")])
def test_results_and_saved_tensors_pass_the_error_rule(rows, width, outputs, gated, activation, dtype):
    """The shapes have tails in every direction and more than one step along C."""
    torch.manual_seed(0)
    x, w, b = (3 + random(rows, width, dtype=dtype)), random(outputs, width, dtype=dtype), random(outputs, dtype=dtype)
    gate = (random(outputs, width, dtype=dtype), random(outputs, dtype=dtype)) if gated else None
    got, torchs = ours(x, w, b, gate, activation), eager(x, w, b, gate, activation)
    truth = eager(*wide_as(x, w, b), None if gate is None else wide_as(*gate), activation)
    compared = [[t for t in results if t is not None] for results in (got, torchs, truth)]
    for i, verdict in enumerate(judge(*compared, dtype)):
        assert verdict.passed, f"result {i}: {verdict}"


@pytest.mark.parametrize(("tile", "width"), EVERY_ROW, ids=str)
def test_every_tile_row_is_right(tile, width, monkeypatch):
    monkeypatch.setattr(skinny_gemm, "_tile", lambda x, outputs: tile)
    x, w = random(2, 1100, dtype=torch.bfloat16), random(41, 1100, dtype=torch.bfloat16)
    got, torchs, truth = ([eager_or(x)] for eager_or in (
        lambda x: ours(x, w, None, None, None)[0], lambda x: F.linear(x, w), lambda x: F.linear(x.double(), w.double()),
    ))  # fmt: skip
    assert judge(got, torchs, truth, torch.bfloat16)[0].passed


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bits_of_a_row_do_not_depend_on_other_rows(dtype, width, monkeypatch):
    """A row has the same bits alone, at any index of any number of rows, and next to rows of NaN."""
    monkeypatch.setattr(skinny_gemm.launch, "processors", lambda x: 132 if width == "narrow" else 1)
    x, w, b = random(16, 528, dtype=dtype), random(19, 528, dtype=dtype), random(19, dtype=dtype)
    every = ours(x, w, b, None, "relu")[0]
    for rows, first in itertools.product((1, 2, 7), (0, 5, 9)):
        assert torch.equal(ours(x[first : first + rows], w, b, None, "relu")[0], every[first : first + rows])
    x[3:5] = torch.nan
    others = [i for i in range(16) if i not in (3, 4)]
    assert torch.equal(ours(x, w, b, None, "relu")[0][others], every[others])


def test_tile_depends_on_the_number_of_outputs_only(monkeypatch):
    """On an H100, wide tiles for GPT-2's 768 and 1600 outputs would leave processors idle."""
    monkeypatch.setattr(skinny_gemm.launch, "processors", lambda x: 132)
    outputs = (768, 1600, 2304, 4800, 6400, 50257)
    chosen = {n: skinny_gemm._tile(random(1, 16, dtype=torch.bfloat16), n) for n in outputs}
    wide, narrow = (skinny_gemm.TILES["sm_80", width] for width in WIDTHS)
    assert [n for n, tile in chosen.items() if tile == narrow] == [768, 1600]
    assert [n for n, tile in chosen.items() if tile == wide] == [2304, 4800, 6400, 50257]
    for rows, n in itertools.product((2, 16), chosen):
        assert skinny_gemm._tile(random(rows, 16, dtype=torch.bfloat16), n) == chosen[n]


@pytest.mark.parametrize(
    ("change", "supported"),
    [
        (lambda x, w: (x, w), True),
        (lambda x, w: (x[:1], w), True),
        (lambda x, w: (x.repeat(2, 1)[:17], w), False),
        (lambda x, w: (x[:0], w), False),
        (lambda x, w: (x, w.t().contiguous().t()), False),
        (lambda x, w: (x[:, 8:], w[:, 8:]), False),
        (lambda x, w: (x, F.pad(w, (0, 8))[:, :48]), False),
        (lambda x, w: (x.float(), w.float()), False),
    ],
)
def test_supports_only_few_aligned_half_precision_rows(change, supported):
    x, w = change(random(16, 48, dtype=torch.bfloat16), random(8, 48, dtype=torch.bfloat16))
    assert skinny_gemm.supports(x, w) == supported


def test_linear_and_mlps_use_skinny_gemm_up_to_16_rows(monkeypatch):
    """linear launches 1 kernel, mlp 2, gated_mlp 2; none without a row in the table, none for 17 rows."""
    calls = []
    real = skinny_gemm.skinny_gemm_out

    def record(*args, **options):
        calls.append(options.get("activation"))
        return real(*args, **options)

    monkeypatch.setattr(skinny_gemm, "skinny_gemm_out", record)
    expected = {"linear": [None], "mlp": ["gelu_tanh", None], "gated_mlp": ["silu", None]}
    with torch.no_grad(), use_backend("gpu"):
        for (name, names), rows in itertools.product(expected.items(), (1, 16, 17)):
            calls.clear()
            OPS[name](*sample(name, {"rows": rows, "width": 16, **sizes(name)}, torch.bfloat16, DEVICE))
            assert calls == (names if rows <= 16 else [])
        monkeypatch.setattr(skinny_gemm, "MAX_ROWS", {})
        OPS["linear"](*sample("linear", {"rows": 1, "width": 16, "out": 8}, torch.bfloat16, DEVICE))
        assert calls == []


def sizes(name):
    return {"out": 24} if name == "linear" else {"hidden": 32}


@pytest.mark.parametrize("name", ("mlp", "gated_mlp"))
def test_recompute_gives_the_same_bits_as_saving(name):
    """With biases, and also under no_grad."""
    tensors = sample(name, {"rows": 5, "width": 16, "hidden": 32}, torch.bfloat16, DEVICE)
    saved, recomputed = (run("gpu", OPS[name], tensors, {"recompute": recompute}) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(saved, recomputed, strict=True))
    with torch.no_grad(), use_backend("gpu"):
        assert torch.equal(OPS[name](*tensors), saved[0])


def test_activation_reads_the_rounded_pre_activation():
    """The activation that backward recomputes from `pre` then has the bits of the forward pass."""
    x, w = random(3, 64, dtype=torch.bfloat16), random(9, 64, dtype=torch.bfloat16)
    y, pre, _ = ours(x, w, None, None, "gelu_tanh")
    again = fresh(3, 9, dtype=torch.bfloat16)
    mlp.mlp_act_fwd[(1,)](pre_ptr=pre, h_ptr=again, N=27, ACT="gelu_tanh", BLOCK_N=32)
    assert torch.equal(y, again)


def test_strided_inputs_give_the_values_of_linear():
    """x is the last token of each sequence; the weight is a slice of a larger one."""
    x, w = random(3, 4, 32, dtype=torch.bfloat16)[:, -1], random(9, 48, dtype=torch.bfloat16)[:, 16:]
    assert skinny_gemm.supports(x, w) and x.stride(0) == 128 and w.stride(0) == 48
    y = fresh(3, 9, dtype=torch.bfloat16)
    linear.linear_out(x, w, None, y)
    torch.testing.assert_close(y, F.linear(x, w), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("arch", "rows", "early"), [("sm_90", 1, True), ("sm_100", 64, True), ("sm_90", 65, False), ("sm_86", 1, False)]
)
def test_early_start_only_on_sm_90_and_sm_100_up_to_64_tokens(arch, rows, early, monkeypatch):
    """The interpreter never starts early. The static check covers the memory accesses before the wait."""
    monkeypatch.setattr(overlap.launch, "arch", lambda x: arch)
    x = random(1, 16, dtype=torch.bfloat16)
    assert overlap.options(x, rows)["OVERLAP"] == (early and not overlap.interpreted())
    monkeypatch.setattr(overlap, "interpreted", lambda: False)
    assert overlap.options(x, rows) == ({"OVERLAP": True, "launch_pdl": True} if early else {"OVERLAP": False})


@pytest.mark.parametrize("gated", (False, True))
def test_only_aligned_weights_are_prefetched(gated, monkeypatch):
    """A 16-byte copy from an unaligned address would fault."""
    seen = []
    monkeypatch.setattr(skinny_gemm.overlap, "options", lambda x, rows: seen.append(rows) or {"OVERLAP": False})
    for width, expected in ((48, [3]), (40, [])):
        x, w = random(3, width, dtype=torch.bfloat16), random(9, width, dtype=torch.bfloat16)
        ours(x, w, None, (w, None) if gated else None, "relu")
        assert seen == expected
        seen.clear()
