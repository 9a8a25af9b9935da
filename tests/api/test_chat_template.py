"""Chat templates: as transformers renders them, and no template or message stops the server."""

import asyncio
import json
import os
import signal
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Running, tiny_model, tiny_tokenizer
from tiny_tokenizers import BUILDERS

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.serve import chat
from peakgpt.serve.chat import ChatTemplate, read_chat_template
from peakgpt.serve.schema import BadRequest

transformers = pytest.importorskip("transformers")

HELLO = [{"role": "user", "content": "hello"}]
EACH = "{% for m in messages %}"
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
# What published templates use.
TEMPLATES = [
    "{{ bos_token }}" + EACH + "[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    "{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ tool_token }}{{ image_token }}{{ nothing }}",
    EACH + "{{ m.content | tojson }}{{ m | tojson(indent=2) }}{{ m | tojson(sort_keys=true) }}{% endfor %}",
    "{{ strftime_now('%Y') }}{{ strftime_now is defined }}{{ date_string is defined }}",
    EACH
    + "{% if loop.index > 1 %}{% break %}{% endif %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% endfor %}",
    EACH + "{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x is defined }}{% endfor %}",
    "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ add_generation_prompt }}",
    "{% set ns = namespace(n=0) %}" + EACH + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ dict(a=1) }}",
    "{% macro f(m) %}  \n  {{- m.content.split('e')[-1] }}\n{% endmacro %}" + EACH + "\n    {{ f(m) }}\n{% endfor %}",
    "{{ messages[0].content[:3] ~ messages[-1]['role'] | upper }}{{ messages | length }}{{ messages[5] is defined }}",
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}{{ messages | map(attribute='content') | join('|') }}",
    "{% set a, b = messages[0].role, 2 %}{{ a }}{{ b }}{% for k, v in messages[0].items() %}{{ k }}{{ v }}{% endfor %}",
]
TEXTS = st.text(st.one_of(st.sampled_from("<s>é&'\"\n "), st.characters(exclude_categories=["Cs"])), max_size=20)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}),
    min_size=1, max_size=4,
)  # fmt: skip


def write(folder, template, config=CONFIG, files=()):
    BUILDERS["byte_level"]().save(str(folder / "tokenizer.json"))
    entry = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **entry}))
    for name, content in dict(files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


def both(folder):
    return read_chat_template(folder, "</s>"), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    config = {**CONFIG, "unk_token": {"__type": "AddedToken", "content": "<unk>"}, "tool_token": "<tool>",
              "extra_special_tokens": {"image_token": "<image>"}}  # fmt: skip
    return [both(write(tmp_path_factory.mktemp("template"), source, config)) for source in TEMPLATES]


@settings(max_examples=25, deadline=None)
@given(messages=MESSAGES, prompt=st.booleans())
def test_rendered_text_equals_transformers(templates, messages, prompt):
    for ours, theirs in templates:
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(messages, add_generation_prompt=prompt) == expected


FOLDERS = {
    "named": ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], {}),
    "file": (None, {"chat_template.jinja": "F\n"}),
    "file before the config": ("C", {"chat_template.jinja": "F"}),
    "folder": (None, {"chat_template.jinja": "F", "additional_chat_templates/tool_use.jinja": "T"}),
    "only folder": ("C", {"additional_chat_templates/default.jinja": "A"}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_template_is_found_where_transformers_finds_it(name, tmp_path):
    template, files = FOLDERS[name]
    ours, theirs = both(write(tmp_path, template, files=files))
    assert ours.render(HELLO) == theirs.apply_chat_template(HELLO, tokenize=False)


def test_folder_without_default_template_is_refused(tmp_path):
    write(tmp_path, [{"name": "rag", "template": "R"}])
    with pytest.raises(ValueError, match="got templates named rag, expected one named default"):
        read_chat_template(tmp_path, "</s>")
    assert read_chat_template(write(tmp_path, None), "</s>") is None


@pytest.mark.parametrize("entry", [5, [1], [{"name": "a"}], {"default": "D"}])
def test_damaged_entry_is_one_sentence(entry, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: got chat_template .*expected"):
        read_chat_template(write(tmp_path, entry), "</s>")


# ---- templates that fail

ERRORS = {
    "{{ 1 // 0 }}": "division or modulo by zero",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ '\ud800' }}": "surrogate",
    "{{ messages[0].name.first }}": "no attribute 'name'",
    "{{ messages[9].content }}": "no element 9",
    "{{ raise_exception('roles must alternate \ud800') }}": r"roles must alternate \\ud800",
    "{{ nothing() }}": "'nothing' is undefined",
    "{{ messages[0].content + 1 }}": "can only concatenate",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe|not safely callable",
    "{{ 'a' * 5000000 }}": "a prompt of 5000000 characters",
    "{{ 'a' * 10000000000 }}": "MemoryError",
    "{{ [messages] * 1000000000 }}": "MemoryError",
    "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}": "MemoryError",
    "{{ '%10000000000d' % 1 }}": "MemoryError",
    "{{ range(10 ** 9) | list }}": "Range too big",
    "{{ 7 ** (70000 * messages | length) }}": "digits",
    "{% include 'x' %}": "no loader",
    "{{ strftime_now(5) }}": "must be str",
    "{{ messages | tojson(indent=dict) }}": "type",
}  # fmt: skip


