"""/v1/chat/completions: what the chat template gets, and that no template and no message stops the server."""

import asyncio
import json
import threading

import pytest
import serving  # skips all where the packages of peakgpt[serve] are missing
from conversations import IM, WEATHER
from serving import LIMITS, Running, with_chat
from tokenizers import processors

from peakgpt.engine.data import template_sandbox
from peakgpt.engine.data.chat_template import ChatTemplates
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.serve.chat import Chat
from peakgpt.serve.errors import BadRequest
from peakgpt.serve.schema import check_request

HELLO = [{"role": "user", "content": "hello"}]
SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ALL = ("{{ messages | tojson }}{{ tools | tojson }}{{ documents | tojson }}{{ add_generation_prompt }}{{ mode }}"
       "{{ reasoning_effort }}")  # fmt: skip


def prompt(chat, **fields):
    """The prompt of a request."""
    return chat.render(check_request({"messages": HELLO, **fields}, chat=True, limits=LIMITS).fields)


@pytest.fixture(scope="module")
def chat():
    return Chat(ChatTemplates({"default": ALL}, {}))


def test_every_field_reaches_the_template(chat):
    documents = [{"title": "A", "text": "b"}]
    assert prompt(chat) == f"{json.dumps(HELLO)}nullnullTrue"
    assert prompt(chat, tools=[WEATHER]) == f"{json.dumps(HELLO)}{json.dumps([WEATHER], ensure_ascii=False)}nullTrue"
    assert prompt(chat, documents=documents) == f"{json.dumps(HELLO)}null{json.dumps(documents)}True"
    assert prompt(chat, chat_template_kwargs={"mode": "fast"}, reasoning_effort="low").endswith("nullTruefastlow")
    assert prompt(chat, add_generation_prompt=False).endswith("nullnullFalse")


def test_tool_choice_none_hides_the_tools(chat):
    assert prompt(chat, tools=[WEATHER], tool_choice="none") == prompt(chat)
    assert prompt(chat, tools=[WEATHER], tool_choice="auto") == prompt(chat, tools=[WEATHER])
    assert prompt(chat, tools=[WEATHER], parallel_tool_calls=True) == prompt(chat, tools=[WEATHER])


def test_tools_choose_the_template_for_tools():
    chat = Chat(ChatTemplates({"default": "D", "tool_use": "T{{ tools[0].function.name }}"}, {}))
    assert (prompt(chat), prompt(chat, tools=[WEATHER])) == ("D", "Tweather")


def test_arguments_of_calls_become_objects(chat):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Z", "days": [1]}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call], "name": None}]
    (got,) = json.loads(prompt(chat, messages=messages).partition("null")[0])
    call = {**call, "function": {"name": "weather", "arguments": {"city": "Z", "days": [1]}}}
    assert got == {"role": "assistant", "tool_calls": [call]}


PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
         {"role": "assistant", "content": "c"}]  # fmt: skip
READS = ("{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
         "{{ p.text }}{% endfor %}{% endif %}{% endfor %}")  # fmt: skip


@pytest.mark.parametrize(("source", "expected"), [
    (READS, "abc"), ("{% for m in messages %}{{ m.content }}|{% endfor %}", "a\nb|c|"),
    ("{{ messages[1].content ~ messages[0].content | trim }}", "ca\nb"),
], ids=["reads parts", "writes a list", "fails on one message"])  # fmt: skip
def test_parts_are_joined_for_a_template_that_does_not_read_them(source, expected):
    assert prompt(Chat(ChatTemplates({"default": source}, {})), messages=PARTS) == expected


def test_final_message_is_continued():
    chat = Chat(ChatTemplates({"default": IM}, {"eos_token": "<end>"}))
    messages = [*HELLO, {"role": "assistant", "content": "The answer"}]
    text = prompt(chat, messages=messages, continue_final_message=True)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nThe answer"


