"""Steps of many sequences by a model's ops: each gets what the model alone would give it."""

import pytest
import torch

from peakgpt.engine.config import GPTConfig
from peakgpt.engine.model import GPT
from peakgpt.engine.paged import Chunk
from peakgpt.engine.paged_runner import PagedRunner

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 200, "vocab_size": 97}
MODELS = {
    "gpt2": {},
    "opt": {"position_offset": 2, "residual": "post_norm", "word_dim": 16, "activation": "relu"},
    "neox": {"residual": "parallel_two_norms", "position": "rotary", "rotary_dim": 4, "tied_head": False},
    "gptj": {"residual": "parallel", "position": "rotary", "rotary_dim": 6, "rotary_interleaved": True,
             "tied_head": False, "head_bias": True},
    "neo": {"windows": (None, 70), "n_kv_head": 2, "attention_scale": 1.0},
    "bloom": {"position": "alibi", "embedding_norm": True},
    "palm": {"residual": "parallel", "position": "rotary", "n_kv_head": 1, "norm": "rms", "gated_mlp": True,
             "activation": "silu", "bias": False, "logit_scale": 0.125},
    "glam": {"experts": 4, "experts_per_token": 2, "experts_every": 1},
}  # fmt: skip


def model_of(name, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **MODELS[name], **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_prompts_in_pieces_beside_each_other_and_decoding(name):
    """Three texts of which some grow by chunks, some by a token, in blocks that lie anywhere; then all by a token."""
    model = model_of(name)
    texts = torch.randint(97, (3, 140))
    expected = model(texts)
    runner = PagedRunner(model, blocks=9)
    tables, past = ([6, 0, 4], [2, 5, 1], [8, 3, 7]), [0, 0, 0]

    def step(counts, wanted=lambda new: new):
        live = [i for i, new in enumerate(counts) if new]
        chunks = [
            Chunk(texts[i, past[i] : past[i] + counts[i]], past[i], tables[i], wanted(counts[i])) for i in live
        ]
        got, rows = runner.step(chunks), []
        for i in live:
            past[i] += counts[i]
            rows.append(expected[i, past[i] - wanted(counts[i]) : past[i]])
        torch.testing.assert_close(got, torch.cat(rows), rtol=1e-5, atol=2e-5)

    for counts in ((70, 3, 0), (1, 66, 60), (58, 1, 5), (5, 1, 1), (1, 1, 1), (1, 1, 0), (1, 1, 1)):
        step(counts)
    step((1, 9, 2), wanted=lambda new: new // 2)
