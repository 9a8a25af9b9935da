"""A head split by rows over ranks gives the loss and the gradients of the whole head, by the rule of test_ops.py.

Mutations that these tests catch: label smoothing over the shard alone, a rank's own lse instead of the combined one, a
target compared with ignore_index after subtracting the shard's start, a target without that subtraction, dx not summed,
row blocks sized by the rank's own shard, an lse in one float32, t not rescaled to the combined m.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from vocab_ranks import (
    BACKENDS,
    CASES,
    DTYPES,
    GLOO_BACKENDS,
    OP,
    SPAWNED,
    WORLD,
    results,
    shards,
    tensors,
)  # fmt: skip

from peakgpt.bench.check import double, judge, run
from peakgpt.kernels.ops.vocab_parallel import Shard, vocab_shard

pytest.importorskip("triton")
SIMULATED = [
    *((backend, name, dtype) for backend in BACKENDS for name in CASES for dtype in DTYPES),
    *(("gpu", name, torch.float16) for name in ("mean of every term", "none of every term")),
]


def whole(name, dtype, device):
    """torch's results of the whole head in this dtype and in float64."""
    inputs = list(tensors(name, dtype, device))
    return run("eager", OP, inputs, CASES[name][2]), run("eager", OP, double(inputs), CASES[name][2])


def assert_right(name, dtype, loss, dx, dw):
    torchs, truth = whole(name, dtype, loss.device)
    verdicts = judge([loss, dx, torch.cat(dw)], torchs, truth, dtype)
    for result, verdict in zip(("loss", "dx", "dw"), verdicts, strict=True):
        assert verdict.passed, f"{result}: {verdict}"


def shard_options(name):
    """The options that vocab_shard returns on each rank."""
    sizes = CASES[name][0]
    return [{"group": "all", "first": sum(sizes[:rank]), "vocab": sum(sizes)} for rank in range(len(sizes))]


class Ranks:
    """Simulated ranks that run one after the other, in three rounds.

    In the first round a rank has the messages of earlier ranks only. After the second round all messages are correct:
    the sum of dx needs correct losses. The third round checks that the messages do not change.
    """

    def __init__(self, monkeypatch, count):
        self.messages = [{} for _ in range(count)]  # of each rank: message index -> tensor
        self.current, self.index, self.last_round = 0, 0, False
        monkeypatch.setattr(dist.distributed_c10d, "_resolve_process_group", lambda name: self)
        monkeypatch.setattr(Shard, "gather", lambda shard, local: self.exchange(local))
        monkeypatch.setattr(Shard, "all_reduce", lambda shard, tensor: tensor.copy_(self.exchange(tensor).sum(0)))

    def size(self):
        return len(self.messages)

    def rank(self):
        return self.current

    def exchange(self, local):
        """Send a tensor of the current rank. Return the tensors of all ranks, with `local` for a missing one."""
        sent, self.index = self.messages[self.current], self.index + 1
        assert not self.last_round or torch.equal(sent[self.index], local)
        sent[self.index] = local.detach().clone()
        return torch.stack([messages.get(self.index, local) for messages in self.messages])

    def run(self, backend, name, dtype):
        """Return (losses, dxs, dws) with one entry per rank."""
        for self.last_round in (False, False, True):
            by_rank = []
            for rank, options in enumerate(shard_options(name)):
                self.current, self.index = rank, 0
                by_rank.append(results(backend, name, dtype, rank, options))
        assert len({len(sent) for sent in self.messages}) == 1, "ranks send different numbers of messages"
        return zip(*by_rank, strict=True)


