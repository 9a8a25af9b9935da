"""The C++ program reads float weights where they are: it copies none, and takes rows at any distance.

Mutations that these tests detect: the weights copied when the program is built; a row's stride taken for its width; the
matrices of two experts taken as adjacent.
"""

import gc
import re
from pathlib import Path

import pytest
import torch

from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.program_executor import ProgramExecutor
from peakgpt.engine.model.config import GPTConfig

SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 4, "block_size": 300, "vocab_size": 97}
MODELS = {
    "tied head": {},
    "gates, untied head": {"gated_mlp": True, "activation": "silu", "bias": False, "tied_head": False},
    "experts": {"experts": 5, "experts_every": 1, "experts_per_token": 2, "gated_experts": True, "gated_mlp": True,
                "expert_inner": 40, "activation": "silu"},
}  # fmt: skip


def spread(tensor):
    """Return a tensor with the same values whose rows and matrices lie apart, with NaN between them."""
    wide = torch.full([size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
    view = wide[tuple(slice(size) for size in tensor.shape)]
    return view.copy_(tensor)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_rows_may_lie_apart(name, dtype, isa):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, **MODELS[name])).to(dtype).eval()
    ids = torch.randint(97, (100,))

    def logits():
        executor = ProgramExecutor(model, 2)
        return torch.cat([executor.step([Chunk(ids[:n], 0, (0, 1), n)]) for n in (1, 4, 9, 100)])

    expected = logits()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = spread(parameter)
    assert torch.equal(logits(), expected)


def private_bytes():
    """Return the resident memory of this process that is no page of a file."""
    gc.collect()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the system's list of a process's memory")
def test_generating_with_a_mapped_model_copies_no_weight(tmp_path):
    config = GPTConfig(n_layer=2, n_embd=1024, n_head=8, block_size=64, vocab_size=97, activation="relu",
                       position_offset=2, embedding_dropout=0.0)  # fmt: skip
    GPT(config).save_pretrained(tmp_path)
    model, ids = GPT.from_pretrained(tmp_path), torch.randint(97, (1, 32))
    weight_bytes = sum(p.nbytes for p in model.parameters())
    before = private_bytes()
    model.generate(ids, max_new_tokens=20)
    assert private_bytes() - before < weight_bytes / 10