@pytest.mark.parametrize("source", ERRORS)
def test_every_error_of_a_template_is_a_bad_request(source):
    template = ChatTemplate(source, {})
    for _ in range(2):  # also from a process that has failed
        with pytest.raises(BadRequest, match=rf"messages: the chat template says .*({ERRORS[source]})") as caught:
            template.render(HELLO)
        json.dumps(caught.value.body, ensure_ascii=False).encode()


SLOW = ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** (8 + messages | length)) }}",
        "{% for i in range(99999) %}{{ (messages[0].content * 99999) | wordwrap(1) }}{% endfor %}"]  # fmt: skip


@pytest.mark.parametrize("source", SLOW)
def test_slow_template_ends_at_the_deadline_and_the_next_request_works(source, monkeypatch):
    template = ChatTemplate("{% if messages | length == 1 %}" + source + "{% endif %}done", {})
    monkeypatch.setattr(chat, "RENDER_S", 0.4)
    with pytest.raises(BadRequest, match=r"nothing for 0\.4 s, the limit|its process ended|MemoryError"):
        template.render(HELLO)
    monkeypatch.setattr(chat, "RENDER_S", 20)
    assert template.render(HELLO * 2) == "done"


@pytest.mark.parametrize("source", ["{{ 9 ** (9 ** 9) }}", "{{ 'a' * 99999999999 }}", "{% if %}", "{{ " + "(" * 5000])
def test_template_that_does_not_compile_is_refused_at_start(source, monkeypatch):
    """Jinja computes constants when it compiles: the first one would take hours. Or the text is too large to hold."""
    monkeypatch.setattr(chat, "RENDER_S", 0.4)
    start = time.monotonic()
    with pytest.raises((ValueError, BadRequest), match="chat template"):
        ChatTemplate(source, {}).render(HELLO)
    assert time.monotonic() - start < 15


def test_killed_process_is_started_again():
    template = ChatTemplate("{{ messages[0].content }}", {})
    os.kill(template._process.process.pid, signal.SIGKILL)
    with pytest.raises(BadRequest, match="its process ended"):
        template.render(HELLO)
    assert template.render(HELLO) == "hello"


def test_event_loop_and_other_threads_go_on_while_a_template_is_slow(monkeypatch):
    template = ChatTemplate("{% if messages | length == 1 %}" + SLOW[0] + "{% endif %}done", {})
    monkeypatch.setattr(chat, "RENDER_S", 1.0)

    async def main():
        slow, quick = (asyncio.ensure_future(template.render_async(HELLO * n)) for n in (1, 2))
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
    """Also for a prompt that the tokenizer refuses, and BOS in the rendered text is not doubled."""
    tokenizer = tiny_tokenizer()
    source = "{% if messages[0].content == 'slow' %}" + SLOW[0] + "{% elif messages[0].content == 'zero' %}"
    template = ChatTemplate(source + "{{ 1 // 0 }}{% endif %}{{ messages[0].content }}", {})
    monkeypatch.setattr(chat, "RENDER_S", 1.0)
    running = Running(tiny_model(tokenizer), tokenizer, chat=template)
    try:
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
    finally:
        running.close()


def test_rendered_prompt_has_one_beginning(tmp_path):
    """The template writes BOS, so that the tokenizer adds none; a plain prompt gets it from the tokenizer."""
    from tokenizers import processors

    library = tiny_tokenizer().library
    library.add_special_tokens(["<s>"])
    bos = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = Tokenizer(library)
    running = Running(tiny_model(tokenizer), tokenizer, chat=ChatTemplate("<s>{{ messages[0].content }}", {}))
    try:
        plain = running.ask("/v1/completions", {"prompt": "canary", "max_tokens": 1})
        chatted = running.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "canary"}]})
        expected = len(tokenizer.encode("canary", add_special_tokens=False)) + 1
        assert plain[1]["usage"]["prompt_tokens"] == chatted[1]["usage"]["prompt_tokens"] == expected
    finally:
        running.close()
