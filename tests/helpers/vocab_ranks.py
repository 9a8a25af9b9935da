"""Ranks of a head that is cut by rows: the cases that test_vocab_parallel.py judges, and three ranks as processes.

    python vocab_ranks.py FOLDER      runs them; what each finds lands in FOLDER/RANK.pt
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
EVERY_TERM = {"label_smoothing": 0.1, "z_loss": 1e-2, "ignore_index": 7}  # a row of the first shard
# Rows of each rank's shard, rows of x, options. Twenty rows are several blocks; "nothing" is none.
CASES = {
    "mean": ((17, 65), 9, {}),
    "sum of every term": ((129, 3, 60), 20, {"reduction": "sum", "prefer": "memory", **EVERY_TERM}),
    "mean of every term": ((33, 64), 9, {"reduction": "mean", **EVERY_TERM}),
    "none of every term": ((70, 1, 129), 9, {"reduction": "none", **EVERY_TERM}),
    "nothing": ((17, 65), 0, {"reduction": "sum"}),
    "far apart": ((17, 65), 9, {"reduction": "none"}),
    "far up": ((17, 64), 9, {"reduction": "mean"}),
}
# Large logits: one shard has nearly all of the softmax; every shard has some.
LOGITS = {"far apart": {"spread": 100}, "far up": {"level": 1000}}

BACKENDS = ("eager", "cpu", "gpu")
CUDA = torch.cuda.is_available()  # gloo gathers no tensors of a GPU: there its kernels are left to Ranks
GATHERING = tuple(b for b in BACKENDS if b != "gpu" or not CUDA)
DTYPES = (torch.float32, torch.bfloat16)
# What processes run; the interpreter is slow.
SPAWNED = [
    *((backend, name, dtype) for backend in ("eager", "cpu") for name in CASES for dtype in DTYPES),
    *((("gpu", "sum of every term", torch.bfloat16), ("gpu", "none of every term", torch.float32)) if not CUDA else ()),
]


def home(backend):
    return "cuda" if CUDA and backend == "gpu" else "cpu"


def tensors(name, dtype, device="cpu"):
    """x, the whole head, targets and, with every term, weights.

    The first target is to be ignored, others lie at a shard's edges; one looks ignored if counted from its shard.
    """
    sizes, rows, params = CASES[name]
    weighted = {"weighted": 1} if "z_loss" in params else {}
    shape = {"rows": rows, "width": 48, "vocab": sum(sizes), **weighted, **LOGITS.get(name, {})}
    x, w, target, *weight = sample("linear_cross_entropy", shape, dtype, device)
    if rows:
        ignored = params.get("ignore_index", -100)
        target[:5] = torch.tensor([ignored, 0, sizes[0] - 1, sizes[0], (sum(sizes[:-1]) + ignored) % sum(sizes)])
    return x, w, target, *weight


def shards(name, w):
    return [part.detach().clone().requires_grad_() for part in w.split(CASES[name][0])]


@contextlib.contextmanager
def small_blocks():
    """Several blocks of rows, by backend as it cuts them."""
    cpu, gpu = load("cpu", OP.name), load("gpu", OP.name)
    before = cpu.BLOCK_ROWS, cpu.BLOCK_BYTES, cpu.LEAST_ROWS, gpu.BLOCK_BYTES, gpu.BLOCK_V
    cpu.BLOCK_ROWS, cpu.BLOCK_BYTES, cpu.LEAST_ROWS = dict.fromkeys(DTYPES, (8, 8)), 1024, 2
    gpu.BLOCK_BYTES, gpu.BLOCK_V = {"memory": 1024, "time": 1 << 62}, 64
    yield
    cpu.BLOCK_ROWS, cpu.BLOCK_BYTES, cpu.LEAST_ROWS, gpu.BLOCK_BYTES, gpu.BLOCK_V = before


def results(backend, name, dtype, rank, shard):
    """Loss, dx and dw of one rank."""
    x, w, *rest = tensors(name, dtype, home(backend))
    with small_blocks():
        return run(backend, OP, [x, shards(name, w)[rank], *rest], {**CASES[name][2], **shard})


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = {3: dist.group.WORLD, 2: dist.new_group([1, 2])}  # of two: one that does not begin at 0
    shards_of = {}
    for name, (sizes, _, _) in CASES.items():
        at = rank - (WORLD - len(sizes))
        if at >= 0:
            part = shards(name, tensors(name, torch.float32)[1])[at]
            shards_of[name] = at, vocab_shard(part, groups[len(sizes)])
    found = {}
    for backend, name, dtype in SPAWNED:
        if name in shards_of:
            found[backend, name, dtype] = results(backend, name, dtype, *shards_of[name])
            again = results(backend, name, dtype, *shards_of[name])
            assert all(map(torch.equal, found[backend, name, dtype], again)), (backend, name, dtype)
    found["sunk"] = sunk(rank)
    found["widths"] = told(lambda: vocab_shard(torch.empty(5, 8 + rank // 2)))
    found["rows"] = told(lambda: vocab_shard(torch.empty(rank, 8)))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def sunk(rank):
    """dw where a training loop keeps its gradients."""
    name = "sum of every term"
    x, w, *rest = tensors(name, torch.float32)
    part = shards(name, w)[rank]
    sink = torch.ones_like(part)
    with use_backend("cpu"), accumulate_into({part: sink}):
        OP(x, part, *rest, **CASES[name][2], **vocab_shard(part)).backward()
    return sink


def told(call):
    try:
        call()
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    # Forked before torch has threads: importing all this three times would take longer than all cases.
    torch.multiprocessing.start_processes(main, sys.argv[1:], nprocs=WORLD, start_method="fork")
