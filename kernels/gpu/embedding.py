"""Token and position embedding in Triton. The backward pass scatters by sorting, without atomics.

    sorted, order = stable sort of ids          equal ids are adjacent and form a run
    1. embedding_bwd_chunks: a program adds the rows of CHUNK sorted ids one by one. A run that lies inside the chunk
       is complete. The part of a run that began in an earlier chunk goes to head[chunk]. The part of a run that begins
       here and continues in the next chunk goes to tail[chunk].
    2. embedding_bwd_runs: a run over several chunks gets dwte += tail[chunk] + head[chunk + 1] + ... to its end.

Every sum has a fixed order, so the result is the same from run to run. If one token fills the whole batch, its sum
takes CHUNK steps plus one for each chunk. Each row of the table has one run and so a single writer. The writer adds to
the values already in dwte: zeros, or the sink of `accumulate_into` with the gradient of a tied head. An id out of range
gives a row of NaN in the forward pass and is skipped in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch, overlap
from peakgpt.kernels.gpu.launch import AotCase, Tile

# Not measured on hardware. 8 columns a thread are one 16-byte load of a half-precision type.
BLOCK_C, CHUNK, TILE = 1024, 32, Tile(warps=4)


@triton.jit(do_not_specialize=("T", "start"))
def embedding_fwd(
    ids_ptr, wte_ptr, wpe_ptr, positions_ptr, y_ptr, T, V, P, C, start, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr
):
    """Store one row of y: wte[id] + wpe[position]. The position is start + t unless positions_ptr is given."""
    overlap.wait_for_previous(OVERLAP)
    n = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.load(ids_ptr + n).to(tl.int64)
    end = tl.where((i >= 0) & (i < V), C, 0)
    y = tl.load(wte_ptr + i * C + col, mask=col < end, other=float("nan")).to(tl.float32)
    if wpe_ptr is not None:
        p = start + n % T
        if positions_ptr is not None:
            p = tl.load(positions_ptr + n).to(tl.int64)
        end = tl.where((p >= 0) & (p < P), C, 0)
        y += tl.load(wpe_ptr + p * C + col, mask=col < end, other=float("nan")).to(tl.float32)
    tl.store(y_ptr + n * C + col, y.to(y_ptr.dtype.element_ty), mask=col < C)


@triton.jit
def embedding_bwd_chunks(
    sorted_ptr, order_ptr, dy_ptr, dwte_ptr, head_ptr, tail_ptr, stride_dy_n, N, V, C,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Stage 1: sum the runs of one chunk of sorted ids."""
    chunk = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = chunk * CHUNK
    left = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    acc = tl.zeros([BLOCK_C], tl.float32)
    from_left = (first > 0) & (tl.load(sorted_ptr + first) == left)
    for n in range(first, tl.minimum(first + CHUNK, N)):
        i = tl.load(sorted_ptr + n).to(tl.int64)
        row = tl.load(order_ptr + n)
        acc += tl.load(dy_ptr + row * stride_dy_n + col, mask=col < C, other=0.0).to(tl.float32)
        ends = (n + 1 >= N) | (tl.load(sorted_ptr + n + 1, mask=n + 1 < N, other=-1) != i)
        last = n + 1 == first + CHUNK
        valid = (i >= 0) & (i < V)
        # The scalar conditions select an empty range of columns: the interpreter cannot broadcast a scalar bool.
        tl.store(head_ptr + chunk * C + col, acc, mask=col < tl.where(from_left & (ends | last), C, 0))
        tl.store(tail_ptr + chunk * C + col, acc, mask=col < tl.where((from_left == 0) & last, C, 0))
        done = (from_left == 0) & ends & valid
        at, mask = dwte_ptr + i * C + col, col < tl.where(done, C, 0)
        total = acc + tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, total.to(dwte_ptr.dtype.element_ty), mask=mask)
        acc = tl.where(ends, 0.0, acc)
        from_left = from_left & (ends == 0)


