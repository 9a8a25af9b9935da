"""Batches that grow and rows of masked documents, through the loop: resumed to the bit, and in CUDA graphs."""

import itertools

import pytest
import torch
from tiny_run import VOCAB, new_run, train

from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.shard_writer import write_shards
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.gpt import GPT
from peakgpt.engine.graph_dry_run import DryRun
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training import trainer as trainer_module
from peakgpt.engine.training.loop import StepMetrics, TrainingLoop
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.engine.training.validation import Validator
from peakgpt.engine.training.validation_config import ValidationConfig
from peakgpt.kernels.core.dispatch import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")

RAMP = {"batch": 7, "micro_batch": 2, "ramp_batch": 2, "ramp_tokens": 16 * 40}
SEPARATOR = 3


def build(tokens, *, document_token=None, position="learned", **settings):
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": VOCAB, "dropout": 0.1}
    config = TrainConfig(**{"batch": 4, "tokens": 16, "lr": 1e-2, "steps": 20, **settings})
    batches = Batches(TokenShards.open(tokens, "train"), config.batch, 16, 7, document_token=document_token)
    return TrainingLoop(Trainer(GPT(GPTConfig(**sizes, position=position)), config), batches)


def test_a_growing_batch_takes_every_window_once_and_counts_its_own_tokens(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run")
    loop, rows = build(run.tokens, **RAMP), []
    step = loop.trainer.step
    monkeypatch.setattr(loop.trainer, "step", lambda ids, targets: rows.append(ids) or step(ids, targets))
    events = list(loop.run(15))
    sizes = [len(ids) for ids in rows]
    assert sizes == sorted(sizes) and sizes[0] == 2 and sizes[-1] == 7 and set(sizes) == {2, 4, 6, 7}
    assert loop.trainer.schedule.tokens(15) == 16 * sum(sizes)
    single = Batches(loop.batches._sources[0].shards, 1, 16, 7)
    assert torch.equal(torch.cat(rows), torch.cat([next(single)[0] for _ in range(sum(sizes))]))
    for event, size in zip((e for e in events if isinstance(e, StepMetrics)), sizes, strict=True):
        assert event.tokens_per_s * event.seconds == pytest.approx(16 * size)


@pytest.mark.parametrize("until", [3, 9])
@pytest.mark.parametrize(
    "settings",
    [RAMP, {"mask_documents": True, "document_token": SEPARATOR, "micro_batch": 3},
     {"ema_decay": 0.9, "schedule": "cosine", "warmup_tokens": 300, "dtype": torch.bfloat16}],
    ids=["ramp", "masked documents", "average"],
)  # fmt: skip
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, settings, until):
    """Mutation that makes it fail: an average that a checkpoint does not restore, or a batch that the ramp forgets."""
    whole, parts = (new_run(tmp_path / name) for name in ("whole", "parts"))
    expected = train(whole, build(whole.tokens, **settings), save_every=3)
    train(parts, build(parts.tokens, **settings), save_every=3, until=until)
    losses = train(RunFolder.reopen(parts.path), build(parts.tokens, **settings), save_every=3)
    assert losses == expected and len(losses) == 20


@pytest.mark.parametrize("settings", [RAMP, {"mask_documents": True, "document_token": SEPARATOR, "micro_batch": 2}],
                         ids=["ramp", "masked documents"])  # fmt: skip
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_a_graphed_step_has_the_bits_of_the_plain_step(tmp_path, monkeypatch, settings, position):
    """Each size of the batch has its own graph. Documents begin at other tokens in each batch, in tensors of one shape.

    Mutation that makes it fail: _captured_state without the shapes (no graph for the later sizes), or starts of
    documents as a list without padding.
    """
    run, graphs = new_run(tmp_path / "run"), []

    def make_graph():
        graphs.append(DryRun())
        return graphs[-1]

    with use_backend("eager"):
        plain = [event.loss for event in build(run.tokens, position=position, **settings).run()]
        monkeypatch.setattr(trainer_module, "step_graphs", lambda device: make_graph)
        loop = build(run.tokens, position=position, **settings)
        assert [event.loss for event in loop.run()] == plain
    captured = [graph for graph in graphs if graph.outputs is not None]
    sizes = [len(list(group)) for _, group in itertools.groupby(map(loop.trainer.schedule.batch, range(20)))]
    assert len(captured) == sum(count > 2 for count in sizes) > 0  # two calls of each size warm up


def test_masked_documents_of_micro_batches_give_the_update_of_the_whole_batch(tmp_path):
    run = new_run(tmp_path / "run")
    losses = []
    for micro_batch in (None, 3):
        loop = build(run.tokens, mask_documents=True, document_token=SEPARATOR, micro_batch=micro_batch)
        loop.trainer.model.eval()  # no dropout, which differs between micro-batches
        losses.append([event.loss for event in loop.run(6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_masked_documents_are_also_masked_in_validation(tmp_path):
    """Mutation that makes it fail: validation without the document token."""
    ids = [[1, 2, 3, 5, 8, SEPARATOR, 9, 9, 1, 7, SEPARATOR, 4, 6, 2, 5, 1, 8]]
    write_shards(tmp_path, "validation", ids, VOCAB, text_bytes=17, corpus_digest="d")
    shards = TokenShards.open(tmp_path, "validation")
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=VOCAB)).eval()
    tokens = torch.tensor(ids[0])
    total = 0.0
    for begin, end in itertools.pairwise((0, 2, 5, 10, 16)):  # each document begins with the separator
        total += model(tokens[None, begin:end], tokens[None, begin + 1 : end + 1]).item() * (end - begin)
    validator = Validator(model, {"validation": shards}, ValidationConfig(), batch=1, tokens=16,
                          document_token=SEPARATOR)  # fmt: skip
    assert validator.validate(0).loss == pytest.approx(total / 16, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_documents": True}, "mask_documents is True, expected batches with a document_token"),
        ({"document_token": 3}, "mask_documents is False, expected batches with a document_token for True"),
        ({"mask_documents": True, "document_token": 3, "position": "transformer_xl"}, "position transformer_xl"),
    ],
)
def test_masks_that_would_not_act_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(new_run(tmp_path / "run").tokens, **settings)


def test_a_trainer_refuses_a_length_that_contradicts_its_config():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=VOCAB))
    with pytest.raises(ValueError, match="steps is 5 and the config's is 4, expected one of the two"):
        Trainer(model, TrainConfig(batch=2, tokens=16, steps=4), steps=5)
    assert Trainer(model, TrainConfig(batch=2, tokens=16, max_tokens=100)).steps == 3
