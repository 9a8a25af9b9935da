"""Products of few rows on the GPU: values of every tile row, bits that know nothing of other rows, and who runs when.

Runs in the interpreter where there is no GPU. Mutations that these tests were seen to catch: a slice of C left out of
the sum, a tail of C or of the outputs unmasked, gate and up exchanged, `pre` stored after the activation, a tile chosen
by the number of rows.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from peakgpt.bench.check import judge, run, sample
from peakgpt.kernels.core.dispatch import OPS, use_backend
from peakgpt.kernels.gpu import overlap
from peakgpt.kernels.gpu.gemm import linear, mlp
from peakgpt.kernels.gpu.gemm import skinny_gemm as few_rows
from peakgpt.kernels.ops.mlp import GATES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = ("wide", "narrow")
# Of the interpreter; 1 / (1 + inf) is the right 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
EVERY_ROW = sorted({(tile, width) for (_, width), tile in few_rows.TILES.items()}, key=str)


def random(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


def fresh(*shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def eager(x, w, b, gate, activation):
    """(y, x w^T + b, x g^T + c)."""
    pre = F.linear(x, w, b)
    gate_pre = None if gate is None else F.linear(x, *gate)
    act = GATES.get(activation, lambda t: t)
    return act(pre) if gate is None else act(gate_pre) * pre, pre, gate_pre


def ours(x, w, b, gate, activation):
    y, pre, gate_pre = (fresh(len(x), len(w), dtype=x.dtype) for _ in range(3))
    gates = {} if gate is None else {"gate": (*gate, gate_pre)}
    few_rows.product(x, w, b, y, pre=pre, activation=activation, **gates)
    return y, pre, None if gate is None else gate_pre


def wide_as(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 129, 33), (3, 272, 17), (16, 1025, 9), (5, 7, 1)])
@pytest.mark.parametrize(("gated", "activation"), [(False, None), (False, "gelu_tanh"), (True, "silu")])
def test_values(rows, width, outputs, gated, activation, dtype):
    """The rule for results and for what backward keeps; tails in every direction, more than one step along C."""
    torch.manual_seed(0)
    x, w, b = (3 + random(rows, width, dtype=dtype)), random(outputs, width, dtype=dtype), random(outputs, dtype=dtype)
    gate = (random(outputs, width, dtype=dtype), random(outputs, dtype=dtype)) if gated else None
    got, torchs = ours(x, w, b, gate, activation), eager(x, w, b, gate, activation)
    truth = eager(*wide_as(x, w, b), None if gate is None else wide_as(*gate), activation)
    found = [[t for t in results if t is not None] for results in (got, torchs, truth)]
    for i, verdict in enumerate(judge(*found, dtype)):
        assert verdict.passed, f"result {i}: {verdict}"


@pytest.mark.parametrize(("tile", "width"), EVERY_ROW, ids=str)
def test_every_tile_row(tile, width, monkeypatch):
    monkeypatch.setattr(few_rows, "_tile", lambda x, outputs: tile)
    x, w = random(2, 1100, dtype=torch.bfloat16), random(41, 1100, dtype=torch.bfloat16)
    got, torchs, truth = ([eager_or(x)] for eager_or in (
        lambda x: ours(x, w, None, None, None)[0], lambda x: F.linear(x, w), lambda x: F.linear(x.double(), w.double()),
    ))  # fmt: skip
    assert judge(got, torchs, truth, torch.bfloat16)[0].passed


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_row_knows_nothing_of_others(dtype, width, monkeypatch):
    """The same bits alone, in any place of any number of rows, and beside rows of NaN."""
    monkeypatch.setattr(few_rows.launch, "processors", lambda x: 132 if width == "narrow" else 1)
    x, w, b = random(16, 528, dtype=dtype), random(19, 528, dtype=dtype), random(19, dtype=dtype)
    every = ours(x, w, b, None, "relu")[0]
    for rows, first in itertools.product((1, 2, 7), (0, 5, 9)):
        assert torch.equal(ours(x[first : first + rows], w, b, None, "relu")[0], every[first : first + rows])
    x[3:5] = torch.nan
    others = [i for i in range(16) if i not in (3, 4)]
    assert torch.equal(ours(x, w, b, None, "relu")[0][others], every[others])


def test_the_tile_follows_from_the_outputs_alone(monkeypatch):
    """On an H100: GPT-2's outputs of 768 and 1600 would leave processors without a wide block."""
    monkeypatch.setattr(few_rows.launch, "processors", lambda x: 132)
    chosen = {n: few_rows._tile(random(1, 16, dtype=torch.bfloat16), n) for n in (768, 1600, 2304, 4800, 6400, 50257)}
    wide, narrow = (few_rows.TILES["sm_80", width] for width in WIDTHS)
    assert [n for n, tile in chosen.items() if tile == narrow] == [768, 1600]
    assert [n for n, tile in chosen.items() if tile == wide] == [2304, 4800, 6400, 50257]
    for rows, n in itertools.product((2, 16), chosen):
        assert few_rows._tile(random(rows, 16, dtype=torch.bfloat16), n) == chosen[n]