@triton.jit
def embedding_bwd_runs(sorted_ptr, dwte_ptr, head_ptr, tail_ptr, N, V, C, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Stage 2: add the parts of the run that begins in this chunk and continues in the next one."""
    chunk = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    after = (chunk + 1) * CHUNK
    i = tl.load(sorted_ptr + after - 1).to(tl.int64)
    before = tl.load(sorted_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    begins_here = (chunk == 0) | (before != i)
    if begins_here & (tl.load(sorted_ptr + after) == i) & (i >= 0) & (i < V):
        acc = tl.load(tail_ptr + chunk * C + col, mask=col < C, other=0.0)
        next_chunk = chunk + 1
        unfinished = True
        while unfinished:
            acc += tl.load(head_ptr + next_chunk * C + col, mask=col < C, other=0.0)
            next_chunk += 1
            unfinished = tl.load(sorted_ptr + next_chunk * CHUNK, mask=next_chunk * CHUNK < N, other=-1) == i
        acc += tl.load(dwte_ptr + i * C + col, mask=col < C, other=0.0).to(tl.float32)
        tl.store(dwte_ptr + i * C + col, acc.to(dwte_ptr.dtype.element_ty), mask=col < C)


@triton.jit
def embedding_bwd_dwpe(dy_ptr, dwpe_ptr, stride_dy_n, B, T, C, start, BLOCK_C: tl.constexpr):
    """Add the gradient of one position, summed over the batch; positions are start + t."""
    position = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = position - start
    end = tl.where((t >= 0) & (t < T), C, 0)
    acc = tl.zeros([BLOCK_C], tl.float32)
    for b in range(B):
        n = tl.cast(b, tl.int64) * T + t
        acc += tl.load(dy_ptr + n * stride_dy_n + col, mask=col < end, other=0.0).to(tl.float32)
    acc += tl.load(dwpe_ptr + position * C + col, mask=col < C, other=0.0).to(tl.float32)
    tl.store(dwpe_ptr + position * C + col, acc.to(dwpe_ptr.dtype.element_ty), mask=col < C)


def objection(ids: Tensor, wte: Tensor, *_, **__) -> str | None:
    return launch.objection(wte, wte)


def forward(outputs, saved, ids, wte, wpe, positions, *, start):
    (vocab, width), tokens = wte.shape, ids.shape[1]
    with launch.device_of(wte):
        embedding_fwd[(ids.numel(), triton.cdiv(width, BLOCK_C))](
            ids_ptr=ids, wte_ptr=wte.contiguous(), wpe_ptr=wpe if wpe is None else wpe.contiguous(),
            positions_ptr=positions, y_ptr=outputs[0], T=tokens, V=vocab, P=0 if wpe is None else wpe.shape[0],
            C=width, start=start, BLOCK_C=BLOCK_C, num_warps=TILE.warps, num_stages=TILE.stages,
            **overlap.options(wte, ids.numel()),
        )  # fmt: skip


def backward(grads, inputs, outputs, saved, needs, *, start, into=(None,) * 4):
    ids, wte, wpe, positions = inputs
    dy = launch.as_rows(grads[0])
    dwte, dwpe = (
        sink if sink is not None or not need else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        for t, need, sink in zip((wte, wpe), needs[1:3], into[1:3], strict=True)
    )
    with launch.device_of(dy):
        if dwte is not None:
            _scatter_add(ids, dy, dwte)
        if dwpe is not None and positions is not None:
            _scatter_add(positions, dy, dwpe)
        elif dwpe is not None:
            _add_position_rows(ids, dy, dwpe, start)
    return None, dwte, dwpe, None


def _scatter_add(ids: Tensor, dy: Tensor, dtable: Tensor) -> None:
    """Add dy to the rows ids of dtable. Each run is summed in float32."""
    (count, width), vocab = dy.shape, dtable.shape[0]
    sorted_ids, order = torch.sort(ids.flatten(), stable=True)
    chunks, columns = triton.cdiv(count, CHUNK), triton.cdiv(width, BLOCK_C)
    head, tail = torch.empty((2, chunks, width), dtype=torch.float32, device=dy.device)
    sizes = {"N": count, "V": vocab, "C": width, "CHUNK": CHUNK, "BLOCK_C": BLOCK_C,
             "num_warps": TILE.warps, "num_stages": TILE.stages}  # fmt: skip
    embedding_bwd_chunks[(chunks, columns)](
        sorted_ptr=sorted_ids, order_ptr=order, dy_ptr=dy, dwte_ptr=dtable, head_ptr=head, tail_ptr=tail,
        stride_dy_n=dy.stride(0), **sizes,
    )  # fmt: skip
    embedding_bwd_runs[(max(chunks - 1, 0), columns)](
        sorted_ptr=sorted_ids, dwte_ptr=dtable, head_ptr=head, tail_ptr=tail, **sizes
    )


def _add_position_rows(ids: Tensor, dy: Tensor, dwpe: Tensor, start: int) -> None:
    positions, width = dwpe.shape
    embedding_bwd_dwpe[(positions, triton.cdiv(width, BLOCK_C))](
        dy_ptr=dy, dwpe_ptr=dwpe, stride_dy_n=dy.stride(0), B=ids.shape[0], T=ids.shape[1], C=width, start=start,
        BLOCK_C=BLOCK_C, num_warps=TILE.warps, num_stages=TILE.stages,
    )  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases."""
    indices = dict.fromkeys(("ids_ptr", "positions_ptr", "sorted_ptr", "order_ptr"), "*i64")
    types = {**indices, "head_ptr": "*fp32", "tail_ptr": "*fp32"}
    for kernel in (embedding_fwd, embedding_bwd_chunks, embedding_bwd_runs, embedding_bwd_dwpe):
        sizes = {n: v for n, v in (("CHUNK", CHUNK), ("BLOCK_C", BLOCK_C)) if n in kernel.arg_names}
        options = {"OVERLAP": arch in overlap.ARCHS} if kernel is embedding_fwd else {}
        yield launch.case(kernel, "bf16", TILE, "bf16", {**sizes, **options}, **types)
