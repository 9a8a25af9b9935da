"""The shapes of data for supervised fine-tuning, and what is refused, in one sentence with file and line."""

import json
import re

import pytest
from sft_data import BLOCKS, PLAIN, THINKING, checkpoint, conversations, make_task, trained_text, write_lines
from tokenizers import processors

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is 3."}
CHAT = {"messages": [USER, ANSWER]}


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model"))


def encode(init, folder, rows, **settings):
    task, found = make_task(init, write_lines(folder / "data.jsonl", rows), **settings)
    return task, task.encode(found)


SHAPES = {
    "messages": CHAT,
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "It is 3."}]},
    "ShareGPT with more fields": {"conversations": [
        {"from": "human", "value": "Hi", "role": "boss"}, {"from": "gpt", "value": "It is 3.", "content": "It is 4."},
    ]},
    "conversations of roles": {"conversations": [USER, ANSWER]},
    "prompt and completion": {"prompt": [USER], "completion": [ANSWER]},
    "Alpaca": {"instruction": "Hi", "input": "", "output": "It is 3.", "text": "ignored"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_of_a_conversation_gives_the_same_tokens(init, tmp_path, name):
    task, (example,) = encode(init, tmp_path, [SHAPES[name]])
    assert task.tokenizer.decode(example["ids"]) == "<|user|>\nHi<|endoftext|>\n<|assistant|>\nIt is 3.<|endoftext|>"
    assert trained_text(task, example) == "It is 3.<|endoftext|>"


def test_alpaca_without_a_chat_template_has_alpacas_prompts(tmp_path):
    init = checkpoint(tmp_path / "model", None)
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Add 1 and 2.", "output": "3"}]
    task, (first, second) = encode(init, tmp_path, rows)
    text = task.tokenizer.decode(first["ids"])
    assert "paired with an input" in text
    assert "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3" in text
    assert "paired" not in task.tokenizer.decode(second["ids"])
    assert trained_text(task, first) == trained_text(task, second) == "3<|endoftext|>"


@pytest.mark.parametrize("template", [BLOCKS, PLAIN, THINKING])
def test_every_answer_of_a_conversation_has_a_loss(tmp_path, template):
    """With generation blocks, with prompts that begin the text, and with a template that changes earlier turns."""
    init = checkpoint(tmp_path / "model", template)
    task, examples = encode(init, tmp_path, [{"messages": messages} for messages in conversations()])
    for messages, example in zip(conversations(), examples, strict=True):
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        found = [text for text in re.split(r"<\|endoftext\|>\s*", trained_text(task, example)) if text]
        assert [text.removeprefix("<think></think>") for text in found] == answers


def test_an_answer_of_weight_0_has_no_loss(init, tmp_path):
    rows = [{"messages": [USER, {**ANSWER, "content": "No", "weight": 0}, USER, {**ANSWER, "weight": 1}]}]
    task, (example,) = encode(init, tmp_path, rows)
    assert trained_text(task, example) == "It is 3.<|endoftext|>"


@pytest.mark.parametrize("turns", [1, 2])
def test_what_a_template_writes_before_the_last_answer_has_a_loss(tmp_path, turns):
    """Empty reasoning, which a generation does not find in its prompt."""
    init = checkpoint(tmp_path / "model", THINKING)
    task, (example,) = encode(init, tmp_path, [{"messages": [USER, ANSWER] * turns}])
    answer = "It is 3.<|endoftext|>\n"
    assert trained_text(task, example) == answer * (turns - 1) + f"<think></think>{answer}"


def test_blanks_that_no_token_stands_for_do_not_move_the_mask(tmp_path):
    """A tokenizer that trims offsets has no token for a blank at the begin or the end of an answer."""
    init = checkpoint(tmp_path / "model", BLOCKS.replace("message.content + eos_token", "' ' + message.content + ' '"))
    task, rows = make_task(init, write_lines(tmp_path / "data.jsonl", [{"messages": [USER, ANSWER, USER, ANSWER]}]))
    task.tokenizer.library.post_processor = processors.ByteLevel(trim_offsets=True)
    (example,) = task.encode(rows)
    assert trained_text(task, example).replace(" ", "") == "Itis3.Itis3."


def test_a_template_of_the_user_is_saved_with_the_model(tmp_path):
    init = checkpoint(tmp_path / "model", None)
    (tmp_path / "chat.jinja").write_text(PLAIN)
    task, _ = encode(init, tmp_path, [CHAT], chat_template=str(tmp_path / "chat.jinja"))
    (tmp_path / "saved").mkdir()
    task.tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == PLAIN


def test_an_example_is_cut_only_when_asked(init, tmp_path):
    rows = [CHAT, {"messages": [USER, {**ANSWER, "content": "It is " + "3, " * 60}]}]
    with pytest.raises(ValueError, match=r"data\.jsonl:2: got an example of \d+ tokens, expected at most tokens 50"):
        encode(init, tmp_path, rows, tokens=50)
    _, examples = encode(init, tmp_path, rows, tokens=50, truncate=True)
    assert len(examples[1]["ids"]) == 50 and examples[1]["targets"][-1] >= 0


def chat(*messages):
    return {"messages": [dict(zip(("role", "content"), message, strict=True)) for message in messages]}


WRONG = {
    "missing fields": ({"question": "Hi"}, "got the fields question, expected messages (OpenAI)"),
    "text": ({"text": "Hi"}, "texts without answers are for `peakgpt train --init`"),
    "no output": ({"instruction": "Hi"}, "got the fields instruction, expected"),
    "mixed": ({"prompt": "Hi", "completion": "3"},
              "got prompt and completion (TRL), expected messages (OpenAI) as in"),
    "no list": ({"messages": "Hi"}, "got messages='Hi', expected a list of messages"),
    "unknown role": (chat(("boss", "Hi")), "got role='boss' in messages[0], expected one of system"),
    "no text": (chat(("user", 3)), "got content=3 in messages[0], expected text"),
    "picture": (chat(("user", [{"type": "image_url"}])), "got a part 'image_url' in messages[0]"),
    "empty answer": (chat(("user", "Hi"), ("assistant", " ")), "got an empty answer in content of messages[1]"),
    "answer first": (chat(("assistant", "3")), "got role assistant at the start in messages[0]"),
    "two questions": (chat(("user", "Hi"), ("user", "Hi"), ("assistant", "3")), "got role user after user in"),
    "late system": (chat(("user", "Hi"), ("system", "Hi")), "got role system after user in messages[1]"),
    "no answer": (chat(("user", "Hi")), "got a last message of user in messages, expected an answer"),
    "surrogate": (chat(("user", "\ud800"), ("assistant", "3")), "got the lone surrogate U+D800"),
    "tools": ({**CHAT, "tools": "{"}, "in 'tools', expected JSON"),
    "no weight": ({"messages": [USER, {**ANSWER, "weight": 0}]}, "got weight 0 for all answers"),
    "wrong weight": ({"messages": [USER, {**ANSWER, "weight": 2}]}, "got weight=2 of a message of assistant"),
    "variables": ({**CHAT, "chat_template_kwargs": {"mood": 1}}, "got mood, expected only what the template reads"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_row_is_one_sentence_with_file_and_line(init, tmp_path, name):
    row, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        encode(init, tmp_path, [CHAT, CHAT, row])
    assert f"{tmp_path / 'data.jsonl'}:3: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [{"prompt": "Hi", "completion": ""}, {"instruction": "Hi", "output": "\n"}])
def test_an_empty_completion_is_refused(init, tmp_path, row):
    with pytest.raises(ValueError, match=r"data\.jsonl:1: got an empty answer in"):
        encode(init, tmp_path, [row])


def test_messages_without_a_chat_template_are_refused(tmp_path):
    init = checkpoint(tmp_path / "model", None)
    with pytest.raises(ValueError, match="got messages for a checkpoint without a chat template"):
        encode(init, tmp_path, [CHAT])


@pytest.mark.parametrize("text", ["", " \n\n", "[1]\n", "{\n", json.dumps(CHAT) + "\nnull\n"])
def test_lines_that_are_no_objects_are_refused(init, tmp_path, text):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"data\.jsonl.* expected a JSON object a line"):
        make_task(init, str(tmp_path / "data.jsonl"))