@pytest.mark.parametrize(
    ("change", "taken"),
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
def test_who_takes_a_product(change, taken):
    x, w = change(random(16, 48, dtype=torch.bfloat16), random(8, 48, dtype=torch.bfloat16))
    assert few_rows.takes(x, w) == taken


def test_every_product_of_few_rows_is_one_kernel(monkeypatch):
    """linear 1, mlp 2, gated_mlp 2; not where the table has no row, and never for 17."""
    calls = []
    real = few_rows.product
    monkeypatch.setattr(few_rows, "product", lambda *a, **k: calls.append(k.get("activation")) or real(*a, **k))
    expected = {"linear": [None], "mlp": ["gelu_tanh", None], "gated_mlp": ["silu", None]}
    with torch.no_grad(), use_backend("gpu"):
        for (name, names), rows in itertools.product(expected.items(), (1, 16, 17)):
            calls.clear()
            OPS[name](*sample(name, {"rows": rows, "width": 16, **sizes(name)}, torch.bfloat16, DEVICE))
            assert calls == (names if rows <= 16 else [])
        monkeypatch.setattr(few_rows, "MOST_ROWS", {})
        OPS["linear"](*sample("linear", {"rows": 1, "width": 16, "out": 8}, torch.bfloat16, DEVICE))
        assert calls == []


def sizes(name):
    return {"out": 24} if name == "linear" else {"hidden": 32}


@pytest.mark.parametrize("name", ("mlp", "gated_mlp"))
def test_recomputed_has_the_bits_of_the_kept_one(name):
    """With biases and without a gradient too."""
    tensors = sample(name, {"rows": 5, "width": 16, "hidden": 32}, torch.bfloat16, DEVICE)
    kept, again = (run("gpu", OPS[name], tensors, {"recompute": recompute}) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    with torch.no_grad(), use_backend("gpu"):
        assert torch.equal(OPS[name](*tensors), kept[0])


def test_the_activation_reads_what_backward_will():
    """`pre` as it is rounded, so that what backward forms again has forward's bits."""
    x, w = random(3, 64, dtype=torch.bfloat16), random(9, 64, dtype=torch.bfloat16)
    y, pre, _ = ours(x, w, None, None, "gelu_tanh")
    again = fresh(3, 9, dtype=torch.bfloat16)
    mlp.mlp_act_fwd[(1,)](pre_ptr=pre, h_ptr=again, N=27, ACT="gelu_tanh", BLOCK_N=32)
    assert torch.equal(y, again)


def test_inputs_with_larger_strides():
    """The last token of each sequence, and a weight that is part of another."""
    x, w = random(3, 4, 32, dtype=torch.bfloat16)[:, -1], random(9, 48, dtype=torch.bfloat16)[:, 16:]
    assert few_rows.takes(x, w) and x.stride(0) == 128 and w.stride(0) == 48
    y = fresh(3, 9, dtype=torch.bfloat16)
    linear.product(x, w, None, y)
    torch.testing.assert_close(y, F.linear(x, w), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("arch", "rows", "early"), [("sm_90", 1, True), ("sm_100", 64, True), ("sm_90", 65, False), ("sm_86", 1, False)]
)
def test_who_starts_before_the_kernel_ahead_has_ended(arch, rows, early, monkeypatch):
    """Never interpreted; the static check sees to what such a kernel does before it waits."""
    monkeypatch.setattr(overlap.launch, "arch", lambda x: arch)
    x = random(1, 16, dtype=torch.bfloat16)
    assert overlap.options(x, rows)["OVERLAP"] == (early and not overlap.interpreted())
    monkeypatch.setattr(overlap, "interpreted", lambda: False)
    assert overlap.options(x, rows) == ({"OVERLAP": True, "launch_pdl": True} if early else {"OVERLAP": False})


@pytest.mark.parametrize("gated", (False, True))
def test_only_aligned_weights_are_fetched_early(gated, monkeypatch):
    """A copy of 16 bytes that does not start on 16 would fault."""
    seen = []
    monkeypatch.setattr(few_rows.overlap, "options", lambda x, rows: seen.append(rows) or {"OVERLAP": False})
    for width, expected in ((48, [3]), (40, [])):
        x, w = random(3, width, dtype=torch.bfloat16), random(9, width, dtype=torch.bfloat16)
        ours(x, w, None, (w, None) if gated else None, "relu")
        assert seen == expected
        seen.clear()