@pytest.mark.parametrize(("backend", "name", "dtype"), SIMULATED)
def test_simulated_ranks_give_loss_and_gradients_of_the_whole_head(backend, name, dtype, monkeypatch):
    losses, dxs, dws = Ranks(monkeypatch, len(CASES[name][0])).run(backend, name, dtype)
    assert all(torch.equal(losses[0], loss) for loss in losses) and all(torch.equal(dxs[0], dx) for dx in dxs)
    assert_right(name, dtype, losses[0], dxs[0], dws)


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """Return the results of three processes, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parents[2] / "helpers" / "vocab_ranks.py"
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(script.parent), os.environ.get("PYTHONPATH")]))}
    subprocess.run([sys.executable, script, folder], timeout=240, check=True, env={**os.environ, **paths})
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize(("backend", "name", "dtype"), SPAWNED)
def test_processes_give_loss_and_gradients_of_the_whole_head(backend, name, dtype, spawned):
    """Two and three processes. Every rank has the whole loss and dx, bitwise equal."""
    by_rank = [rank[backend, name, dtype] for rank in spawned if (backend, name, dtype) in rank]
    losses, dxs, dws = zip(*by_rank, strict=True)
    assert len(by_rank) == len(CASES[name][0])
    assert all(torch.equal(losses[0], loss) for loss in losses) and all(torch.equal(dxs[0], dx) for dx in dxs)
    assert_right(name, dtype, losses[0], dxs[0], dws)


def test_each_rank_accumulates_the_gradient_of_its_rows(spawned):
    name = "sum of every term"
    inputs = tensors(name, torch.float32)
    dw = torch.autograd.grad(OP(*inputs, **CASES[name][2]), inputs[1])[0]
    torch.testing.assert_close(torch.cat([rank["accumulated_dw"] for rank in spawned]), dw + 1, rtol=1e-5, atol=1e-5)


def test_every_rank_raises_if_another_ranks_weight_does_not_fit(spawned):
    for rank in spawned:
        assert rank["widths"] == "vocab_shard: w has widths 8, 8, 9 by rank, expected one"
        assert rank["rows"] == "vocab_shard: w has 0, 1, 2 rows by rank, expected at least 1"


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", GLOO_BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_one_rank_equals_the_op_without_a_group(reduction, backend, one_rank):
    """Up to rounding."""
    x, w, target = tensors("mean", torch.float32)
    plain = run(backend, OP, [x, w, target], {"reduction": reduction})
    sharded = run(backend, OP, [x, w, target], {"reduction": reduction, **vocab_shard(w)})
    for got, expected in zip(sharded, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_compiles_with_fullgraph(one_rank):
    x, w, target = tensors("mean", torch.float32)
    options = {"reduction": "none", **vocab_shard(w)}
    compiled = torch.compile(lambda *t: OP(*t, **options), fullgraph=True, backend="aot_eager")
    plain = run("cpu", OP, [x, w, target], options)
    for got, expected in zip(run("cpu", compiled, [x, w, target], {}), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", GLOO_BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_loss_with_all_targets_ignored_is_nan_or_zero_with_zero_gradients(reduction, backend, one_rank):
    x, w, target = tensors("mean", torch.float32)
    params = {"reduction": reduction, **vocab_shard(w)}
    loss, dx, dw = run(backend, OP, [x, w, torch.full_like(target, -100)], params)
    assert loss.isnan() if reduction == "mean" else not loss.any()
    assert backend == "eager" or not (dx.any() or dw.any())  # eager's mean has NaN gradients, as in torch


def test_invalid_calls_raise_got_and_expected(one_rank):
    x, w, target = tensors("mean", torch.float32)
    part = shards("mean", w)[1]
    with pytest.raises(ValueError, match="first is 17 and vocab 82 for 65 rows of w in group '', expected the val"):
        OP(x, part, target, first=17, vocab=82)
    with pytest.raises(ValueError, match="first is 18 and vocab 82 for 65 rows of w in group 'all', expected the"):
        OP(x, part, target, group="all", first=18, vocab=82)
    with pytest.raises(ValueError, match="target has values 0 to 82, expected 0 to 81"):
        OP(x, w, target.clamp(0).index_fill(0, torch.tensor(5), 82), **vocab_shard(w))


def test_target_out_of_range_gives_nan(one_rank):
    """On a GPU no check reads the targets before the loss."""
    shard = Shard(dist.group.WORLD.group_name, 0, 5)
    terms = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0}
    loss, _ = shard.losses(torch.ones(4, 3), torch.tensor([4, 5, -1, -100]), **terms)
    assert loss.isnan().tolist() == [False, True, True, False] and loss[3] == 0
