"""Contenders of `bench prefill`: each builder returns a function that runs the prompt and returns its last logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.bench.contenders.contender import (
    OUR_BITS,
    PEER_BITS,
    REFERENCE,
    TUNED_ENVIRONMENT,
    Contender,
    Prefill,
)
from peakgpt.bench.contenders.eager_gpt import EagerGPT, is_gpt2
from peakgpt.bench.contenders.graph_engines import openvino_request
from peakgpt.bench.contenders.llama_cpp_model import FILES, has_architecture, llama_cpp_prefill
from peakgpt.bench.contenders.models import (
    computing_in_float32,
    ctranslate2_generator,
    ctranslate2_prompts,
    float32_state,
    our_model,
    transformers_model,
)
from peakgpt.engine.inference.block_pool import blocks_for
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.model.config import GPTConfig

StoreKeysValues = Callable[[int, Tensor, Tensor], None]  # layer, keys and values (B, H, T, D)
FORMATS = ("bfloat16", "float32", "int8")

# Builders: (folder of `write_random_model`, config, ids (1, T), weight format) -> Prefill.


def _ours(folder: Path, config: GPTConfig, ids: Tensor, weights: str) -> Prefill:
    # Only this contender needs the C++ extension.
    from peakgpt.engine.inference.program_executor import ProgramExecutor

    blocks = range(blocks_for(ids.shape[1]))
    executor, chunk = ProgramExecutor(our_model(folder, weights), len(blocks)), Chunk(ids[0], 0, blocks)
    return lambda: executor.step([chunk])


class PromptGPT(EagerGPT):
    """GPT-2 prefill in plain torch: returns the logits of the last position, passes keys and values to `store`."""

    def forward(self, ids: Tensor, store: StoreKeysValues) -> Tensor:
        t = self.transformer
        x = t["wte"](ids) + t["wpe"](torch.arange(ids.shape[1]))  # (B, T, C)
        for layer, block in enumerate(t["h"]):
            qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            q, k, v = (s.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2) for s in qkv)
            store(layer, k, v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return F.linear(t["ln_f"](x)[:, -1], t["wte"].weight)


def _static_cache(compiled: bool, folder: Path, config: GPTConfig, ids: Tensor, weights: str) -> Prefill:
    """Run plain torch with a preallocated KV cache."""
    dtype = getattr(torch, weights)
    model = _loaded(PromptGPT(config), folder, dtype)
    cache = torch.zeros(config.n_layer, 2, len(ids), config.n_head, config.block_size, config.head_dim, dtype=dtype)

    def store(layer: int, k: Tensor, v: Tensor) -> None:
        cache[layer, 0, :, :, : k.shape[2]] = k
        cache[layer, 1, :, :, : v.shape[2]] = v

    run = torch.compile(model) if compiled else model
    return torch.inference_mode()(lambda: run(ids, store))


def _eager(*args) -> Prefill:
    return _static_cache(False, *args)


def _compiled(*args) -> Prefill:
    return _static_cache(True, *args)


def _transformers(compiled: bool, folder: Path, config: GPTConfig, ids: Tensor, weights: str) -> Prefill:
    model = transformers_model(folder, getattr(torch, weights))
    return _last_logits(torch.compile(model) if compiled else model, ids)


def _reference(folder: Path, config: GPTConfig, ids: Tensor, weights: str) -> Prefill:
    """Run an eager model in float32."""
    if is_gpt2(config):
        model = _loaded(EagerGPT(config), folder, torch.float32)
        return torch.inference_mode()(lambda: model(ids)[:, -1])
    return _last_logits(computing_in_float32(transformers_model(folder, torch.bfloat16)), ids)


def _last_logits(model: nn.Module, ids: Tensor) -> Prefill:
    return torch.inference_mode()(lambda: model(ids, use_cache=True, logits_to_keep=1).logits[:, -1])


def _ctranslate2(folder: Path, config: GPTConfig, ids: Tensor, weights: str) -> Prefill:
    """Generate one token, which is how CTranslate2 computes only the logits of the last position."""
    generator, prompts = ctranslate2_generator(folder, config, weights), ctranslate2_prompts(ids)
    options = {"max_length": 1, "sampling_topk": 1, "include_prompt_in_result": False, "return_logits_vocab": True}

    def run() -> Tensor:
        (result,) = generator.generate_batch(prompts, **options)
        return torch.from_numpy(np.array(result.logits[0][0])).view(1, -1)

    return run


class _WithCache(nn.Module):
    """PromptGPT that returns keys and values, as a graph must."""

    def __init__(self, model: PromptGPT):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        cache: list[Tensor] = []
        return self.model(ids, lambda layer, k, v: cache.extend((k, v))), *cache


def _openvino(folder: Path, config: GPTConfig, ids: Tensor, weights: str) -> Prefill:
    """Run the exported graph of plain torch with OpenVINO, which has its own SDPA; see `openvino_request`."""
    import openvino

    model = _WithCache(_loaded(PromptGPT(config), folder, torch.float32))
    with torch.no_grad():
        graph = openvino.convert_model(torch.export.export(model, (ids,)))
    request, prompt = openvino_request(graph, weights), ids.numpy()
    return lambda: torch.from_numpy(request.infer({0: prompt}, share_inputs=True, share_outputs=True)[0])


def _loaded(model: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    model.load_state_dict(float32_state(folder), assign=True)
    return model.to(dtype).eval()


PREFILL_CONTENDERS = {
    "peakgpt": Contender(_ours, package="peakgpt", formats=("float32", "bfloat16", "int8"), bits=OUR_BITS),
    "peakgpt, tuned malloc": Contender(_ours, TUNED_ENVIRONMENT, package="peakgpt"),
    "eager": Contender(_eager, runs=is_gpt2),
    "eager, tuned malloc": Contender(_eager, TUNED_ENVIRONMENT, runs=is_gpt2),
    "compile": Contender(_compiled, runs=is_gpt2),
    "compile, tuned malloc": Contender(_compiled, TUNED_ENVIRONMENT, runs=is_gpt2),
    "transformers": Contender(partial(_transformers, False), package="transformers"),
    "transformers, compile": Contender(partial(_transformers, True), package="transformers"),
    "llama.cpp": Contender(
        llama_cpp_prefill,
        package="llama_cpp",
        distribution="llama-cpp-python",
        formats=("bfloat16", "int8"),  # its keys and values are float16: 0.001 off in float32
        runs=has_architecture,
        files=FILES,
    ),
    "openvino": Contender(_openvino, package="openvino", formats=FORMATS, bits=PEER_BITS, runs=is_gpt2),
    "ctranslate2": Contender(
        _ctranslate2, package="ctranslate2", formats=("float32", "int8"), bits=PEER_BITS, runs=is_gpt2
    ),
}
ALL_PREFILLS = {**PREFILL_CONTENDERS, REFERENCE: Contender(_reference)}
