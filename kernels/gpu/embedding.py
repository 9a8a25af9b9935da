"""Token and position embedding in Triton; the backward scatters by sorting, without atomics.

    sorted, order = stable sort of ids          equal ids lie side by side: a run
    1. a program adds the rows of CHUNK sorted places one after the other. A run inside the chunk is finished; the
       one that comes in from the left goes to head[chunk], the one that begins here and goes on to tail[chunk].
    2. for each run that leaves its first chunk: dwte = tail[chunk] + head[chunk + 1] + ... to its end.

Every sum has one order, so the result is the same from run to run; a token that fills the batch costs CHUNK steps
and then one for each chunk. A row of the table has one run and so one writer, which adds to what is there: zeros, or
the sink of accumulate_into, where a tied head has its part. An id out of range gives a row of NaN forward and is left
out of the backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch, overlap
from peakgpt.kernels.gpu.launch import AotCase, Tile

# Unmeasured on hardware: 8 columns a thread are one 16-byte load of a half precision.
BLOCK_C, CHUNK, ROW = 1024, 32, Tile(warps=4)


@triton.jit(do_not_specialize=("T", "start"))
def embedding_fwd(
    ids_ptr, wte_ptr, wpe_ptr, places_ptr, y_ptr, T, V, P, C, start, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr
):
    overlap.follow(OVERLAP)
    n = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.load(ids_ptr + n).to(tl.int64)
    end = tl.where((i >= 0) & (i < V), C, 0)
    y = tl.load(wte_ptr + i * C + col, mask=col < end, other=float("nan")).to(tl.float32)
    if wpe_ptr is not None:
        p = start + n % T
        if places_ptr is not None:
            p = tl.load(places_ptr + n).to(tl.int64)
        end = tl.where((p >= 0) & (p < P), C, 0)
        y += tl.load(wpe_ptr + p * C + col, mask=col < end, other=float("nan")).to(tl.float32)
    tl.store(y_ptr + n * C + col, y.to(y_ptr.dtype.element_ty), mask=col < C)


@triton.jit
def embedding_bwd_chunks(
    sorted_ptr, order_ptr, dy_ptr, dwte_ptr, head_ptr, tail_ptr, stride_dy_n, N, V, C,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
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
        # Masks by an empty range of columns: the interpreter can not spread a scalar truth value.
        tl.store(head_ptr + chunk * C + col, acc, mask=col < tl.where(from_left & (ends | last), C, 0))
        tl.store(tail_ptr + chunk * C + col, acc, mask=col < tl.where((from_left == 0) & last, C, 0))
        done = (from_left == 0) & ends & valid
        at, here = dwte_ptr + i * C + col, col < tl.where(done, C, 0)
        total = acc + tl.load(at, mask=here, other=0.0).to(tl.float32)
        tl.store(at, total.to(dwte_ptr.dtype.element_ty), mask=here)
        acc = tl.where(ends, 0.0, acc)
        from_left = from_left & (ends == 0)


@triton.jit
def embedding_bwd_runs(sorted_ptr, dwte_ptr, head_ptr, tail_ptr, N, V, C, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    after = (chunk + 1) * CHUNK
    i = tl.load(sorted_ptr + after - 1).to(tl.int64)
    before = tl.load(sorted_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    begins_here = (chunk == 0) | (before != i)
    if begins_here & (tl.load(sorted_ptr + after) == i) & (i >= 0) & (i < V):
        acc = tl.load(tail_ptr + chunk * C + col, mask=col < C, other=0.0)
        following = chunk + 1
        more = True
        while more:
            acc += tl.load(head_ptr + following * C + col, mask=col < C, other=0.0)
            following += 1
            more = tl.load(sorted_ptr + following * CHUNK, mask=following * CHUNK < N, other=-1) == i
        acc += tl.load(dwte_ptr + i * C + col, mask=col < C, other=0.0).to(tl.float32)
        tl.store(dwte_ptr + i * C + col, acc.to(dwte_ptr.dtype.element_ty), mask=col < C)


@triton.jit
def embedding_bwd_dwpe(dy_ptr, dwpe_ptr, stride_dy_n, B, T, C, start, BLOCK_C: tl.constexpr):
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
    return launch.objection(wte)


def forward(outputs, saved, ids, wte, wpe, places, *, start):
    (vocab, width), tokens = wte.shape, ids.shape[1]
    with launch.on(wte):
        embedding_fwd[(ids.numel(), triton.cdiv(width, BLOCK_C))](
            ids_ptr=ids.contiguous(), wte_ptr=wte.contiguous(), wpe_ptr=wpe if wpe is None else wpe.contiguous(),
            places_ptr=places if places is None else places.contiguous(), y_ptr=outputs[0], T=tokens, V=vocab,
            P=0 if wpe is None else wpe.shape[0], C=width, start=start, BLOCK_C=BLOCK_C, num_warps=ROW.warps,
            num_stages=ROW.stages, **overlap.options(wte, ids.numel()),
        )  # fmt: skip


def backward(grads, inputs, outputs, saved, needs, *, start, into=(None,) * 4):
    ids, wte, wpe, places = inputs
    dy = launch.rows(grads[0])
    dwte, dwpe = (
        sink if sink is not None or not need else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        for t, need, sink in zip((wte, wpe), needs[1:3], into[1:3], strict=True)
    )
    with launch.on(dy):
        if dwte is not None:
            _add_rows(ids, dy, dwte)
        if dwpe is not None and places is not None:
            _add_rows(places, dy, dwpe)
        elif dwpe is not None:
            _add_dwpe(ids, dy, dwpe, start)
    return None, dwte, dwpe, None


def _add_rows(ids: Tensor, dy: Tensor, dwte: Tensor) -> None:
    (count, width), vocab = dy.shape, dwte.shape[0]
    in_order, order = torch.sort(ids.flatten(), stable=True)
    chunks, columns = triton.cdiv(count, CHUNK), triton.cdiv(width, BLOCK_C)
    head, tail = torch.empty((2, chunks, width), dtype=torch.float32, device=dy.device)
    sizes = {"N": count, "V": vocab, "C": width, "CHUNK": CHUNK, "BLOCK_C": BLOCK_C,
             "num_warps": ROW.warps, "num_stages": ROW.stages}  # fmt: skip
    embedding_bwd_chunks[(chunks, columns)](
        sorted_ptr=in_order, order_ptr=order, dy_ptr=dy, dwte_ptr=dwte, head_ptr=head, tail_ptr=tail,
        stride_dy_n=dy.stride(0), **sizes,
    )  # fmt: skip
    embedding_bwd_runs[(max(chunks - 1, 0), columns)](
        sorted_ptr=in_order, dwte_ptr=dwte, head_ptr=head, tail_ptr=tail, **sizes
    )


def _add_dwpe(ids: Tensor, dy: Tensor, dwpe: Tensor, start: int) -> None:
    positions, width = dwpe.shape
    embedding_bwd_dwpe[(positions, triton.cdiv(width, BLOCK_C))](
        dy_ptr=dy, dwpe_ptr=dwpe, stride_dy_n=dy.stride(0), B=ids.shape[0], T=ids.shape[1], C=width, start=start,
        BLOCK_C=BLOCK_C, num_warps=ROW.warps, num_stages=ROW.stages,
    )  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """The static check's cases."""
    indices = dict.fromkeys(("ids_ptr", "places_ptr", "sorted_ptr", "order_ptr"), "*i64")
    types = {**indices, "head_ptr": "*fp32", "tail_ptr": "*fp32"}
    for kernel in (embedding_fwd, embedding_bwd_chunks, embedding_bwd_runs, embedding_bwd_dwpe):
        sizes = {n: v for n, v in (("CHUNK", CHUNK), ("BLOCK_C", BLOCK_C)) if n in kernel.arg_names}
        early = {"OVERLAP": arch in overlap.CLASSES} if kernel is embedding_fwd else {}
        yield launch.case(kernel, "bf16", ROW, "bf16", {**sizes, **early}, **types)
