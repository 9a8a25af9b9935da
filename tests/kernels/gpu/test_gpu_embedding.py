"""Properties of the Triton embedding: runs of equal ids over chunks, bad ids, a tied head.

Uses the interpreter if there is no GPU. Docstrings name mutations that a test caught if they are not obvious.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from gpu_ops import DEVICE, assert_right, gpu

from peakgpt.bench.check import leaf, sample
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.dispatch import OPS, use_backend

pytestmark = pytest.mark.usefixtures("poison")


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
