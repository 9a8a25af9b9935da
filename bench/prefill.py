"""Prefill on a CPU versus plain torch and other engines: `peakgpt bench prefill`.

Every contender runs the same random weights in a process of its own, stores the keys and values of the prompt, and
computes logits at the last position only:

    work FLOPs = T (2 N + 4 L H D (T + 1) / 2) - (T - 1) 2 (C V + H D C + 2 C F)

The last block computes keys and values for the whole prompt, and everything after its attention for one position.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.bench.agreement import expect_close
from peakgpt.bench.case import Case, expect_cpu, joined
from peakgpt.bench.contenders.contender import OUR_BITS, SEED, TUNED_ENVIRONMENT, Contender
from peakgpt.bench.contenders.eager_gpt import EagerGPT
from peakgpt.bench.contenders.graph_engines import openvino_request
from peakgpt.bench.contenders.models import ctranslate2_generator, ctranslate2_prompts, our_model, transformers_model
from peakgpt.bench.contenders.time_contenders import time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess, saving_first
from peakgpt.bench.interleave import OnFailure
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.schema import Result
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.block_pool import blocks_for
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import forward_flops
from peakgpt.engine.model.presets import preset
from peakgpt.kernels.command_line import integer

StoreKeysValues = Callable[[int, Tensor, Tensor], None]  # layer, keys and values (B, H, T, D)
Prefill = Callable[[], Tensor]  # -> (1, V) logits at the last position
DTYPES = ("bfloat16", "float32", "int8")


@dataclass(frozen=True)
class PrefillCase(Case):
    """The prefill of one sequence. Each contender's logits are checked against those of eager in float32.

    Args:
        model: name of the model, for the name of the case.
        config: the model.
        tokens: prompt tokens.
        dtype: of the computation; "int8" means int8 weights, quantized by each engine's own method.
    """

    kind: ClassVar[str] = "prefill"
    model: str
    config: GPTConfig
    tokens: int
    dtype: str

    @property
    def name(self) -> str:
        return joined(self.kind, self.model, str(self.tokens), self.dtype)

    def all_contenders(self, device: torch.device) -> list[str]:
        return [name for name, c in PREFILL_CONTENDERS.items() if self.dtype in c.formats]

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        config, tokens = self.config, self.tokens
        reference = reference_logits(config, tokens)
        dtype = getattr(torch, self.dtype)
        limit = dtype if dtype.is_floating_point else torch.bfloat16  # int8 must meet bfloat16's tolerance
        with tempfile.TemporaryDirectory() as folder:
            measured = time_contenders(
                ((name, partial(self._start, name, folder)) for name in self.contenders(device)),
                lambda name, worker: (worker.step(), torch.load(_logits_file(folder, name)))[1],
                lambda name, logits: expect_close(f"prefill: {name}", [logits[name]], [reference], limit),
                rounds=self.rounds, warmup=0, budget_s=self.seconds, peaks=PeakMeter(device, [dtype]),
                on_failure=on_failure,
            )  # fmt: skip
        return [
            Result.of(
                m.timing.noted(m.note, contender.version), bench="prefill", contender=name, backend=contender.backend,
                case={"tokens": tokens, "n_layer": config.n_layer, "n_embd": config.n_embd},
                device="cpu", dtype=self.dtype, flops=work_flops(config, tokens), flops_kind="work",
                memory_bytes=m.memory_bytes, base_bytes=m.base_bytes, weight_bits=contender.bits.get(self.dtype),
            )
            for name, m in measured.items() for contender in [PREFILL_CONTENDERS[name]]
        ]  # fmt: skip

    def _start(self, name: str, folder: str) -> WorkerProcess:
        PREFILL_CONTENDERS[name].expect_installed()
        request = {"make": f"{__name__}:prefill_step", "threads": torch.get_num_threads(),
                   "config": dataclasses.asdict(self.config), "tokens": self.tokens, "dtype": self.dtype,
                   "contender": name, "logits": str(_logits_file(folder, name))}  # fmt: skip
        return WorkerProcess(name, request, PREFILL_CONTENDERS[name].environment)


def _logits_file(folder: str, name: str) -> Path:
    return Path(folder, f"{name}.pt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--tokens", type=integer(), default=512, help="prompt tokens (default 512)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="weight format; repeatable; default: all")


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    expect_cpu("prefill", device)
    config = preset(args.model)
    return [PrefillCase(args.model, config, args.tokens, dtype, rounds=15) for dtype in args.dtype or DTYPES]


def work_flops(config: GPTConfig, tokens: int) -> float:
    """Return the work FLOPs of a prompt: half of attention (causal), and one position after the last attention."""
    c = config
    once = 2.0 * c.n_embd * (c.vocab_size + c.n_head * c.head_dim + 2 * c.n_inner)
    return tokens * forward_flops(c, tokens, causal=True) - (tokens - 1) * once


def prefill_inputs(config: GPTConfig, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return (state dict, prompt (1, T) int64), the same in each process."""
    torch.manual_seed(SEED)
    return GPT(config).state_dict(), torch.randint(config.vocab_size, (1, tokens))


