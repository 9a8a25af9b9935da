"""Cases of a head that is split by rows over ranks, and a program that runs them on three processes.

    python vocab_ranks.py FOLDER      each rank writes its results to FOLDER/RANK.pt

test_vocab_parallel.py runs this program and checks the results.
"""

import contextlib
import sys

import process_setup  # noqa: F401  must come before the first import of Triton
import torch
import torch.distributed as dist

from peakgpt.bench.check import run, sample
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.backends import load, use_backend
from peakgpt.kernels.core.dispatch import OPS
from peakgpt.kernels.ops.vocab_parallel import vocab_shard

OP = OPS["linear_cross_entropy"]
WORLD = 3
# ignore_index is a row of the first shard.
EVERY_TERM = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0, "ignore_index": 7}
# Rows of each rank's shard, rows of x, options. 20 rows of x are several blocks.
CASES = {
    "mean": ((17, 65), 9, {}),
    "sum of every term": ((129, 3, 60), 20, {"reduction": "sum", "prefer": "memory", **EVERY_TERM}),
    "mean of every term": ((33, 64), 9, {"reduction": "mean", **EVERY_TERM}),
    "none of every term": ((70, 1, 129), 9, {"reduction": "none", **EVERY_TERM}),
    "no rows": ((17, 65), 0, {"reduction": "sum"}),
    "large spread": ((17, 65), 9, {"reduction": "none"}),
    "large mean": ((17, 64), 9, {"reduction": "mean"}),
}
# Large logits. Spread: one shard has nearly all of the softmax. Mean: every shard has a part of it.
LOGITS = {"large spread": {"spread": 100}, "large mean": {"level": 1000}}

BACKENDS = ("eager", "cpu", "gpu")
CUDA = torch.cuda.is_available()  # gloo cannot gather GPU tensors: with a GPU only the simulated ranks run Triton
GLOO_BACKENDS = tuple(b for b in BACKENDS if b != "gpu" or not CUDA)
DTYPES = (torch.float32, torch.bfloat16)
# The cases that processes run. Few for Triton, because its interpreter is slow.
SPAWNED = [
    *((backend, name, dtype) for backend in ("eager", "cpu") for name in CASES for dtype in DTYPES),
    *((("gpu", "sum of every term", torch.bfloat16), ("gpu", "none of every term", torch.float32)) if not CUDA else ()),
]


def device_of(backend):
    return "cuda" if CUDA and backend == "gpu" else "cpu"


def tensors(name, dtype, device="cpu"):
    """Return x, the whole head, targets and, with every term, weights.

    The first target is ignored. Targets 1 to 3 are at the edges of shards. Target 4, minus the start of its shard,
    equals ignore_index.
    """
    sizes, rows, params = CASES[name]
    weighted = {"weighted": 1} if "z_loss" in params else {}
    shape = {"rows": rows, "width": 48, "vocab": sum(sizes), **weighted, **LOGITS.get(name, {})}
    x, w, target, *weight = sample("linear_cross_entropy", shape, dtype, device)
    if rows:
        ignore_index, last_start = params.get("ignore_index", -100), sum(sizes[:-1])
        looks_ignored = (last_start + ignore_index) % sum(sizes)
        target[:5] = torch.tensor([ignore_index, 0, sizes[0] - 1, sizes[0], looks_ignored])
    return x, w, target, *weight


def shards(name, w):
    return [part.detach().clone().requires_grad_() for part in w.split(CASES[name][0])]


@contextlib.contextmanager
def small_blocks():
    """Reduce the block sizes, so that each backend processes several blocks of rows."""
    cpu, gpu = load("cpu", OP.name), load("gpu", OP.name)
    before = cpu.BLOCK_ROWS, cpu.BLOCK_BYTES, cpu.LEAST_ROWS, gpu.BLOCK_BYTES, gpu.BLOCK_V
    cpu.BLOCK_ROWS, cpu.BLOCK_BYTES, cpu.LEAST_ROWS = dict.fromkeys(DTYPES, (8, 8)), 1024, 2
    gpu.BLOCK_BYTES, gpu.BLOCK_V = {"memory": 1024, "time": 1 << 62}, 64
    yield
    cpu.BLOCK_ROWS, cpu.BLOCK_BYTES, cpu.LEAST_ROWS, gpu.BLOCK_BYTES, gpu.BLOCK_V = before


def results(backend, name, dtype, rank, shard):
    """Loss, dx and dw of one rank."""
    x, w, *rest = tensors(name, dtype, device_of(backend))
    with small_blocks():
        return run(backend, OP, [x, shards(name, w)[rank], *rest], {**CASES[name][2], **shard})


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = {3: dist.group.WORLD, 2: dist.new_group([1, 2])}  # the group of two does not start at rank 0
    shards_of = {}
    for name, (sizes, _, _) in CASES.items():
        group_rank = rank - (WORLD - len(sizes))
        if group_rank >= 0:
            part = shards(name, tensors(name, torch.float32)[1])[group_rank]
            shards_of[name] = group_rank, vocab_shard(part, groups[len(sizes)])
    rank_results = {}
    for backend, name, dtype in SPAWNED:
        if name in shards_of:
            rank_results[backend, name, dtype] = results(backend, name, dtype, *shards_of[name])
            again = results(backend, name, dtype, *shards_of[name])
            assert all(map(torch.equal, rank_results[backend, name, dtype], again)), (backend, name, dtype)
    rank_results["accumulated_dw"] = accumulated_dw(rank)
    rank_results["widths"] = error_message(lambda: vocab_shard(torch.empty(5, 8 + rank // 2)))
    rank_results["rows"] = error_message(lambda: vocab_shard(torch.empty(rank, 8)))
    torch.save(rank_results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def accumulated_dw(rank):
    """Return the buffer of dw, initially ones, after a backward pass that accumulates into it."""
    name = "sum of every term"
    x, w, *rest = tensors(name, torch.float32)
    part = shards(name, w)[rank]
    buffer = torch.ones_like(part)
    with use_backend("cpu"), accumulate_into({part: buffer}):
        OP(x, part, *rest, **CASES[name][2], **vocab_shard(part)).backward()
    return buffer


def error_message(call):
    try:
        call()
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    # Fork before torch has threads. Three imports of these modules would take longer than all cases.
    torch.multiprocessing.start_processes(main, sys.argv[1:], nprocs=WORLD, start_method="fork")
