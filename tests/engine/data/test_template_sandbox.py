"""Templates that fail, never end, or take all memory: each is one clear error, and the next rendering works."""

import os
import threading
import time

import pytest

from peakgpt.engine.data import template_sandbox
from peakgpt.engine.data.chat_template import ChatTemplates
from peakgpt.engine.data.template_sandbox import TemplateFailure, TemplateSandbox

HELLO = [{"role": "user", "content": "hello"}]

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
    "{{ dict.__call__ }}{{ dict.__class__.__base__ }}": "unsafe",
    "{{ namespace(_x=1) }}": "got the attribute '_x' of a namespace",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}": "got the attribute '__class__' of a namespace",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "unsafe",
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
def test_every_error_of_a_template_is_a_failure(source, templates):
    for _ in range(2):  # also from a process that has failed
        with pytest.raises(TemplateFailure, match=rf"the chat template says .*({ERRORS[source]})") as caught:
            templates.render(HELLO, chat_template=source)
        str(caught.value).encode()


@pytest.fixture(scope="module")
def templates():
    return ChatTemplates({}, {})


SLOW = ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** (8 + messages | length)) }}",
        "{% for i in range(99999) %}{{ (messages[0].content * 99999) | wordwrap(1) }}{% endfor %}"]  # fmt: skip


@pytest.mark.parametrize("source", SLOW)
def test_slow_template_ends_at_the_deadline_and_the_next_one_works(source, monkeypatch):
    templates = ChatTemplates({"default": "{% if messages | length == 1 %}" + source + "{% endif %}done"}, {})
    monkeypatch.setattr(template_sandbox, "RENDER_S", 0.4)
    with pytest.raises(TemplateFailure, match=r"nothing for 0\.4 s, the limit|its process ended|MemoryError"):
        templates.render(HELLO)
    monkeypatch.setattr(template_sandbox, "RENDER_S", 20)
    assert templates.render(HELLO * 2).text == "done"


@pytest.mark.parametrize("source", ["{{ 9 ** (9 ** 9) }}", "{{ 'a' * 99999999999 }}", "{% if %}", "{{ " + "(" * 5000])
def test_template_that_does_not_compile_is_refused(source, monkeypatch):
    """Jinja computes constants when it compiles: the first one would take hours. Or the text is too large to hold."""
    monkeypatch.setattr(template_sandbox, "RENDER_S", 0.4)
    start, templates = time.monotonic(), ChatTemplates({"default": source}, {})
    with pytest.raises(ValueError, match="chat template"):
        templates.compile()
        templates.render(HELLO)
    assert time.monotonic() - start < 15


def test_killed_process_is_started_again():
    slow = "{% if messages | length == 2 %}" + SLOW[0] + "{% endif %}{{ messages[0].content }}"
    templates = ChatTemplates({"default": slow}, {})
    assert templates.render(HELLO).text == "hello"
    process = templates._sandbox._process.process
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # until it has ended
    assert templates.render(HELLO).text == "hello"  # killed between two renderings: nobody notices
    killer = threading.Timer(0.2, lambda: templates._sandbox._process.process.kill())
    killer.start()
    with pytest.raises(TemplateFailure, match="its process ended"):
        templates.render(HELLO * 2)
    assert templates.render(HELLO).text == "hello"


def test_interrupted_rendering_leaves_no_answer_for_the_next(monkeypatch):
    """Ctrl-C while a template runs: its late answer must not be taken for that to the next rendering."""
    sandbox = TemplateSandbox()
    assert sandbox.render("first", {}).text == "first"
    with monkeypatch.context() as patch:
        patch.setattr(sandbox._process, "program", Interrupting(sandbox._process.program))
        with pytest.raises(KeyboardInterrupt):
            sandbox.render("second", {})
    assert sandbox.render("third", {}).text == "third"


class Interrupting:
    """The functions of a connection, with a Ctrl-C after a request is sent."""

    def __init__(self, program):
        self.send = program.send

    def receive(self, connection):
        raise KeyboardInterrupt


def test_forked_process_starts_its_own():
    sandbox = TemplateSandbox()
    assert sandbox.render("parent", {}).text == "parent"
    child = os.fork()
    if child == 0:
        os._exit(0 if sandbox.render("child", {}).text == "child" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sandbox.render("parent again", {}).text == "parent again"


def test_process_ends_with_its_sandbox():
    sandbox = TemplateSandbox()
    sandbox.compile("x")
    process = sandbox._process.process
    del sandbox
    assert process.wait(timeout=20) != 0  # killed
