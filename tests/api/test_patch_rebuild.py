"""The class of a patched model builds plain models, pickles load anywhere, and every output option works."""

import copy
import io
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_transformers import FAMILIES, TOKENS, VOCAB, batch, build, close, outputs_of, train_step
from torch import nn

import peakgpt
from peakgpt.dropin.attention_function import attention_forward
from peakgpt.dropin.class_swap import original_class


@pytest.mark.parametrize("name", FAMILIES)
def test_class_of_a_patched_model_builds_and_loads_plain_models(name, tmp_path):
    model = build(name)
    inputs, _ = batch(model)
    expected = outputs_of(model, inputs)
    plain = type(model)
    peakgpt.patch(model, check=False)
    built = type(model)(model.config)
    built.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    for other in (built, type(model).from_pretrained(tmp_path)):
        assert type(other) is plain
        close(outputs_of(other, inputs), expected)
        peakgpt.patch(other, check=False)  # as any other model
    for part in {type(m): m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))}.values():
        assert type(type(part)(*part.weight.shape[::-1])) is original_class(part)


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_and_pickles_of_a_patched_model_keep_its_bits_and_can_be_unpatched(name):
    model = build(name)
    inputs, _ = batch(model)
    before = outputs_of(model, inputs)
    peakgpt.patch(model, check=False)
    expected = outputs_of(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(outputs_of(twin, inputs), expected)
        peakgpt.unpatch(twin)
        assert torch.equal(outputs_of(twin, inputs), before)
    assert torch.equal(outputs_of(model, inputs), expected)


LOAD = """
import sys, torch
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected)
import peakgpt
peakgpt.unpatch(model)
"""


def test_pickle_loads_in_a_process_that_has_imported_nothing(tmp_path):
    model = build("llama").eval()
    peakgpt.patch(model)
    inputs = {"input_ids": torch.arange(6)[None], "use_cache": False}
    with torch.no_grad():
        torch.save((model, inputs, model(**inputs).logits), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "model.pt")], check=True)


def tensors_of(value, name=""):
    """Return all tensors of an output by name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {}
    return {k: t for key, part in value.items() for k, t in tensors_of(part, f"{name}.{key}").items()}


OPTIONS = [
    {"output_attentions": True}, {"output_hidden_states": True}, {"use_cache": False}, {"return_dict": False},
    {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
]  # fmt: skip


@pytest.mark.parametrize("previous", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_options_of_the_output_give_what_the_eager_model_gives(name, previous):
    """With sdpa, transformers returns no attention weights; a patched model does."""
    plain = build(name, attn_implementation="eager")
    patched = build(name)
    if previous == "eager":
        patched = copy.deepcopy(plain)
    peakgpt.patch(patched, check=False)
    inputs, _ = batch(plain)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    inputs["attention_mask"][0, -3:] = 0
    live = inputs["attention_mask"].bool()
    if plain.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    for options in OPTIONS:
        with torch.no_grad():
            try:
                expected = tensors_of(plain.eval()(**inputs, **options))
            except TypeError:  # GPT-1 has no cache
                continue
            got = tensors_of(patched.eval()(**inputs, **options))
        assert got.keys() == expected.keys(), options
        for key, value in expected.items():
            ours = got[key]
            if value.shape[:2] == live.shape:
                ours, value = ours[live], value[live]
            close(ours, value, 1e-4)


def test_weights_are_returned_if_the_config_asks_for_them():
    model = build("gpt2", attn_implementation="eager")
    model.config.output_attentions = True
    peakgpt.patch(model)
    assert len(model(torch.arange(5)[None]).attentions) == 2


PACKED = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0]]),
          "seq_idx": torch.tensor([[0] * 4 + [1] * 7 + [2]], dtype=torch.int32),
          "cu_seq_lens_q": torch.tensor([0, 4, 11, 12], dtype=torch.int32)}  # fmt: skip


@pytest.mark.parametrize("given", [("position_ids",), ("seq_idx",), ("seq_idx", "position_ids"), tuple(PACKED)])
@pytest.mark.parametrize("way", ["patch", "attn_implementation"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "opt", "gpt_neox"])
def test_packed_documents_equal_single_documents(name, way, given):
    """As the collators of TRL and transformers describe them. OPT reads the documents from its keywords only."""
    model = build(name)
    if way == "patch":
        peakgpt.patch(model)
    else:
        peakgpt.register_attention()
        model.set_attn_implementation("peakgpt")
    ids = torch.randint(5, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    options = {key: PACKED[key] for key in given}
    if given == ("position_ids",) and name == "opt":
        pytest.skip("OPT derives its mask without position_ids")
    options.setdefault("position_ids", PACKED["position_ids"])
    with torch.no_grad():
        packed = model.eval()(ids, use_cache=False, **options).logits
        single = [model(ids[:, a:b], use_cache=False).logits for a, b in ((0, 4), (4, 11), (11, 12))]
    close(packed, torch.cat(single, 1))


def test_documents_by_seq_idx_in_a_batch_and_with_weights():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 6, 8) for _ in range(3))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])
    module = nn.Module()
    y, none = attention_forward(module, q, k, v, None, seq_idx=documents)
    same, weights = attention_forward(module, q, k, v, None, seq_idx=documents, output_attentions=True)
    live = (documents[:, :, None] == documents[:, None]) & torch.ones(6, 6, dtype=torch.bool).tril()
    expected = nn.functional.scaled_dot_product_attention(q, k, v, live[:, None]).transpose(1, 2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(same, expected)
    assert none is None and weights.shape == (2, 2, 6, 6) and not weights[~live[:, None].expand(2, 2, 6, 6)].any()


def test_sft_trainer_of_trl_packs(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(3, VOCAB)} | {"<pad>": 0, "<eos>": 2}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", eos_token="<eos>",
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(5, 5 + n).tolist()} for n in (5, 9, 3, 12)]
    losses = []
    for patched in (False, True):
        model = build("gpt2")
        if patched:
            peakgpt.patch(model, check=False)
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=1, logging_steps=1,
            learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True, bf16=False, packing=True,
            max_length=16, gradient_checkpointing=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 2


def test_custom_loss_of_distilbert_is_used():
    model = build("distilbert")
    model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.5)
    inputs, labels = batch(model)
    expected = train_step(model, labels, inputs)
    peakgpt.patch(model)
    close(train_step(model, labels, inputs)[0], expected[0])
