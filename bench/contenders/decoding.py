"""Contenders of `bench decode`: each builder returns a GreedyDecoder of all prompts.

Weights are in float32, bfloat16, int8 or int4. Each engine quantizes by its own method: llama.cpp to Q8_0, Q4_0 and
Q4_K_M, CTranslate2 to int8, onnxruntime by dynamic int8, OpenVINO by nncf. peakgpt quantizes as `peakgpt quantize`
does, with all other tensors in bfloat16. OpenVINO GenAI reads the files of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.bench.contenders.contender import (
    OUR_BITS,
    OUR_BITS_BY_32,
    PEER_BITS,
    REFERENCE,
    WEIGHT_FORMATS,
    Contender,
    GreedyDecoder,
    Workload,
)
from peakgpt.bench.contenders.eager_gpt import EagerGPT, is_gpt2
from peakgpt.bench.contenders.graph_engines import onnxruntime_decoder, openvino_decoder
from peakgpt.bench.contenders.llama_cpp_model import FILES, has_architecture, llama_cpp_decoder
from peakgpt.bench.contenders.models import (
    computing_in_float32,
    ctranslate2_generator,
    ctranslate2_prompts,
    float32_state,
    our_model,
    transformers_model,
)
from peakgpt.bench.contenders.stepping import Step, logits_by_steps, stepping
from peakgpt.engine.inference.block_pool import blocks_for
from peakgpt.engine.inference.decoder import ContiguousDecoder, Decoder, PagedDecoder
from peakgpt.engine.inference.executor import make_executor
from peakgpt.engine.model.config import GPTConfig

# Builders: (folder, config, ids (streams, prompt), workload, weights) -> GreedyDecoder. `folder` is of
# `write_random_model`.


def _ours(group: int, folder: Path, config: GPTConfig, ids: Tensor, workload: Workload, weights: str) -> GreedyDecoder:
    from peakgpt.engine.inference.engine import Engine, SamplingParams  # needs tokenizers

    blocks = workload.streams * blocks_for(workload.prompt + workload.tokens)
    # The cache holds exactly one run, so that no run reuses a prefix of the previous run.
    model = our_model(folder, weights, group)
    engine = Engine(model, blocks=blocks)
    if engine.executor_note:
        raise ValueError(f"decode: peakgpt runs {engine.executor_note}")
    params = SamplingParams(temperature=0.0, max_tokens=workload.tokens)

    def run() -> Tensor:
        sequences = {engine.submit(row, params): [] for row in ids.tolist()}
        for output in engine.outputs():
            if output.error:
                raise output.error
            sequences[output.request_id] += output.token_ids
        return torch.tensor(list(sequences.values()))

    make_decoder = lambda: PagedDecoder(make_executor(model, blocks), len(ids))  # noqa: E731
    return GreedyDecoder(run, lambda text: logits_by_steps(_step_of(make_decoder), ids, text))


def _step_of(make_decoder: Callable[[], Decoder]) -> Step:
    """Return the step of a decoder, of a new one for each text."""
    decoder = None

    @torch.inference_mode()
    def step(rows: Tensor, past: int) -> Tensor:
        nonlocal decoder
        if past == 0:
            decoder = None  # frees its cache first
            decoder = make_decoder()
        return decoder.step(rows)

    return step


def _torch_ops(folder, config: GPTConfig, ids: Tensor, workload: Workload, weights: str) -> GreedyDecoder:
    """Run the modules of the model one op at a time, with a contiguous KV cache."""
    model, capacity = our_model(folder, weights), workload.prompt + workload.tokens
    return stepping(_step_of(lambda: ContiguousDecoder(model, len(ids), capacity)), ids, workload)


class StaticGPT(EagerGPT):
    """GPT-2 in plain torch with a preallocated KV cache."""

    def forward(self, ids: Tensor, past: int, cache: Tensor) -> Tensor:
        t, end = self.transformer, past + ids.shape[1]
        x = t["wte"](ids) + t["wpe"](torch.arange(past, end))  # (B, T, C)
        for layer, block in enumerate(t["h"]):
            qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            q, k, v = (s.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2) for s in qkv)
            cache[layer, 0, :, :, past:end], cache[layer, 1, :, :, past:end] = k, v
            k, v = cache[layer, :, :, :, :end]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=past == 0)  # (B, H, T, D)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return F.linear(t["ln_f"](x)[:, -1], t["wte"].weight)


def eager_decoder(folder, config: GPTConfig, ids: Tensor, workload: Workload, weights: str) -> GreedyDecoder:
    model, dtype = StaticGPT(config), getattr(torch, weights)
    model.load_state_dict(float32_state(folder))
    model = model.to(dtype).eval()
    cache_tokens = workload.prompt + workload.tokens
    cache = torch.zeros(config.n_layer, 2, len(ids), config.n_head, cache_tokens, config.head_dim, dtype=dtype)

    return stepping(torch.inference_mode()(lambda rows, past: model(rows, past, cache)), ids, workload)


def _transformers(folder, config: GPTConfig, ids: Tensor, workload: Workload, weights: str) -> GreedyDecoder:
    return _generate(transformers_model(folder, getattr(torch, weights)), ids, workload)


def _compiled_transformers(folder, config: GPTConfig, ids: Tensor, workload: Workload, weights: str) -> GreedyDecoder:
    """Compile the forward pass, which transformers does by itself on GPUs, with a cache of fixed size."""
    model = transformers_model(folder, getattr(torch, weights))
    model.forward = torch.compile(model.forward)
    return _generate(model, ids, workload, cache_implementation="static")


def reference_decoder(folder, config: GPTConfig, ids: Tensor, workload: Workload, weights: str) -> GreedyDecoder:
    """Decode by an eager model in float32, which computes the logits of texts in one pass."""
    if is_gpt2(config):
        model = EagerGPT(config).eval()
        model.load_state_dict(float32_state(folder), assign=True)
        run = lambda: model.generate(ids, workload.tokens)[:, workload.prompt :]  # noqa: E731
        return GreedyDecoder(run, _whole_text(model, ids))
    model = computing_in_float32(transformers_model(folder, torch.bfloat16))
    return GreedyDecoder(_generate(model, ids, workload).run, _whole_text(lambda rows: model(rows).logits, ids))


def _whole_text(logits_of: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the logits of GreedyDecoder, from a function that returns those of every position."""
    return torch.inference_mode()(lambda text: logits_of(torch.cat((ids, text), 1))[:, ids.shape[1] - 1 : -1])


