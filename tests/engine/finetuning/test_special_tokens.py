"""The added tokens: GPT-1's published order, the sequences, and the same sequences from transformers."""

import pytest
import tiny_tokenizers
import torch
from tokenizers import processors

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.finetuning.special_tokens import SPECIAL_TOKENS, add_task_tokens
from peakgpt.engine.finetuning.transfer import NOTHING, transferred
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

TEXT, OTHER = "the canary sings", "hello world _classify_"


def make_tokenizer(kind, end="</s>", before=None):
    library = tiny_tokenizers.BUILDERS[kind]()
    if before is not None:
        library.post_processor = processors.TemplateProcessing(
            single=[before, "$A"], special_tokens=[(before, library.token_to_id(before))]
        )
    return Tokenizer(library, end, begin_of_text=before)


def test_gpt1_has_its_published_order_of_tokens():
    """encoder['_start_'] = len(encoder), then _delimiter_ and _classify_; no end of text."""
    source = make_tokenizer("gpt1", end=None)
    tokens = add_task_tokens(source)
    count = source.vocab_size
    assert SPECIAL_TOKENS == ("_start_", "_delimiter_", "_classify_")
    assert (tokens.start, tokens.delimiter, tokens.extract) == (count, count + 1, count + 2)
    assert tokens.first_new == count and tokens.tokenizer.vocab_size == count + 3
    assert source.vocab_size == count, "the source has changed"
    first, second = tokens.encode([TEXT, OTHER])
    assert tokens.sequence(first) == [count, *first, count + 2]
    assert tokens.sequence(first, second) == [count, *first, count + 1, *second, count + 2]


@pytest.mark.parametrize("kind", tiny_tokenizers.BUILDERS)
def test_a_text_cannot_contain_the_added_tokens(kind):
    tokens = add_task_tokens(make_tokenizer(kind))
    (ids,) = tokens.encode([OTHER])
    assert not {tokens.start, tokens.delimiter, tokens.extract} & set(ids)


@pytest.mark.parametrize(("kind", "before"), [("byte_level", None), ("llama", "<s>"), ("gpt1", None)])
def test_transformers_makes_the_same_sequences(kind, before, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens = add_task_tokens(make_tokenizer(kind, before=before))
    tokens.tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    first, second = tokens.encode([TEXT, "hello world"])
    assert len(tokens.before) == (before is not None)
    assert theirs(TEXT)["input_ids"] == tokens.sequence(first)
    assert theirs(TEXT, "hello world")["input_ids"] == tokens.sequence(first, second)
    assert theirs.pad_token_id == tokens.pad
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == first


@pytest.mark.parametrize("before", [None, "<s>"])
def test_a_tokenizer_that_has_the_tokens_keeps_them(before, tmp_path):
    """A checkpoint of one task begins another one, or its run goes on."""
    tokens = add_task_tokens(make_tokenizer("byte_level", before=before))
    tokens.tokenizer.save(tmp_path)
    again = add_task_tokens(Tokenizer.load(tmp_path))
    ids = [(t.start, t.delimiter, t.extract, t.pad, t.before) for t in (tokens, again)]
    assert ids[0] == ids[1] and again.tokenizer.vocab_size == again.first_new == tokens.tokenizer.vocab_size


def test_tokens_of_a_task_without_extract():
    tokens = add_task_tokens(make_tokenizer("byte_level"), has_extract=False)
    (ids,) = tokens.encode([TEXT])
    assert tokens.sequence(ids) == tokens.tokenizer.encode(TEXT) == [tokens.start, *ids]


def test_padding_is_the_end_of_text_or_the_start():
    assert (tokens := add_task_tokens(make_tokenizer("byte_level"))).pad == tokens.tokenizer.end_id
    assert (tokens := add_task_tokens(make_tokenizer("gpt1", end=None))).pad == tokens.start


def test_a_vocabulary_with_gaps_is_refused():
    source = make_tokenizer("word_level")
    source._highest = (source.library.get_vocab_size(), 10_000)
    with pytest.raises(ValueError, match="expected 10001 or more: the vocabulary has gaps"):
        add_task_tokens(source)


SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 50}
MODELS = {"gpt1": {"residual": "post_norm"}, "gpt2": {}, "llama": {"tied_head": False, "position": "rotary"},
          "opt": {"word_dim": 8, "head_bias": True, "tied_head": False, "embedding_norm": True}}  # fmt: skip


@pytest.mark.parametrize("layers", [None, 3, 2, 0, NOTHING])
@pytest.mark.parametrize("name", MODELS)
def test_transfer_copies_the_first_layers_and_known_tokens(name, layers):
    torch.manual_seed(0)
    source = GPT(GPTConfig(**SIZES, **MODELS[name])).train()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    model = transferred(source, 53, 48, layers)
    assert model.config.vocab_size == 53 and model.training
    wanted = 3 if layers is None else layers
    for key, tensor in model.state_dict().items():
        old, block = source.state_dict()[key], key.split(".")[2] if ".h." in key else None
        is_embedding = key.split(".")[1] in ("wte", "wpe", "ln_emb", "project_in")
        is_copied = wanted > int(block) if block else wanted >= 0 if is_embedding else wanted == 3
        rows = 48 if ".wte." in key or "lm_head" in key else len(tensor)
        assert torch.equal(tensor[:rows], old[:rows]) == is_copied, key
        if rows < len(tensor) and "bias" not in key:
            new = tensor[rows:]
            assert 0.005 < new.std() < 0.05 and not torch.equal(new[:2], old[rows:]), "not from N(0, 0.02^2)"


def test_more_layers_than_the_model_has_are_refused():
    with pytest.raises(ValueError, match="transfer_layers is 4, expected at most the 3 layers"):
        transferred(GPT(GPTConfig(**SIZES)), 50, 50, 4)
