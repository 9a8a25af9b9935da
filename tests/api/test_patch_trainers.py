"""Patched models under Trainer, accelerate, torch.compile and FSDP2."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import peakgpt

transformers.logging.set_verbosity_error()
VOCAB = 101
CONFIGS = {
    "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "Llama": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48},
    "GPTNeoX": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48},
    "Bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
}


ONE_LAYER = {kind: {name: 1 for name in fields if "layer" in name} for kind, fields in CONFIGS.items()}


def build(kind="GPT2", **fields):
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    fields = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **CONFIGS[kind], **fields}
    if kind == "GPT2":
        fields = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **fields}
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**fields))


def ids(rows=2, tokens=10):
    return torch.randint(5, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


def gradients(model, run=None):
    model.zero_grad(set_to_none=True)
    loss = (model if run is None else run)(ids(), labels=ids(), use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def expect_same(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", CONFIGS)
def test_patched_model_compiles_fullgraph_with_same_gradients(kind):
    model = build(kind, **ONE_LAYER[kind]).train()
    expected = gradients(model)
    expected = expected[0], {n: g.clone() for n, g in expected[1].items()}
    peakgpt.patch(model, check=False)
    expect_same(gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager")), expected)


def train(model, folder, **options):
    rows = [{"input_ids": row, "labels": row} for row in ids(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=3, per_device_train_batch_size=2, logging_steps=1,
        gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, seed=0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["plain", "bf16"])
def test_transformers_trainer_gives_same_losses(options, tmp_path):
    """Trainer passes num_items_in_batch and inspects the signature of forward."""
    pytest.importorskip("accelerate")
    stock = build()
    patched = copy.deepcopy(stock)
    peakgpt.patch(patched)
    expected, got = train(stock, tmp_path, **options), train(patched, tmp_path, **options)
    limit = 2e-2 if options else 1e-4
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(expected[0]), rtol=limit, atol=limit)
    assert got[1] == pytest.approx(expected[1], rel=limit)
    assert got[0][-1] < got[0][0]


def test_accelerate_gives_same_loss():
    accelerate = pytest.importorskip("accelerate")
    losses = []
    for patched in (False, True):
        model = build()
        if patched:
            peakgpt.patch(model)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model, optimizer = accelerator.prepare(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-2))
        for _ in range(3):
            loss = model(ids(), labels=ids()).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        del accelerator
        accelerate.state.AcceleratorState._reset_state(True)
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["patch", "shard"])
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_fsdp2_gives_same_gradients_patched_before_or_after(kind, first, one_rank):
    model = build(kind).train()
    expected = gradients(model)
    expected = expected[0], {n: g.clone() for n, g in expected[1].items()}
    blocks = model.transformer.h if kind == "GPT2" else model.model.layers

    def shard():
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for block in blocks:
            fully_shard(block.mlp, mesh=mesh)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    steps = [shard, lambda: peakgpt.patch(model, check=first == "shard")]
    for step in steps if first == "shard" else steps[::-1]:
        step()
    assert all(isinstance(p, DTensor) for p in model.parameters()), "an optimizer is made of shards"
    loss, grads = gradients(model)
    expect_same((loss, {n: g.full_tensor() for n, g in grads.items()}), expected)
    if first == "shard":
        peakgpt.unpatch(model)
        loss, grads = gradients(model)
        expect_same((loss, {n: g.full_tensor() for n, g in grads.items()}), expected)
    else:
        with pytest.raises(ValueError, match="was wrapped after it was patched"):
            peakgpt.unpatch(model)


TWO_RANKS = """
import os, sys
import torch, transformers
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import peakgpt

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = transformers.GPT2LMHeadModel.from_pretrained(folder).train()
for block in model.transformer.h:
    fully_shard(block)
fully_shard(model)
report = peakgpt.patch(model, strict=True)
assert report.replaced and "outputs within" in report.check, report
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
ids = torch.load(f"{folder}/ids.pt")[rank::2]
for _ in range(2):
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
state = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
if rank == 0:
    torch.save(state, f"{folder}/state.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp2_on_two_ranks_gives_same_weights(tmp_path):
    """Two steps of a patched, sharded model give the weights of the unpatched, unsharded model."""
    model = build().train()
    model.save_pretrained(tmp_path)
    torch.save(ids(4), tmp_path / "ids.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path)]) for rank in (0, 1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        model(ids(4), labels=ids(4), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    sharded = torch.load(tmp_path / "state.pt")
    assert sharded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_separately_sharded_head_computes_logits(one_rank):
    """Its weight is unsharded inside its own forward only."""
    model = build("GPT2", tie_word_embeddings=False).train()
    expected = gradients(model)
    expected = expected[0], {n: g.clone() for n, g in expected[1].items()}
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    peakgpt.patch(model)
    assert model(ids(), labels=ids()).logits is not None
    loss, grads = gradients(model)
    expect_same((loss, {n: g.full_tensor() for n, g in grads.items()}), expected)
