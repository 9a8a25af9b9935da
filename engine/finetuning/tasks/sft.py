"""Supervised fine-tuning: the model learns the answers of conversations.

    loss = sum over tokens t of answers of -ln p(t | all before it) / number of these tokens

Ouyang et al. 2022, "Training language models to follow instructions with human feedback", arXiv:2203.02155, section
3.5.
An example of n tokens is n - 1 inputs and their n - 1 targets, of which those outside of answers are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from peakgpt.engine.checkpoint.source_files import GENERATION_CONFIG
from peakgpt.engine.data.chat_tokens import assistant_mask
from peakgpt.engine.data.library_call import call
from peakgpt.engine.data.template_sandbox import Rendered
from peakgpt.engine.data.text_file import read_text
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.finetuning.answer_masks import common_prefix, on_tokens, render_answers
from peakgpt.engine.finetuning.config import FinetuneConfig
from peakgpt.engine.finetuning.conversations import Chat, Completion, read_conversations
from peakgpt.engine.finetuning.examples import Example, token_count
from peakgpt.engine.finetuning.language_examples import collate, pack
from peakgpt.engine.finetuning.rows import Row
from peakgpt.engine.finetuning.task import Task
from peakgpt.engine.finetuning.tasks.sft_config import ALL
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.generation_config import generation_config
from peakgpt.engine.model.positions import refuse_relative_positions
from peakgpt.engine.training.figures import percent_text
from peakgpt.engine.training.samples import Sampler
from peakgpt.engine.training.validation import SetMetrics
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX


class Sft(Task):
    """Trains the GPT itself."""

    name: ClassVar[str] = "sft"

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer, state: dict[str, Any] | None = None):
        super().__init__(config, tokenizer, state)
        if state is None and config.sft.chat_template is not None:
            self.tokenizer = tokenizer.with_chat_template(read_text(config.sft.chat_template))
        self.stop_ids: list[int] = (state or {}).get("stop_token_ids", [])
        self.packing = self.fixed_shapes = config.sft.packing
        if self.packing:
            refuse_relative_positions(config.model_config())

    def state_dict(self) -> dict[str, Any]:
        return {"stop_token_ids": self.stop_ids}

    # ---- rows to examples

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        conversations = read_conversations(rows, has_template=bool(self.tokenizer.chat.sources))
        pairs = list(zip(rows, conversations, strict=True))
        chats = [self._render(row, chat) for row, chat in pairs if isinstance(chat, Chat)]
        texts = [self._join(row, text) for row, text in pairs if isinstance(text, Completion)]
        encoded = {Chat: iter(self._encode_chats(chats)), Completion: iter(self._encode_completions(texts))}
        return [self._example(row, *next(encoded[type(found)])) for row, found in pairs]

    def _render(self, row: Row, chat: Chat) -> Rendered:
        if not self.tokenizer.chat.sources:
            raise row.error("got messages for a checkpoint without a chat template, expected one (--chat-template)")
        try:
            return render_answers(chat, self.tokenizer.chat, is_all=self._is_all)
        except ValueError as error:
            raise row.error(str(error)) from None

    def _join(self, row: Row, text: Completion) -> Completion:
        """Return a completion with the token that ends it."""
        end = self.tokenizer.end_of_text
        if end is None:
            raise row.error("got a completion for a tokenizer without an end-of-text token, expected one: it ends "
                            "each completion")  # fmt: skip
        return text if text.completion.endswith(end) else Completion(text.prompt, text.completion + end)

    def _encode_chats(self, chats: Sequence[Rendered]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of each text, and which of them have a loss."""
        texts = [chat.text for chat in chats]
        encodings = call(self.tokenizer.library.encode_batch, texts, add_special_tokens=False)  # with offsets
        pairs = [(encoding.ids, assistant_mask(on_tokens(chat, encoding), encoding))
                 for chat, encoding in zip(chats, encodings, strict=True)]  # fmt: skip
        self.stop_ids = sorted({*self.stop_ids, *self._ends(pairs[:1])})
        return pairs

    def _ends(self, pairs: Iterable[tuple[list[int], list[int]]]) -> Iterator[int]:
        """Yield the last special token that has a loss: the end of a turn."""
        special = {token for token, added in self.tokenizer.library.get_added_tokens_decoder().items() if added.special}
        for ids, mask in pairs:
            trained = [token for token, has_loss in zip(ids, mask, strict=True) if has_loss]
            yield from [token for token in trained if token in special][-1:]

    def _encode_completions(self, texts: Sequence[Completion]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of each text, and which of them have a loss: those behind what it has in common with the
        prompt alone, because tokens may merge across the end of the prompt.
        """  # fmt: skip
        prompts = self.tokenizer.encode_batch([text.prompt for text in texts])
        wholes = self.tokenizer.encode_batch([text.prompt + text.completion for text in texts])
        return [(ids, _behind(0 if self._is_all else common_prefix(prompt, ids), ids))
                for prompt, ids in zip(prompts, wholes, strict=True)]  # fmt: skip

    @property
    def _is_all(self) -> bool:
        return self.config.sft.train_on == ALL

    def _example(self, row: Row, ids: list[int], mask: list[int]) -> Example:
        limit = self.config.train.tokens
        if len(ids) - 1 > limit:
            if not self.config.data.truncate:
                raise row.error(f"got an example of {len(ids) - 1} tokens, expected at most tokens {limit} (--tokens "
                                f"up to {self.config.model_config().block_size}, or --truncate)")  # fmt: skip
            ids, mask = ids[: limit + 1], mask[: limit + 1]
        if not any(mask[1:]):
            raise row.error(f"got no token of an answer in the first {len(ids) - 1} tokens, expected one")
        targets = np.where(np.array(mask[1:], bool), np.array(ids[1:], np.int32), IGNORE_INDEX)
        return {"ids": np.array(ids[:-1], np.int32), "targets": targets.astype(np.int32)}

    # ---- examples to batches

    def arrange(self, examples: list[Example]) -> list[Example]:
        return pack(examples, self.config.train.tokens) if self.packing else examples

    def describe(self, examples: Sequence[Example], rows: Sequence[Example]) -> str:
        trained = sum(int((example["targets"] != IGNORE_INDEX).sum()) for example in examples)
        text = f"{super().describe(examples, rows)}, {trained:,} of them with a loss"
        if not self.packing:
            return text
        share = sum(map(token_count, examples)) / (len(rows) * self.config.train.tokens)
        return f"{text}; packed into {len(rows):,} rows, which are full to {percent_text(share)}"

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        """Return ids and targets, and of packed rows position_ids; all packed rows have `tokens` tokens."""
        return collate(examples, self.config.train.tokens if self.packing else None)

    # ---- model

    def model(self, gpt: GPT) -> GPT:
        """Return the GPT itself; its generation config names what ends a turn, so that a generation stops there."""
        known = generation_config(gpt).eos_token_id
        if not {*self.stop_ids} <= {*known, *self.tokenizer.stop_token_ids}:
            content, ends = gpt.source_files.get(GENERATION_CONFIG, {}), sorted({*known, *self.stop_ids})
            gpt.source_files = {**gpt.source_files, GENERATION_CONFIG: {**content, "eos_token_id": ends}}
        return gpt

    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> SetMetrics:
        losses: list[Tensor] = []
        counts: list[Tensor] = []
        for ids, targets, *position_ids in batches:
            losses.append(model(ids, targets, **({"position_ids": position_ids[0]} if position_ids else {})))
            counts.append((targets != IGNORE_INDEX).sum())
        count = torch.stack(counts)
        loss = torch.stack(losses).double() @ count.double() / count.sum()
        return SetMetrics(float(loss), int(count.sum()))

    def sampler(self, model: nn.Module) -> Sampler:
        """Return what answers the prompts of the run: each is the message of a user if there is a chat template."""
        return Sampler(model, self.config.validation, self.tokenizer, self._prompt_ids, self.config.train.seed)

    def _prompt_ids(self, prompt: str) -> list[int]:
        if not self.tokenizer.chat.sources:
            return self.tokenizer.encode(prompt)
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _behind(start: int, ids: Sequence[int]) -> list[int]:
    return [0] * start + [1] * (len(ids) - start)