FUNCTION = {"name": "f", "arguments": "{}"}
BAD = [
    ({"messages": [{"role": "user"}]}, "messages", "expected messages with role and content"),
    ({"messages": [{"content": "x"}]}, "messages", "expected messages with role and content"),
    ({"messages": [{"role": "user", "content": "x", "audio": 1}]}, "messages", "messages without 'audio', of role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "reads text"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "with type and text"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages", "content that is a string, or a list"),
    *(({"messages": [{"role": "assistant", "tool_calls": calls}]}, "messages", text) for calls, text in (
        ([], "1 to 128 tool_calls"), ([{"type": "function"}], "tool_calls of type function, with name"),
        ([{"type": "x", "function": FUNCTION}], "tool_calls of type function"),
        ([{"type": "function", "function": FUNCTION, "x": 1}], "tool_calls of id, type and function"),
        ([{"type": "function", "function": {**FUNCTION, "arguments": "{"}}], "JSON in the arguments of 'f'"),
        ([{"type": "function", "function": {**FUNCTION, "arguments": "[]"}}], "a JSON object as the arguments of 'f'"),
        ([{"type": "function", "function": {**FUNCTION, "arguments": "[" * 99}}], "more than 32 levels"),
    )),
    ({"tools": []}, "tools", "1 to 128 tools"), ({"tools": [{"type": "web_search"}]}, "tools", "of type function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", "functions with a name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools", "without strict"),
    ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice", "does not force a call"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice", "call"),
    ({"tool_choice": "auto"}, "tool_choice", "got it without tools"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls", "does not limit the number"),
    ({"documents": []}, "documents", "a list of objects"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages as a field of the request"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "expected one of them"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "message"), BAD)
def test_bad_fields_are_refused(fields, param, message):
    with pytest.raises(BadRequest) as refusal:
        check_request({"messages": HELLO, **fields}, chat=True, limits=LIMITS)
    error = refusal.value.body["error"]
    assert error["param"] == param and message in error["message"]


@pytest.mark.parametrize(("fields", "param"), [
    ({"tools": [WEATHER]}, "tools"), ({"documents": [{"text": "x"}]}, "documents"),
    ({"reasoning_effort": "low"}, "reasoning_effort"), ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_the_template_does_not_read_is_refused(fields, param):
    with pytest.raises(BadRequest, match="expected only what the template reads") as refusal:
        prompt(Chat(ChatTemplates({"default": "{{ messages }}"}, {})), **fields)
    error = refusal.value.body["error"]
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")


@pytest.mark.parametrize("sources", [{"rag": "R"}, {"default": "{% if %}"}, {"default": "x", "tool_use": "{{ x"}])
def test_server_does_not_start_with_templates_that_fail(sources):
    with pytest.raises(ValueError, match="chat template"):
        Chat(ChatTemplates(sources, {}))


def test_event_loop_and_other_threads_go_on_while_a_template_is_slow(monkeypatch):
    chat = Chat(ChatTemplates({"default": "{% if messages | length == 1 %}" + SLOW + "{% endif %}done"}, {}))
    monkeypatch.setattr(template_sandbox, "RENDER_S", 1.0)

    async def main():
        slow, quick = (asyncio.ensure_future(chat.render_async({"messages": HELLO * n})) for n in (1, 2))
        ticks, used = 0, []
        while not slow.done():
            used.append(await asyncio.to_thread(threading.get_ident))
            await asyncio.sleep(0.01)
            ticks += 1
        with pytest.raises(BadRequest):
            await slow
        assert await quick == "done"
        return ticks

    assert asyncio.run(main()) > 5


def test_server_answers_400_and_goes_on(monkeypatch):
    """Also for a prompt that the tokenizer refuses."""
    tokenizer = serving.tiny_tokenizer()
    source = "{% if messages[0].content == 'slow' %}" + SLOW + "{% elif messages[0].content == 'zero' %}"
    monkeypatch.setattr(template_sandbox, "RENDER_S", 1.0)
    source += "{{ 1 // 0 }}{% endif %}{{ messages[0].content }}"
    with Running(serving.tiny_model(tokenizer), with_chat(tokenizer, source)) as running:
        answers = {}

        def ask(content):
            request = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
            answers[content] = running.ask("/v1/chat/completions", request)

        slow = threading.Thread(target=ask, args=("slow",))
        slow.start()
        while slow.is_alive():
            assert running.ask("/health")[0] == 200
        slow.join()
        for content in ("zero", "hello"):
            ask(content)
        assert [answers[content][0] for content in ("slow", "zero", "hello")] == [400, 400, 200]
        for content in ("slow", "zero"):
            error = answers[content][1]["error"]
            assert error["type"] == "invalid_request_error" and error["param"] == "messages"


def test_rendered_prompt_has_one_beginning():
    """The template writes BOS, so that the tokenizer adds none; a plain prompt gets it from the tokenizer."""
    library = serving.tiny_tokenizer().library
    library.add_special_tokens(["<s>"])
    bos = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = with_chat(Tokenizer(library), "<s>{{ messages[0].content }}")
    with Running(serving.tiny_model(tokenizer), tokenizer) as running:
        plain = running.ask("/v1/completions", {"prompt": "canary", "max_tokens": 1})
        chatted = running.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "canary"}]})
        expected = len(tokenizer.encode("canary", add_special_tokens=False)) + 1
        assert plain[1]["usage"]["prompt_tokens"] == chatted[1]["usage"]["prompt_tokens"] == expected
