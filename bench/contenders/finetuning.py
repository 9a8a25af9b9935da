"""Contenders of supervised fine-tuning: peakgpt, and TRL on the model of transformers, padded and packed.

TRL's SFTTrainer brings its collator, its loss and its optimizer; only the loop around its training step is ours. It
runs without activation checkpointing, as peakgpt does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peakgpt.bench.contenders.contender import SEED, TUNED_ENVIRONMENT, Contender, State
from peakgpt.bench.contenders.training import TransformersGPT
from peakgpt.engine.finetuning.examples import Example
from peakgpt.engine.finetuning.language_examples import collate, pack
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX

ANSWER_SHARE = 0.5  # of an example
MEDIAN_SHARE, SPREAD = 0.2, 0.8  # of the lengths: their median as a share of the longest, and their log's deviation

Step = Callable[[], float]


def make_examples(config: GPTConfig, count: int, longest: int) -> list[Example]:
    """Return random examples whose lengths are distributed log-normally, as those of conversations are.

    The last half of an example is its answer, which alone has a loss.
    """
    random = np.random.default_rng(SEED)
    lengths = np.clip(random.lognormal(np.log(MEDIAN_SHARE * longest), SPREAD, count).astype(int), 8, longest)
    examples = []
    for length in lengths.tolist():
        ids = random.integers(config.vocab_size, size=length + 1, dtype=np.int32)
        targets = np.where(np.arange(length) < length * (1 - ANSWER_SHARE), IGNORE_INDEX, ids[1:]).astype(np.int32)
        examples.append({"ids": ids[:-1], "targets": targets})
    return examples


def _ours(state: State, config: GPTConfig, examples: Sequence[Example], train: TrainConfig) -> Step:
    model = GPT(config)
    model.load_state_dict(state)
    trainer = Trainer(model, train, steps=10_000)
    batch = collate(pack(examples, train.tokens), train.tokens)
    return lambda: float(trainer.step(*batch))


def _trl(
    state: State, config: GPTConfig, examples: Sequence[Example], train: TrainConfig, *, packing: bool
) -> Step:  # fmt: skip
    import datasets
    from trl import SFTConfig, SFTTrainer

    model = TransformersGPT(config)
    model.load_state_dict(state)
    options = SFTConfig(
        output_dir=tempfile.gettempdir(), use_cpu=True, bf16=train.dtype == torch.bfloat16, report_to="none",
        max_length=train.tokens + 1, packing=packing, activation_checkpointing=False, learning_rate=train.lr,
        lr_scheduler_type="constant", weight_decay=train.weight_decay,
        adam_beta1=train.betas[0], adam_beta2=train.betas[1], max_grad_norm=train.max_norm,
    )  # fmt: skip
    # TRL shifts labels itself: the label of a token is the target of the one before it, and the last token has one too.
    pairs = [(example["ids"].tolist(), example["targets"].tolist()) for example in examples]
    rows = [{"input_ids": [*ids, targets[-1]], "labels": [IGNORE_INDEX, *targets]} for ids, targets in pairs]
    trainer = SFTTrainer(model=model.model.train(), args=options, train_dataset=datasets.Dataset.from_list(rows),
                         processing_class=_tokenizer(config))  # fmt: skip
    trainer.create_optimizer()
    batch = trainer.data_collator(list(trainer.train_dataset))
    count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()

    def step() -> float:
        trainer.model.train()
        loss = trainer.training_step(trainer.model, dict(batch), count)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), options.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss)

    return step


def _tokenizer(config: GPTConfig) -> Any:
    """Return a tokenizer that TRL asks for its padding; the examples are token ids already."""
    import tokenizers
    import transformers

    words = {"<end>": 0, **{f"w{i}": i for i in range(1, config.vocab_size)}}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<end>", pad_token="<end>")


def _padded(*arguments: Any) -> Step:
    return _trl(*arguments, packing=False)


def _packed(*arguments: Any) -> Step:
    return _trl(*arguments, packing=True)


# build(state, config, examples, train_config) -> step, which makes one update on all examples and returns its loss
FINETUNING_CONTENDERS = {
    "peakgpt": Contender(_ours, package="peakgpt"),
    "TRL": Contender(_padded, package="trl"),
    "TRL, tuned malloc": Contender(_padded, TUNED_ENVIRONMENT, package="trl"),
    "TRL, packed": Contender(_packed, package="trl"),
    "TRL, packed, tuned malloc": Contender(_packed, TUNED_ENVIRONMENT, package="trl"),
}


def train_config(tokens: int, dtype: torch.dtype) -> TrainConfig:
    """Return the settings of the updates. The learning rate is high, so that a wrong update shows in the next loss."""
    return TrainConfig(tokens=tokens, dtype=dtype, lr=1e-3, warmup=0.0, schedule="constant", weight_decay=0.0,
                       betas=(0.9, 0.999))  # fmt: skip


def finetuning_step(request: Mapping[str, Any]) -> Step:
    """Return a contender's step: `make` of a worker process.

    Args:
        request: contender, config, examples, tokens, dtype.
    """
    config, tokens = GPTConfig(**request["config"]), request["tokens"]
    torch.manual_seed(SEED)
    state: dict[str, Tensor] = GPT(config).state_dict()
    examples = make_examples(config, request["examples"], tokens)
    contender = FINETUNING_CONTENDERS[request["contender"]]
    contender.expect_installed()
    return contender.build(state, config, examples, train_config(tokens, getattr(torch, request["dtype"])))
