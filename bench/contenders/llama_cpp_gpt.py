"""llama.cpp through the packages llama-cpp-python and gguf: GPT-2 as a GGUF file, quantized by llama.cpp's own tool."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from peakgpt.bench.contenders.contender import Decode, Workload
from peakgpt.engine.model.config import GPTConfig

FILE_TYPES = {
    "bfloat16": "LLAMA_FTYPE_MOSTLY_BF16",
    "int8": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "int4": "LLAMA_FTYPE_MOSTLY_Q4_0",
}
NAMES = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path: Path, state: dict[str, Tensor], config: GPTConfig) -> None:
    """Write a GGUF file with the float32 weights of `state`, (out, in), and without a vocabulary."""
    import gguf

    file = gguf.GGUFWriter(path, "gpt2")
    file.add_block_count(config.n_layer)
    file.add_context_length(config.block_size)
    file.add_embedding_length(config.n_embd)
    file.add_feed_forward_length(config.n_inner)
    file.add_head_count(config.n_head)
    file.add_layer_norm_eps(config.layer_norm_epsilon)
    file.add_tokenizer_model("none")
    file.add_vocab_size(config.vocab_size)
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("transformer.h."):
            layer, _, part = module.removeprefix("transformer.h.").partition(".")
            module = f"blk.{layer}.{NAMES[part]}"
        else:
            module = NAMES[module]
        file.add_tensor(f"{module}.{kind}", tensor.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def llama_cpp_decoder(state, config: GPTConfig, ids: Tensor, workload: Workload, weights: str) -> Decode:
    """Decode all streams in one batch, with llama.cpp's defaults: flash attention and a float16 cache."""
    import llama_cpp as lib
    import numpy as np

    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write_gguf(path, state, config)
        if weights in FILE_TYPES:
            options, float32_path = lib.llama_model_quantize_default_params(), path
            options.ftype, options.nthread, path = (
                getattr(lib, FILE_TYPES[weights]),
                torch.get_num_threads(),
                path.with_suffix(".q"),
            )
            _expect_success(
                lib.llama_model_quantize(str(float32_path).encode(), str(path).encode(), ctypes.byref(options))
            )
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        (model or _expect_success(1)) and path.touch()  # the memory mapping outlives the file
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_seq_max, options.kv_unified = (
        len(ids) * (workload.prompt + workload.tokens),
        len(ids),
        True,
    )
    options.n_batch = options.n_ubatch = max(ids.numel(), 64)
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = lib.llama_init_from_model(model, options)
    batch = lib.llama_batch_init(ids.numel(), 0, 1)

    def step(rows: Tensor, past: int) -> np.ndarray:
        """Return the next token of each stream, (streams,)."""
        count, width = rows.shape
        batch.n_tokens = rows.numel()
        for i, token in enumerate(rows.flatten().tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, past + i % width, 1
            batch.seq_id[i][0], batch.logits[i] = i // width, i % width == width - 1
        _expect_success(lib.llama_decode(context, batch))
        logits = [lib.llama_get_logits_ith(context, i * width + width - 1) for i in range(count)]
        return np.array([np.ctypeslib.as_array(z, (config.vocab_size,)).argmax() for z in logits])

    def run(log_callback: object = silent) -> Tensor:  # keeps the callback alive
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        tokens = [torch.from_numpy(step(ids, 0))]
        for past in range(workload.prompt, workload.prompt + workload.tokens - 1):
            tokens.append(torch.from_numpy(step(tokens[-1][:, None], past)))
        return torch.stack(tokens, 1)

    return run


def _expect_success(code: int) -> None:
    if code:
        raise RuntimeError(f"llama.cpp: got code {code}, expected 0")
