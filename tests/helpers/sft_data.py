"""A tiny checkpoint with a chat template, ten conversations in each shape, and the task that encodes them."""

import json

import torch

from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.finetuning.config import FinetuneConfig
from peakgpt.engine.finetuning.rows import read_rows
from peakgpt.engine.finetuning.tasks.sft import Sft
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

# Each turn ends with the end of text. BLOCKS marks answers itself; PLAIN does not.
BLOCKS = """{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {{- "<|assistant|>\n" -}}{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}{{- "\n" -}}
    {%- else -%}
        {{- "<|" + message.role + "|>\n" + message.content + eos_token + "\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>\n" -}}{%- endif -%}"""
PLAIN = BLOCKS.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
# In the style of Qwen3: the last answer has a place for reasoning, which earlier ones lose.
THINKING = PLAIN.replace("{{- message.content", '{{- ("<think></think>" if loop.last else "") + message.content')


def conversations(count=10):
    """Return lists of messages: different lengths, one to three turns, some with a system message."""
    found = []
    for i in range(count):
        messages = [{"role": "system", "content": "Add numbers."}] if i % 4 == 1 else []
        for turn in range(1 + i % 3):
            question = f"What is {i} plus {turn}" + ", please" * (i % 5)
            answer = f"It is {i + turn}" + ", sure" * (i % 2)
            messages += [{"role": "user", "content": f"{question}?"}, {"role": "assistant", "content": f"{answer}."}]
        found.append(messages)
    return found


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def checkpoint(folder, template=BLOCKS, *, block_size=512, **sizes):
    """Write a tiny GPT-2 with a tokenizer; return the folder as text."""
    words = [" ".join(message["content"] for message in messages) for messages in conversations(40)]
    tokenizer = train_tokenizer(words, 300)
    tokenizer = tokenizer if template is None else tokenizer.with_chat_template(template)
    torch.manual_seed(0)
    config = GPTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": block_size,
                          "vocab_size": tokenizer.vocab_size, **sizes})  # fmt: skip
    GPT(config).save_pretrained(folder, tokenizer)
    return str(folder)


def make_task(init, data, **settings):
    """Return the task of a new run, and the rows of its data."""
    from peakgpt.engine.data.tokenizer import Tokenizer

    config = FinetuneConfig.of({"task": "sft", "init": init, "data": (data,), **settings})
    return Sft(config, Tokenizer.load(init)), read_rows([data])


def trained_text(task, example):
    """Return the text of the targets of an example that have a loss."""
    return task.tokenizer.decode([i for i in example["targets"].tolist() if i >= 0])