def _generate(model: Any, ids: Tensor, workload: Workload, **options: Any) -> GreedyDecoder:
    options |= {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def logits(text: Tensor) -> Tensor:
        forced = lambda rows, scores: torch.full_like(scores, -torch.inf).scatter_(  # noqa: E731
            1, text[:, rows.shape[1] - workload.prompt, None], 0.0
        )
        raw = model.generate(ids, max_new_tokens=text.shape[1], logits_processor=[forced], output_logits=True,
                             return_dict_in_generate=True, **options).logits  # fmt: skip
        return torch.stack(raw, 1)

    return GreedyDecoder(
        lambda: model.generate(ids, max_new_tokens=workload.tokens, **options)[:, workload.prompt :], logits
    )


def _ctranslate2(folder, config: GPTConfig, ids: Tensor, workload: Workload, weights: str) -> GreedyDecoder:
    generator, prompts = ctranslate2_generator(folder, config, weights), ctranslate2_prompts(ids)

    def run() -> Tensor:
        results = generator.generate_batch(prompts, max_length=workload.tokens, min_length=workload.tokens,
                                         sampling_topk=1, include_prompt_in_result=False, end_token=[])  # fmt: skip
        return torch.tensor([r.sequences_ids[0] for r in results])

    def log_probabilities(rows: Tensor) -> Tensor:
        views = generator.forward_batch(ctranslate2_prompts(rows), return_log_probs=True)
        return torch.from_numpy(np.array(views))

    return GreedyDecoder(run, _whole_text(log_probabilities, ids))


DECODING_CONTENDERS = {
    "peakgpt": Contender(partial(_ours, 64), package="peakgpt", formats=WEIGHT_FORMATS, bits=OUR_BITS),
    "peakgpt by 32": Contender(partial(_ours, 32), package="peakgpt", formats=("int4",), bits=OUR_BITS_BY_32),
    "peakgpt by ops": Contender(_torch_ops, package="peakgpt"),
    "eager": Contender(eager_decoder, runs=is_gpt2),
    "transformers": Contender(_transformers, package="transformers"),
    "transformers, compile": Contender(_compiled_transformers, package="transformers"),
    "llama.cpp": Contender(
        llama_cpp_decoder,
        package="llama_cpp",
        distribution="llama-cpp-python",
        formats=WEIGHT_FORMATS,
        runs=has_architecture,
        files=FILES,
    ),
    "llama.cpp Q4_K_M": Contender(
        partial(llama_cpp_decoder, kind="Q4_K_M"),
        package="llama_cpp",
        distribution="llama-cpp-python",
        formats=("int4",),
        runs=has_architecture,
        files={"int4": "Q4_K_M"},
    ),
    "ctranslate2": Contender(
        _ctranslate2, package="ctranslate2", formats=("float32", "int8"), bits=PEER_BITS, runs=is_gpt2
    ),
    "onnxruntime": Contender(
        onnxruntime_decoder, package="onnxruntime", formats=("float32", "int8"), bits=PEER_BITS, runs=is_gpt2
    ),
    "openvino": Contender(
        openvino_decoder, package="openvino", formats=("float32", "bfloat16", "int8"), bits=PEER_BITS, runs=is_gpt2
    ),
}
ALL_DECODERS = {**DECODING_CONTENDERS, REFERENCE: Contender(reference_decoder)}
