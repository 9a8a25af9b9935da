"""Masks and losses of supervised fine-tuning are those of TRL on the same ten conversations."""

import datasets
import pytest
import torch
import transformers
from sft_data import BLOCKS, PLAIN, checkpoint, conversations, make_task, write_lines

from peakgpt.engine.gpt import GPT
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX

trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
TOKENS = 300
PAIRS = [{"prompt": f"What is {i} plus {i}?", "completion": f" It is {2 * i}" + " indeed" * (i % 4)} for i in range(10)]
TURNS = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in conversations()]
# name -> (chat template, rows, options of TRL)
CASES = {
    "generation blocks": (BLOCKS, [{"messages": m} for m in conversations()], {"assistant_only_loss": True}),
    "last answers": (PLAIN, TURNS, {}),
    "completions": (PLAIN, PAIRS, {}),
    "all tokens": (BLOCKS, [{"messages": m} for m in conversations()], {}),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    template, rows, options = CASES[request.param]
    folder = checkpoint(tmp_path / "model", template)
    settings = {"train_on": "all"} if request.param == "all tokens" else {}
    return folder, write_lines(tmp_path / "data.jsonl", rows), rows, options, settings


def trl_trainer(folder, out, rows, **options):
    config = trl.SFTConfig(output_dir=str(out), use_cpu=True, bf16=False, report_to="none", max_length=TOKENS + 1,
                           **options)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    return trl.SFTTrainer(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
                          processing_class=transformers.AutoTokenizer.from_pretrained(folder))  # fmt: skip


def targets_of(ids, labels):
    """(ids, targets) of TRL's row, in our form."""
    return list(ids[:-1]), [IGNORE_INDEX if label == -100 else label for label in labels[1:]]


def losses(task, rows, folder, trainer):
    """Our loss and TRL's on the same examples, each by its own collator."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    ids, targets, *position_ids = task.collate(rows)
    keywords = {"position_ids": position_ids[0]} if position_ids else {}
    with torch.no_grad():
        theirs = trainer.model.eval()(**{k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}).loss
        return GPT.from_pretrained(folder)(ids, targets, **keywords), theirs


def test_masks_and_loss_of_padded_conversations_are_those_of_trl(case, tmp_path):
    folder, data, rows, options, settings = case
    task, found = make_task(folder, data, tokens=TOKENS, packing=False, **settings)
    examples = task.encode(found)
    trainer = trl_trainer(folder, tmp_path / "trl", rows, **options)
    theirs = [targets_of(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    assert [(list(e["ids"]), list(e["targets"])) for e in examples] == theirs
    assert len(examples) == 10 and all(max(targets) >= 0 for _, targets in theirs)
    torch.testing.assert_close(*losses(task, examples, folder, trainer), rtol=1e-5, atol=0)


def test_the_loss_of_packed_conversations_is_that_of_trl(case, tmp_path):
    folder, data, rows, options, settings = case
    task, found = make_task(folder, data, tokens=TOKENS, packing=True, **settings)
    packed = task.arrange(task.encode(found))
    assert len(packed) < 10, "some rows have several conversations"
    trainer = trl_trainer(folder, tmp_path / "trl", rows, packing=True, **options)
    torch.testing.assert_close(*losses(task, packed, folder, trainer), rtol=1e-5, atol=0)