def reference_logits(config: GPTConfig, tokens: int) -> Tensor:
    """Return the logits (1, V) of eager at the last position, in float32."""
    state, ids = prefill_inputs(config, tokens)
    model = EagerGPT(config)
    model.load_state_dict(state, assign=True)
    with torch.inference_mode():
        return model(ids)[:, -1]


def prefill_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """Return the step of a contender: `make` of a worker process.

    Args:
        request: contender, config, tokens, dtype, logits (file for the logits of the first run).
    Returns:
        A function that runs the prompt and returns one logit.
    """
    config = GPTConfig(**request["config"])
    state, ids = prefill_inputs(config, request["tokens"])
    prefill = PREFILL_CONTENDERS[request["contender"]].build(state, config, ids, getattr(torch, request["dtype"]))
    return saving_first(prefill, request["logits"], lambda logits: float(logits[0, 0]))


# ---- builders: (state, config, ids (1, T), dtype) -> Prefill. They may reuse the tensors of `state`.


def _ours(state: Mapping[str, Tensor], config: GPTConfig, ids: Tensor, dtype: torch.dtype) -> Prefill:
    # Only this contender needs the C++ extension.
    from peakgpt.engine.inference.program_executor import ProgramExecutor

    blocks = range(blocks_for(ids.shape[1]))
    executor, chunk = ProgramExecutor(our_model(state, config, _name(dtype)), len(blocks)), Chunk(ids[0], 0, blocks)
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


def _static_cache(compiled: bool, state, config: GPTConfig, ids: Tensor, dtype: torch.dtype) -> Prefill:
    """Run plain torch with a preallocated KV cache."""
    model = _loaded(PromptGPT(config), state, dtype)
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


def _transformers(state, config: GPTConfig, ids: Tensor, dtype: torch.dtype) -> Prefill:
    model = transformers_model(state, config, dtype)
    return torch.inference_mode()(lambda: model(ids, use_cache=True, logits_to_keep=1).logits[:, -1])


def _ctranslate2(state, config: GPTConfig, ids: Tensor, dtype: torch.dtype) -> Prefill:
    """Generate one token, which is how CTranslate2 computes only the logits of the last position."""
    generator, prompts = ctranslate2_generator(state, config, _name(dtype)), ctranslate2_prompts(ids)
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


def _openvino(state, config: GPTConfig, ids: Tensor, dtype: torch.dtype) -> Prefill:
    """Run the exported graph of plain torch with OpenVINO, which has its own SDPA; see `openvino_request`."""
    import openvino

    model = _WithCache(_loaded(PromptGPT(config), state, torch.float32))
    with torch.no_grad():
        graph = openvino.convert_model(torch.export.export(model, (ids,)))
    request, prompt = openvino_request(graph, _name(dtype)), ids.numpy()
    return lambda: torch.from_numpy(request.infer({0: prompt}, share_inputs=True, share_outputs=True)[0])


def _loaded(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    model.load_state_dict(state, assign=True)
    return model.to(dtype).eval()


PREFILL_CONTENDERS = {
    "peakgpt": Contender(_ours, package="peakgpt", formats=("float32", "bfloat16", "int8"), bits=OUR_BITS),
    "peakgpt, tuned malloc": Contender(_ours, TUNED_ENVIRONMENT, package="peakgpt"),
    "eager": Contender(_eager),
    "eager, tuned malloc": Contender(_eager, TUNED_ENVIRONMENT),
    "compile": Contender(_compiled),
    "compile, tuned malloc": Contender(_compiled, TUNED_ENVIRONMENT),
    "transformers": Contender(_transformers, package="transformers"),
    "openvino": Contender(_openvino, package="openvino", formats=DTYPES),
    "ctranslate2": Contender(_ctranslate2, package="ctranslate2", formats=("float32", "int8")),
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
