"""Greedy decoding of one or several streams on the CPU, beside transformers, plain torch and CTranslate2.

Every contender runs the same random weights in a process of its own. A step continues all streams' prompts to the end,
so that a short prompt is part of it. Bytes, for MBU, are the weights and the cache read once for each new token of all
streams together: what must be read.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.bench.contenders import SEED
from peakgpt.bench.eager_gpt import EagerGPT
from peakgpt.bench.ops import OnFailure, raise_it
from peakgpt.bench.prefill import Contender as PrefillContender
from peakgpt.bench.worker import Worker
from peakgpt.engine.config import GPTConfig
from peakgpt.engine.layers import swap_layout
from peakgpt.engine.model import GPT
from peakgpt.engine.paged import BLOCK
from peakgpt.kernels.clock import Result, interleave
from peakgpt.kernels.device import peak_for

Continue = Callable[[], Tensor]  # -> (streams, tokens) int64
ALIKE = 4  # tokens that must be transformers' in float32: later ones may differ by a rounding, where two are as likely


@dataclass(frozen=True)
class Case:
    """How many streams of which prompt and continuation, in tokens."""

    streams: int
    prompt: int
    tokens: int


def compare_streams(
    config: GPTConfig,
    case: Case,
    dtype: torch.dtype,
    names: Sequence[str] | None = None,
    *,
    rounds: int = 7,
    on_failure: OnFailure = raise_it,
) -> list[Result]:
    """Time decoding, once each contender's text begins as plain torch's in float32 does.

    Args:
        config: the model.
        case: of the streams.
        dtype: to compute in.
        names: of CONTENDERS; None means all.
        rounds: see clock.interleave.
        on_failure: told of a contender that is not installed, ends, or has another text; the others are timed.
    Returns:
        A result a contender.
    """
    name_of = str(dtype).removeprefix("torch.")
    state, ids = start(config, case)
    expected, workers, notes = _eager(state, config, ids, case, torch.float32)(), {}, {}
    request = {"make": f"{__name__}:decode_step", "threads": torch.get_num_threads(), "dtype": name_of,
               "config": dataclasses.asdict(config), "case": dataclasses.asdict(case)}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, name in enumerate(names or CONTENDERS):
                path = Path(folder, f"{number}.pt")
                try:
                    CONTENDERS[name].expect_installed()
                    if dtype not in DTYPES.get(name, (dtype,)):
                        raise NotImplementedError(f"not measured, {name} has no {name_of} on CPUs")
                    workers[name] = Worker(name, {**request, "contender": name, "text": str(path)}, {})
                    workers[name].step()
                    notes[name] = _alike(name, torch.load(path), expected, dtype)
                except Exception as error:  # whatever a peer does must not keep the others from being timed
                    on_failure(name, error)
                    if name in workers:
                        workers.pop(name).close()
            timings = interleave({n: w.step for n, w in workers.items()}, rounds=rounds, warmup=1,
                                 workers=[w.pid for w in workers.values()]) if workers else {}  # fmt: skip
        finally:
            for worker in workers.values():
                worker.close()
    peak = peak_for("cpu", dtype)
    return [
        Result.of(
            dataclasses.replace(timing, note="; ".join(filter(None, [timing.note, notes[n], CONTENDERS[n].version]))),
            bench="decode", contender=n, backend="auto" if n == "peakgpt" else CONTENDERS[n].package, device="cpu",
            dtype=name_of, case={"n_layer": config.n_layer, "n_embd": config.n_embd, "prompt": case.prompt,
                                 "tokens": case.tokens, "batch": case.streams},
            bytes=read_bytes(config, case, dtype), peak_bytes_s=peak.bandwidth_bytes_s, peak_source=peak.source,
        )
        for n, timing in timings.items()
    ]  # fmt: skip


def read_bytes(config: GPTConfig, case: Case, dtype: torch.dtype) -> float:
    """Weights and, for each stream, the keys and values before it, once for each new token."""
    with torch.device("meta"):
        model = GPT(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    cached = 2 * config.n_layer * config.n_kv_head * config.head_dim * (case.prompt + case.tokens / 2) * case.streams
    return case.tokens * (weights + cached) * dtype.itemsize


def start(config: GPTConfig, case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """(weights, (streams, prompt) int64), the same in each process.

    Positions weigh more than GPT-2's initialisation has them: else the tied head repeats one token for ever.
    """
    torch.manual_seed(SEED)
    state = GPT(config).state_dict()
    state["transformer.wpe.weight"] *= 20
    return state, torch.randint(config.vocab_size, (case.streams, case.prompt))


def _alike(name: str, text: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """How far texts are alike, for a note.

    Raises:
        ValueError: in float32 not far enough, or not the asked number of tokens.
    """
    if text.shape != expected.shape:
        raise ValueError(f"decode: {name}: text has shape {tuple(text.shape)}, expected {tuple(expected.shape)}")
    same = int((text == expected).long().cumprod(1).sum(1).min())
    if dtype == torch.float32 and same < min(ALIKE, expected.shape[1]):
        raise ValueError(f"decode: {name}: only the first {same} tokens are eager's, expected at least {ALIKE}")
    return f"{name}: the first {same} of {expected.shape[1]} tokens are those of eager in float32"


def decode_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """A contender's decoding, for a worker.

    Args:
        request: contender, config, case, dtype, text (the file into which the first one is written).
    Returns:
        A function that decodes and returns one token.
    """
    config, case = GPTConfig(**request["config"]), Case(**request["case"])
    state, ids = start(config, case)
    decode = CONTENDERS[request["contender"]].build(state, config, ids, case, getattr(torch, request["dtype"]))
    torch.save(decode(), request["text"])
    return lambda: float(decode()[0, -1])


# ---- contenders: each makes a Continue of a state, which it may take the tensors of


def _ours(state, config: GPTConfig, ids: Tensor, case: Case, dtype: torch.dtype) -> Continue:
    from peakgpt.engine.scheduler import Engine, SamplingParams  # needs tokenizers

    model = GPT(config)
    model.load_state_dict(state, assign=True)
    blocks = case.streams * -(-(case.prompt + case.tokens) // BLOCK)
    # As many prompts as there are blocks for: what was computed for one run is given up before the next.
    engine = Engine(model.to(dtype).eval(), blocks=blocks)
    if engine.runner_note:
        raise ValueError(f"decode: peakgpt runs {engine.runner_note}")
    params = SamplingParams(temperature=0.0, max_new_tokens=case.tokens)

    def run() -> Tensor:
        texts = {engine.submit(row, params): [] for row in ids.tolist()}
        for output in engine.outputs():
            texts[output.request] += output.tokens
        return torch.tensor(list(texts.values()))

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


def _eager(state, config: GPTConfig, ids: Tensor, case: Case, dtype: torch.dtype) -> Continue:
    model = StaticGPT(config)
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


def _transformers_model(state, config: GPTConfig, dtype: torch.dtype):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, n_inner=config.n_inner, layer_norm_epsilon=config.layer_norm_epsilon,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(theirs)
    names = {name.removeprefix("transformer."): tensor for name, tensor in swap_layout(state).items()}
    model.transformer.load_state_dict(names)
    return model.to(dtype).eval()


def _transformers(state, config: GPTConfig, ids: Tensor, case: Case, dtype: torch.dtype) -> Continue:
    model = _transformers_model(state, config, dtype)
    options = {"max_new_tokens": case.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, **options)[:, case.prompt :]


def _ctranslate2(state, config: GPTConfig, ids: Tensor, case: Case, dtype: torch.dtype) -> Continue:
    """By its own converter, from transformers' layout; a made-up vocabulary names each id."""
    import ctranslate2
    import tokenizers
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        _transformers_model(state, config, torch.float32).save_pretrained(folder)
        library = tokenizers.Tokenizer(tokenizers.models.BPE({f"t{i}": i for i in range(config.vocab_size)}, []))
        marks = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t0")
        transformers.PreTrainedTokenizerFast(tokenizer_object=library, **marks).save_pretrained(folder)
        made = str(Path(folder, "converted"))
        ctranslate2.converters.TransformersConverter(folder).convert(made)
        generator = ctranslate2.Generator(made, compute_type=str(dtype).removeprefix("torch."), inter_threads=1,
                                          intra_threads=torch.get_num_threads())  # fmt: skip
    prompts = [[f"t{i}" for i in row] for row in ids.tolist()]

    def run() -> Tensor:
        found = generator.generate_batch(prompts, max_length=case.tokens, min_length=case.tokens, sampling_topk=1,
                                         include_prompt_in_result=False, end_token=[])  # fmt: skip
        return torch.tensor([r.sequences_ids[0] for r in found])

    return run


def _contender(build: Callable[..., Continue], package: str = "torch") -> PrefillContender:
    return PrefillContender(build, package=package)


CONTENDERS = {
    "peakgpt": _contender(_ours),
    "eager": _contender(_eager),
    "transformers": _contender(_transformers, "transformers"),
    "ctranslate2": _contender(_ctranslate2, "ctranslate2"),
}
DTYPES = {"ctranslate2": (torch.float32,)}  # those that compute in some only
