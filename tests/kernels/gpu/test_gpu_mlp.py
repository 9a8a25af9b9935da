"""Properties of the Triton MLPs: both strategies, tiles of every architecture, frozen inputs, recompute.

Uses the interpreter if there is no GPU. Docstrings name mutations that a test caught if they are not obvious.
"""

import pytest
import torch

pytest.importorskip("triton")

from gpu_ops import DEVICE, assert_right, gpu

from peakgpt.bench.check import leaf, run, sample
from peakgpt.kernels.core.dispatch import OPS, use_backend

pytestmark = pytest.mark.usefixtures("poison")


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


@pytest.mark.parametrize("trainable", ((0,), (1,), (2,), (3,), (4,), (1, 3)))
def test_mlp_is_right_with_frozen_inputs(trainable):
    tensors = sample("mlp", {"rows": 9, "width": 16, "hidden": 65}, torch.float32, DEVICE)
    for i, t in enumerate(tensors):
        t.requires_grad_(i in trainable)
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
    tensors = sample("mlp", {"rows": 17, "width": 16, "hidden": 64}, torch.bfloat16, DEVICE)  # 16 rows would be skinny
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


@pytest.mark.parametrize("trainable", ((0,), (1, 4), (2,), (3,), (5,), (6,)))
def test_gated_mlp_is_right_with_frozen_inputs(trainable):
    tensors = sample("gated_mlp", {"rows": 9, "width": 16, "hidden": 65}, torch.float32, DEVICE)
    for i, t in enumerate(tensors):
        t.requires_grad_(i in trainable)
    assert_right("gated_mlp", tensors, torch.float32)
