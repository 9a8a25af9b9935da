"""What a tokenizer puts before a text begins every prompt, scored text and document; an end of text is not needed."""

import sys

import pytest
import torch
from tiny_tokenizers import BUILDERS
from tokenizers import processors

from peakgpt.commands import generate
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.evaluation.score import Scorer, text_perplexity
from peakgpt.engine.evaluation.zero_shot import ZeroShot
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine
from peakgpt.engine.model.config import GPTConfig

TEXT = "the canary"


@pytest.fixture(params=["<s>", "</s>"])
def tokenizer(request):
    """As Llama's, or as OPT's, which begins with its end of text."""
    library = BUILDERS["byte_level"]()
    start = [(request.param, library.token_to_id(request.param))]
    library.post_processor = processors.TemplateProcessing(single=f"{request.param} $A", special_tokens=start)
    return Tokenizer(library, "</s>", begin_of_text=request.param)


def tiny(tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=tokenizer.vocab_size)
    return GPT(config).eval()


def begins(tokenizer, ids, text=TEXT):
    """Whether ids are a text after one start."""
    return ids == [tokenizer.begin_id, *tokenizer.encode(text, add_special_tokens=False)]


def test_generated_text_continues_the_start(tokenizer, monkeypatch):
    prompts, stream = [], Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda self, ids, params: prompts.append(ids) or stream(self, ids, params))
    assert generate.stream_text(tiny(tokenizer), tokenizer, TEXT, max_tokens=2).startswith(TEXT)
    assert begins(tokenizer, prompts[0])
    generate.stream_text(tiny(tokenizer), tokenizer, "", max_tokens=2)  # the start alone is a prompt
    assert prompts[1] == [tokenizer.begin_id]


def test_served_prompt_has_the_start_and_a_chat_has_not(tokenizer):
    pytest.importorskip("fastapi")
    from peakgpt.serve.limits import Limits
    from peakgpt.serve.preparation import RequestPreparation

    engine = Engine(tiny(tokenizer), tokenizer)
    requests = RequestPreparation(engine.preparation, tokenizer, "name", None, Limits())
    assert begins(tokenizer, requests._encode(TEXT, "prompt"))
    assert requests.tokenize(b'{"prompt": "the canary"}')["tokens"] == tokenizer.encode(TEXT)
    assert requests._encode(TEXT, "messages") == tokenizer.encode(TEXT, add_special_tokens=False)


def test_scored_text_has_the_start_once(tokenizer):
    scorer, seen = Scorer(tiny(tokenizer)), []
    scorer.score = lambda pairs: seen.extend(pairs)
    ZeroShot(scorer, tokenizer).continuations([(TEXT, " sings"), ("", TEXT)])
    assert begins(tokenizer, [*seen[0][0], *seen[0][1]], "the canary sings")
    assert seen[1][0] == [tokenizer.begin_id] and begins(tokenizer, [*seen[1][0], *seen[1][1]])
    scorer.perplexity = lambda ids, **windows: seen.append(ids)
    text_perplexity(scorer, tokenizer, TEXT)
    assert begins(tokenizer, seen[2])


def test_model_without_an_end_of_text_generates_and_names_what_is_missing():
    tokenizer = Tokenizer(BUILDERS["gpt1"](), None)
    model = tiny(tokenizer)
    assert len(generate.stream_text(model, tokenizer, TEXT, max_tokens=3)) > len(TEXT)
    [score] = ZeroShot(Scorer(model), tokenizer).continuations([(TEXT, " sings")])
    assert score.total < 0
    with pytest.raises(ValueError, match="got none with a token that begins or ends a text"):
        text_perplexity(Scorer(model), tokenizer, TEXT)


def test_harness_begins_with_the_start(tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    from peakgpt.harness import PeakGPT

    tiny(tokenizer).save_pretrained(tmp_path, tokenizer)
    harness = PeakGPT(str(tmp_path), device="cpu")
    assert begins(tokenizer, harness.tok_encode(TEXT)) and harness.prefix_token_id == tokenizer.begin_id
    start = tokenizer.decode([tokenizer.begin_id])
    assert begins(tokenizer, harness.tok_encode(start + TEXT))  # not twice
    assert "lm_eval" in sys.modules
