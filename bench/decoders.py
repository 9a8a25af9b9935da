"""Who decodes in `bench decode`: each makes, of random weights, a function that continues all prompts greedily.

A form is what weights are kept in: float32, bfloat16, int8 or int4. Each engine's small weights are its own:
llama.cpp's Q8_0 and Q4_0 (by 32), CTranslate2's int8, onnxruntime's dynamic int8, OpenVINO's by nncf; ours as
`peakgpt quantize` makes them, and what is not quantized in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.bench.eager_gpt import EagerGPT
from peakgpt.bench.gguf_gpt import llama_decoder
from peakgpt.bench.graphs import onnxruntime_decoder, openvino_decoder
from peakgpt.bench.models import Contender, ctranslate2_generator, ctranslate2_prompts, our_model, transformers_model
from peakgpt.engine.inference.block_pool import blocks_for
from peakgpt.engine.inference.decoder import ContiguousDecoder
from peakgpt.engine.model.config import GPTConfig

Continue = Callable[[], Tensor]  # -> (streams, tokens) int64
FORMS = ("float32", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class Case:
    """How many streams of which prompt and continuation, in tokens."""

    streams: int
    prompt: int
    tokens: int


# ---- contenders: each makes a Continue of a state, which it may take the tensors of


def _ours(group: int, state, config: GPTConfig, ids: Tensor, case: Case, form: str) -> Continue:
    from peakgpt.engine.inference.engine import Engine, SamplingParams  # needs tokenizers

    blocks = case.streams * blocks_for(case.prompt + case.tokens)
    # As many prompts as there are blocks for: what was computed for one run is given up before the next.
    engine = Engine(our_model(state, config, form, group), blocks=blocks)
    if engine.executor_note:
        raise ValueError(f"decode: peakgpt runs {engine.executor_note}")
    params = SamplingParams(temperature=0.0, max_tokens=case.tokens)

    def run() -> Tensor:
        texts = {engine.submit(row, params): [] for row in ids.tolist()}
        for output in engine.outputs():
            if output.error:
                raise output.error
            texts[output.request_id] += output.token_ids
        return torch.tensor(list(texts.values()))

    return run


def _ops(state, config: GPTConfig, ids: Tensor, case: Case, form: str) -> Continue:
    """Our ops, one after the other, with a contiguous cache: what promises no bits."""
    model = our_model(state, config, form)

    @torch.inference_mode()
    def run() -> Tensor:
        decoder = ContiguousDecoder(model, len(ids), case.prompt + case.tokens)
        tokens = [decoder.step(ids).argmax(-1)]
        for _ in range(case.tokens - 1):
            tokens.append(decoder.step(tokens[-1][:, None]).argmax(-1))
        return torch.stack(tokens, 1)

    return run


class StaticGPT(EagerGPT):
    """GPT-2 in plain torch as a good user writes it: keys and values in one tensor that was there before."""

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


def eager_decoder(state, config: GPTConfig, ids: Tensor, case: Case, form: str) -> Continue:
    model, dtype = StaticGPT(config), getattr(torch, form)
    model.load_state_dict(state)
    model = model.to(dtype).eval()
    room = case.prompt + case.tokens
    cache = torch.zeros(config.n_layer, 2, len(ids), config.n_head, room, config.head_dim, dtype=dtype)

    @torch.inference_mode()
    def run() -> Tensor:
        tokens = [model(ids, 0, cache).argmax(-1)]
        for past in range(case.prompt, room - 1):
            tokens.append(model(tokens[-1][:, None], past, cache).argmax(-1))
        return torch.stack(tokens, 1)

    return run


def _transformers(state, config: GPTConfig, ids: Tensor, case: Case, form: str) -> Continue:
    model = transformers_model(state, config, getattr(torch, form))
    options = {"max_new_tokens": case.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, **options)[:, case.prompt :]


def _ctranslate2(state, config: GPTConfig, ids: Tensor, case: Case, form: str) -> Continue:
    generator, prompts = ctranslate2_generator(state, config, form), ctranslate2_prompts(ids)

    def run() -> Tensor:
        found = generator.generate_batch(prompts, max_length=case.tokens, min_length=case.tokens, sampling_topk=1,
                                         include_prompt_in_result=False, end_token=[])  # fmt: skip
        return torch.tensor([r.sequences_ids[0] for r in found])

    return run


CONTENDERS = {
    "peakgpt": Contender(partial(_ours, 64), forms=FORMS),
    "peakgpt by 32": Contender(partial(_ours, 32), forms=("int4",)),
    "peakgpt by ops": Contender(partial(_ops)),
    "eager": Contender(eager_decoder),
    "transformers": Contender(_transformers, package="transformers"),
    "llama.cpp": Contender(llama_decoder, package="llama_cpp", forms=FORMS, distribution="llama-cpp-python"),
    "ctranslate2": Contender(_ctranslate2, package="ctranslate2", forms=("float32", "int8")),
    "onnxruntime": Contender(onnxruntime_decoder, package="onnxruntime", forms=("float32", "int8")),
    "openvino": Contender(openvino_decoder, package="openvino", forms=("float32", "bfloat16", "int8")),
}
