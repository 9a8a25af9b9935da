"""Chat templates: text, ids and masks as transformers' apply_chat_template gives them."""

import copy
import dataclasses
import json
import pickle
import threading

import numpy as np
import pytest
import torch
from conversations import CONVERSATIONS, READ, STYLES, TOKENS, WEATHER, said
from hostile_texts import hostile_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BUILDERS
from tokenizers import processors

from peakgpt.cli import main
from peakgpt.engine.data.chat_template import ChatTemplates
from peakgpt.engine.data.template_sandbox import TemplateFailure
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT

transformers = pytest.importorskip("transformers")

HELLO = said("hello")
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
    "a\n    {% if tools is none %}\n    b\n    {% endif %}\nc{# #}\n\t{%+ if messages %}d{% endif %}\n",
    "{{ dict.fromkeys('ab', 1) }}{{ namespace(self=1, n=2).n }}{{ dict([('x', 1)], y=2) }}{{ cycler is defined }}",
]
TEXTS = st.text(st.one_of(st.sampled_from("<s>é&'\"\n "), st.characters(exclude_categories=["Cs"])), max_size=20)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}),
    min_size=1, max_size=4,
)  # fmt: skip


def write(folder, template, config=CONFIG, files=(), tokens=()):
    library = BUILDERS["byte_level"]()
    library.add_special_tokens(list(tokens))
    ids = [("<s>", library.token_to_id("<s>"))]
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    library.save(str(folder / "tokenizer.json"))
    entry = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **entry}))
    for name, content in dict(files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


def both(folder):
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    config = {**CONFIG, "unk_token": {"__type": "AddedToken", "content": "<unk>"}, "tool_token": "<tool>",
              "extra_special_tokens": {"image_token": "<image>"}}  # fmt: skip
    return [both(write(tmp_path_factory.mktemp("template"), source, config)) for source in TEMPLATES]


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    config = {**CONFIG, "eos_token": "<|end|>", "pad_token": "<|im_end|>"}
    make = lambda source: write(tmp_path_factory.mktemp("style"), source, config, tokens=TOKENS)  # noqa: E731
    return {name: both(make(source)) for name, source in STYLES.items()}


@settings(max_examples=25, deadline=None)
@given(messages=MESSAGES, prompt=st.booleans())
def test_rendered_text_equals_transformers(templates, messages, prompt):
    for ours, theirs in templates:
        options = {"tokenize": False, "add_generation_prompt": prompt}
        assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(messages, **options)


def result(tokenizer, messages, **options):
    """What a tokenizer makes of messages, or "refused"."""
    try:
        got = tokenizer.apply_chat_template(messages, **options)
    except Exception as error:
        assert not isinstance(tokenizer, Tokenizer) or isinstance(error, ValueError), error
        return "refused"
    return got if isinstance(got, str) else dict(got)


@pytest.mark.parametrize("style", STYLES)
def test_conversations_equal_transformers(styles, style):
    """Text, ids and masks of 40 conversations; where a template of theirs fails, ours fails too."""
    ours, theirs = styles[style]
    assert len(CONVERSATIONS) == 40
    texts = set()
    for messages, options in CONVERSATIONS:
        options = {name: value for name, value in options.items() if name in READ[style]}
        for end in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
            given = copy.deepcopy(messages)
            text = result(ours, given, tokenize=False, **options, **end)
            assert text == result(theirs, messages, tokenize=False, **options, **end), (messages, end)
            assert given == messages, "the caller's messages are changed"
            texts.add(text)
        masked = {"return_assistant_tokens_mask": "generation" in STYLES[style] and "content" in messages[-1]}
        assert result(ours, messages, **options, **masked) == result(theirs, messages, **options, **masked)
    assert "refused" in texts or style == "im"
    assert len(texts) > 40


@pytest.mark.parametrize("style", ["headers", "roles"])
def test_a_thousand_hostile_texts_equal_transformers(styles, style):
    """As messages of users, between the special tokens of a template, which some of the texts contain."""
    ours, theirs = styles[style]
    chats = [said(f"{text}{TOKENS[i % len(TOKENS)]}" if i % 3 == 0 else text) for i, text in enumerate(hostile_texts())]
    assert len(chats) == 1000
    for options in ({"tokenize": False}, {"add_generation_prompt": True, "return_dict": False}):
        got, expected = (t.apply_chat_template(chats, **options) for t in (ours, theirs))
        assert [pair for pair in zip(got, expected, strict=True) if pair[0] != pair[1]][:3] == []


def test_ids_have_the_beginning_of_the_template_only(tmp_path):
    """The tokenizer puts <s> before a text, and the template writes it: a chat has it once."""
    ours, theirs = both(write(tmp_path, "{{ bos_token }}{{ messages[0].content }}"))
    ids = ours.apply_chat_template(HELLO, return_dict=False)
    assert ids == theirs.apply_chat_template(HELLO, return_dict=False) == ours.encode("hello")
    assert ids.count(ours.begin_id) == 1


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
    options = [{}, {"chat_template": "X{{ messages | length }}"}]
    options += [{"chat_template": "tool_use"}] if "tool_use" in ours.chat.sources else []
    for option in options:
        expected = theirs.apply_chat_template(HELLO, tokenize=False, **option)
        assert ours.apply_chat_template(HELLO, tokenize=False, **option) == expected


def test_tools_choose_the_template_for_tools(tmp_path):
    named = [{"name": name, "template": name + "{{ tools is none }}"} for name in ("default", "tool_use")]
    ours, theirs = both(write(tmp_path, named))
    for tools in (None, [], [WEATHER]):
        expected = theirs.apply_chat_template(HELLO, tools=tools, tokenize=False)
        assert ours.apply_chat_template(HELLO, tools=tools, tokenize=False) == expected


def test_saved_tokenizer_has_its_templates(tmp_path):
    files = {"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "R", "chat_template.json": "{}"}
    source = Tokenizer.load(write(tmp_path, None, files=files))
    (tmp_path / "again").mkdir()
    source.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").chat.sources == source.chat.sources == {"default": "F", "rag": "R"}
    assert all((tmp_path / "again" / name).exists() for name in files)


def test_models_are_saved_with_templates_again_and_quantized(tmp_path, capsys):
    """Regression: the folder of the named templates could not be replaced, and quantize left it out."""
    files = {"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "R"}
    tokenizer = Tokenizer.load(write(tmp_path, None, files=files))
    model, saved = GPT.from_preset("gpt2", n_layer=1, n_head=2, n_embd=8, vocab_size=400, block_size=8), tmp_path / "m"
    model.save_pretrained(saved, tokenizer)
    (saved / "additional_chat_templates/rag.jinja").write_text("old")
    model.save_pretrained(saved, tokenizer)
    assert main(["quantize", str(saved), str(tmp_path / "small"), "--bits", "8"]) == 0
    capsys.readouterr()
    for folder in (saved, tmp_path / "small"):
        assert Tokenizer.load(folder).chat.sources == {"default": "F", "rag": "R"}


def test_the_template_of_a_processor_is_read_last(tmp_path):
    old = {"chat_template.json": json.dumps({"chat_template": "P"})}
    assert Tokenizer.load(write(tmp_path, None, files=old)).chat.sources == {"default": "P"}
    assert Tokenizer.load(write(tmp_path, "C", files=old)).chat.sources == {"default": "C"}


def test_folder_without_default_template_is_refused(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, [{"name": "rag", "template": "R"}]))
    with pytest.raises(ValueError, match="got templates named rag, expected one named default"):
        tokenizer.apply_chat_template(HELLO)
    assert tokenizer.apply_chat_template(HELLO, chat_template="rag", tokenize=False) == "R"
    with pytest.raises(ValueError, match="got a tokenizer without one, expected one named default"):
        Tokenizer.load(write(tmp_path, None)).apply_chat_template(HELLO)


@pytest.mark.parametrize("entry", [5, [1], [{"name": "a"}], {"default": "D"}])
def test_damaged_entry_is_one_sentence(entry, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: got chat_template .*expected"):
        Tokenizer.load(write(tmp_path, entry))


def test_a_trained_tokenizer_renders_a_given_template():
    tokenizer = train_tokenizer(["the canary sings a song"], 270)
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    text = tokenizer.apply_chat_template(HELLO, chat_template=source, tokenize=False)
    assert text == "<|endoftext|>hello<|endoftext|>"


# ---- results


@pytest.fixture(scope="module")
def tokenizer(styles):
    return styles["roles"][0]


def test_results_have_the_forms_of_transformers(styles):
    ours, theirs = styles["roles"]
    batch = [said("one two"), said("one two", "one two")]
    for conversation in (HELLO, batch, [HELLO]):
        for options in ({}, {"return_dict": False}, {"tokenize": False}, {"tokenize": False, "return_dict": False}):
            expected = theirs.apply_chat_template(conversation, **options)
            expected = expected if isinstance(expected, (str, list)) else dict(expected)
            assert ours.apply_chat_template(conversation, **options) == expected
    for kind, type_ in (("pt", torch.Tensor), ("np", np.ndarray)):
        got, expected = (t.apply_chat_template([HELLO] * 2, return_tensors=kind) for t in (ours, theirs))
        assert got.keys() == expected.keys() and all(isinstance(value, type_) for value in got.values())
        assert all((got[name] == expected[name]).all() and got[name].shape[0] == 2 for name in got)
    assert ours.apply_chat_template(HELLO, return_tensors="pt")["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match=r"got chats of \d+ to \d+ tokens, expected the same number for return_"):
        ours.apply_chat_template(batch, return_tensors="pt")


def test_mask_marks_the_text_of_the_assistant(tokenizer):
    inputs = tokenizer.apply_chat_template(said("a", "the canary", "b", ""), return_assistant_tokens_mask=True)
    marked = [token for token, mark in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "the canary<|end|><|end|>"


@dataclasses.dataclass
class Message:
    role: str
    content: str


class Model:
    """As pydantic's."""

    def model_dump(self):
        return {"role": "user", "content": "hello"}


def test_messages_may_be_objects(tokenizer):
    expected = tokenizer.apply_chat_template(HELLO, tokenize=False)
    for message in (Message("user", "hello"), Model(), {"role": np.str_("user"), "content": "hello"}):
        assert tokenizer.apply_chat_template([message], tokenize=False) == expected


# ---- bad input

BAD = {
    "no messages": ([], {}, "got no messages, expected at least one"),
    "a text": ("hello", {}, "got messages 'hello', expected a list of objects"),
    "texts": (["hello"], {}, "got 'hello' in messages, expected an object"),
    "bytes": ([{"role": "user", "content": b"x"}], {}, "got bytes in messages, expected text, numbers"),
    "a key": ([{1: "user"}], {}, "got the key 1 in messages"),
    "a function": (HELLO, {"tools": [both]}, "got the function both as a tool"),
    "tools": (HELLO, {"tools": "x"}, "got tools 'x', expected a list of objects"),
    "documents": (HELLO, {"documents": ["x"]}, "got 'x' in documents, expected an object"),
    "unread": (HELLO, {"enable_thinking": False}, "got enable_thinking, expected only what the template reads"),
    "reserved": (HELLO, {"messages": []}, "got messages as a variable of the template"),
    "both": (HELLO, {"continue_final_message": True, "add_generation_prompt": True}, "expected one of them"),
    "no text": ([{"role": "user"}], {"continue_final_message": True}, "got a final message without text in content"),
    "no part": ([{"role": "user", "content": [{"type": "image"}]}], {"continue_final_message": True},
                "got a final message without text, expected"),
    "field": ([{"role": "user", "reasoning": "x"}], {"continue_final_message": "reasoning"}, "a field that it reads"),
    "dropped": ([{"role": "user", "content": "x" * 9}], {"continue_final_message": True,
                                                         "chat_template": "{{ messages[0].content[:5] }}"},
                "got a text without the final message"),
    "mask": (HELLO, {"return_assistant_tokens_mask": True, "return_dict": False}, "expected both"),
    "tensors": (HELLO, {"return_tensors": "tf"}, "got return_tensors 'tf', expected None, 'pt' or 'np'"),
    **{name: (HELLO, {name: True}, f"got {name}, which peakgpt does not support")
       for name in ("padding", "truncation", "max_length", "sanitize_control_tokens", "tokenizer_kwargs")},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(tokenizer, name):
    messages, options, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.apply_chat_template(messages, **options)
    assert "\n" not in str(caught.value)


def test_a_list_in_itself_is_refused(tokenizer):
    messages = said("x")
    messages[0]["content"] = messages
    with pytest.raises(ValueError, match="got values in values without end in messages"):
        tokenizer.apply_chat_template(messages)


def test_a_template_that_fails_is_named(tokenizer):
    with pytest.raises(TemplateFailure, match="the chat template says no"):
        tokenizer.apply_chat_template(HELLO, chat_template="{{ raise_exception('no') }}")


# ---- copies and threads


def test_copies_have_processes_of_their_own():
    templates = ChatTemplates({"default": "{{ messages[0].content }}"}, {})
    copies = [templates, copy.deepcopy(templates), pickle.loads(pickle.dumps(templates))]
    assert [one.render(HELLO).text for one in copies] == ["hello"] * 3
    processes = {one._sandbox._process.process.pid for one in copies}
    assert len(processes) == 3


def test_threads_share_a_tokenizer(tokenizer):
    results, start = {}, tokenizer.apply_chat_template(said("0"), tokenize=False)

    def render(number):
        results[number] = tokenizer.apply_chat_template(said(f"{number}"), tokenize=False)

    threads = [threading.Thread(target=render, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: start.replace("0", f"{number}") for number in range(8)}
