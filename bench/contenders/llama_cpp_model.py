"""llama.cpp through the package llama-cpp-python: files of `peakgpt export`, quantized by llama.cpp's own tool.

It runs with its defaults: flash attention where it chooses it, and a float16 cache.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peakgpt.bench.contenders.contender import Contender, GreedyDecoder, Prefill, Workload
from peakgpt.bench.contenders.stepping import Step, stepping
from peakgpt.engine.checkpoint.gguf.export import choose_architecture, write_gguf
from peakgpt.engine.data.gguf_header import read_header
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

# Weight format -> type of the file: of `peakgpt export`, or of llama.cpp's tool.
FILES = {"float32": "f32", "bfloat16": "bf16", "int8": "Q8_0", "int4": "Q4_0"}


def has_architecture(config: GPTConfig) -> bool:
    """Return whether llama.cpp has the model."""
    try:
        choose_architecture(config)
    except ValueError:
        return False
    return True


def gguf_file(folder: Path, kind: str) -> Path:
    """Return the .gguf file of a type, which is written first if it is missing.

    Args:
        folder: of `write_random_model`.
        kind: f32, f16 or bf16 of `peakgpt export`, or a type of llama.cpp's tool, such as Q4_K_M.
    """
    path = folder / f"{kind}.gguf"
    with open(folder / "gguf.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # contenders in other processes need the same files
        if not path.exists():
            (_export if kind.islower() else _quantize)(folder, path, kind)
    return path


def _export(folder: Path, path: Path, kind: str) -> None:
    model = GPT.from_pretrained(folder, dtype=torch.bfloat16)  # pages of the file, no copy
    write_gguf(path, model.config, model.state_dict(), None, kind)


def _quantize(folder: Path, path: Path, kind: str) -> None:
    lib, source = _library(), folder / "bf16.gguf"
    if not source.exists():
        _export(folder, source, "bf16")
    options = lib.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}"), torch.get_num_threads()
    _expect_success(lib.llama_model_quantize(bytes(source), bytes(path), ctypes.byref(options)))


def weight_bits(contender: Contender, folder: Path, weights: str) -> float | None:
    """Return the bits per quantized weight of a contender: as it states, or as its file in the folder has them."""
    if weights in contender.bits or weights not in contender.files:
        return contender.bits.get(weights)
    entries = read_header(gguf_file(folder, contender.files[weights])).tensors
    quantized = [e for name, e in entries.items() if name.startswith("blk.") and e.type.elements > 1]
    elements = sum(torch.Size(entry.shape).numel() for entry in quantized)
    return 8 * sum(entry.end - entry.start for entry in quantized) / elements if elements else None


def llama_cpp_decoder(
    folder: Path, config: GPTConfig, ids: Tensor, workload: Workload, weights: str, *, kind: str | None = None
) -> GreedyDecoder:
    """Decode all streams in one batch, with a file of FILES or of another kind."""
    step = _stepper(folder, config, ids, workload.prompt + workload.tokens, kind or FILES[weights])
    return stepping(step, ids, workload)


def llama_cpp_prefill(folder: Path, config: GPTConfig, ids: Tensor, weights: str) -> Prefill:
    """Run the prompt in one batch."""
    step = _stepper(folder, config, ids, ids.shape[1], FILES[weights])
    return lambda: step(ids, 0)


def _stepper(folder: Path, config: GPTConfig, ids: Tensor, cache_tokens: int, kind: str) -> Step:
    import numpy as np

    lib, path, streams = _library(), gguf_file(folder, kind), len(ids)
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_seq_max, options.kv_unified = streams * cache_tokens, streams, True
    options.n_batch = options.n_ubatch = max(ids.numel(), 64)
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    model = lib.llama_model_load_from_file(bytes(path), lib.llama_model_default_params()) or _expect_success(1)
    context = lib.llama_init_from_model(model, options) or _expect_success(1)
    batch = lib.llama_batch_init(ids.numel(), 0, 1)

    def step(rows: Tensor, past: int) -> Tensor:
        if past == 0:
            lib.llama_memory_clear(lib.llama_get_memory(context), False)
        count, width = rows.shape
        batch.n_tokens = rows.numel()
        for i, token in enumerate(rows.flatten().tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, past + i % width, 1
            batch.seq_id[i][0], batch.logits[i] = i // width, i % width == width - 1
        _expect_success(lib.llama_decode(context, batch))
        logits = [lib.llama_get_logits_ith(context, i * width + width - 1) for i in range(count)]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(z, (config.vocab_size,)) for z in logits]))

    return step


@functools.cache
def _library() -> Any:
    """Import llama_cpp, and keep it from writing to standard error."""
    import llama_cpp

    llama_cpp.peakgpt_log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # must live as long
    llama_cpp.llama_log_set(llama_cpp.peakgpt_log, None)
    return llama_cpp


def _expect_success(code: int) -> None:
    if code:
        raise RuntimeError(f"llama.cpp: got code {code}, expected 0")
