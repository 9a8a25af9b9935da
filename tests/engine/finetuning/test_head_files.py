"""transformers' classes with a head load our checkpoints, and compute the same logits; so do we."""

import json
import warnings

import pytest
import tiny_tokenizers
import torch
import transformers
from small_configs import SMALL

from peakgpt.engine.checkpoint.families.catalogue import FAMILIES, OWN
from peakgpt.engine.checkpoint.families.heads import SEQUENCE, TOKEN, head_class
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.finetuning.head_files import TASK_FILE, HeadFiles
from peakgpt.engine.finetuning.label_set import LabelSet
from peakgpt.engine.finetuning.labelled_model import SequenceModel, TokenModel
from peakgpt.engine.finetuning.special_tokens import add_task_tokens
from peakgpt.engine.finetuning.transfer import transferred
from peakgpt.engine.gpt import GPT

AUTO = {
    SEQUENCE: (transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
               transformers.AutoModelForSequenceClassification),
    TOKEN: (transformers.models.auto.modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
            transformers.AutoModelForTokenClassification),
}  # fmt: skip
LABELS = LabelSet(("bad", "good", "neither"))
TEXTS = ["the canary sings", "hello world", "a song and more more more"]


@pytest.mark.parametrize("kind", AUTO)
def test_classes_are_those_of_transformers(kind):
    theirs = {name: AUTO[kind][0].get(name) for name in FAMILIES if name != OWN}
    assert {name: head_class(FAMILIES[name], kind) for name in theirs} == theirs
    assert head_class(FAMILIES[OWN], kind) is None


def save(family, kind, folder):
    """Write a model of transformers, and with a head by us; return the head's model and the tokens."""
    torch.manual_seed(0)
    tokens = add_task_tokens(Tokenizer(tiny_tokenizers.byte_level(), "</s>"), has_extract=kind == SEQUENCE)
    fields = {**SMALL[family], "vocab_size": tokens.first_new}
    config = transformers.AutoConfig.for_model(family, **fields)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_config(config)
        theirs.save_pretrained(folder / "base")
    gpt = transferred(GPT.from_pretrained(folder / "base"), tokens.tokenizer.vocab_size, tokens.first_new)
    model = (SequenceModel if kind == SEQUENCE else TokenModel)(gpt, LABELS.outputs).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_()
    fields = {**LABELS.config_fields(), "pad_token_id": tokens.pad, "classifier_dropout": 0.1}
    files = HeadFiles(model, tokens.tokenizer, kind=kind, fields=fields, task={"task": "classification"})
    tensors = dict(files.layout(iter(model.state_dict().items())))
    (folder / "ours").mkdir()
    files.writer()(folder / "ours", tensors)
    return model, files, tokens


CASES = [(family, kind) for kind in AUTO for family in SMALL if head_class(FAMILIES[family], kind)]
CHOSEN = [case for case in CASES if case[0] in ("gpt2", "openai-gpt", "gpt_neox", "llama", "opt", "bloom", "falcon")]


@pytest.mark.parametrize(("family", "kind"), CHOSEN)
def test_transformers_computes_the_same_logits(family, kind, tmp_path):
    """A batch of texts of several lengths, padded at the end by transformers' tokenizer."""
    model, _, tokens = save(family, kind, tmp_path)
    folder = tmp_path / "ours"
    theirs = AUTO[kind][1].from_pretrained(folder).eval()
    assert type(theirs).__name__ == head_class(FAMILIES[family], kind)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(theirs).__name__]
    assert theirs.config.id2label == {0: "bad", 1: "good", 2: "neither"} and theirs.config.num_labels == 3
    batch = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True)
    ids = batch["input_ids"]
    assert [row[row != tokens.pad].tolist() for row in ids] == [tokens.sequence(i) for i in tokens.encode(TEXTS)]
    lengths = batch["attention_mask"].sum(-1, keepdim=True)
    with torch.no_grad():
        got, expected = model.predict(ids[:, None], lengths), theirs(ids).logits
    live = batch["attention_mask"].bool() if kind == TOKEN else slice(None)
    torch.testing.assert_close(got[live], expected[live], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", AUTO)
def test_a_checkpoint_reads_back_bit_for_bit(kind, tmp_path):
    model, files, _ = save("gpt_neox", kind, tmp_path)
    state = files.read(tmp_path / "ours")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "ours" / TASK_FILE).read_text()) == {"task": "classification"}


def test_a_folder_without_the_head_is_refused(tmp_path):
    _, files, _ = save("gpt2", SEQUENCE, tmp_path)
    save("gpt2", TOKEN, tmp_path / "token")
    with pytest.raises(ValueError, match=r"score\.weight: got no such tensor, expected shape \(3, 32\)"):
        files.read(tmp_path / "token" / "ours")
    assert files.read(tmp_path / "base") is None  # another vocabulary: another model


def test_a_family_without_a_class_gives_a_warning(tmp_path):
    _, files, _ = save("gptj", TOKEN, tmp_path)
    with pytest.warns(UserWarning, match="transformers has no class for the head of a gptj model"):
        files.check(tmp_path)
    _, files, _ = save("gptj", SEQUENCE, tmp_path / "sequence")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.check(tmp_path)
