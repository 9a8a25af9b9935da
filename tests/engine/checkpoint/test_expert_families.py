"""Families with experts: the balance loss, both layouts of their weights, and configs that are refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peakgpt
from peakgpt.engine.checkpoint.families.catalogue import FAMILIES
from peakgpt.engine.model.experts import balance_loss

T = 12
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 41, "max_position_embeddings": T, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
FAMILY = {
    "mixtral": ("Mixtral", {**SIZES, "intermediate_size": 40, "num_local_experts": 5}),
    "qwen3_moe": ("Qwen3Moe", {**SIZES, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 5,
                               "num_experts_per_tok": 2, "mlp_only_layers": [1]}),
    "gpt_oss": ("GptOss", {**SIZES, "intermediate_size": 40, "head_dim": 8, "num_local_experts": 5,
                           "num_experts_per_tok": 2}),
}


def build(name, **changes):
    kind, sizes = FAMILY[name]
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("is_padded", (False, True))
@pytest.mark.parametrize("name", FAMILY)
def test_loss_with_balance_and_its_gradients_equal_transformers(name, is_padded, tmp_path):
    hf_model = build(name, output_router_logits=True, router_aux_loss_coef=0.5).train()
    hf_model.save_pretrained(tmp_path)
    ours = peakgpt.GPT.from_pretrained(tmp_path).train()
    ids, mask = torch.randint(41, (2, T)), torch.ones(2, T, dtype=torch.long)
    if is_padded:
        mask[1, :4] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[1, 4] = -100  # the position before it is padding
    expected = hf_model(ids, attention_mask=mask if is_padded else None, labels=labels)
    expected.loss.backward()
    # transformers' last token has no target, but counts in its balance loss.
    usage = []
    ours.hidden_states(ids, start=torch.tensor([0, 4]) if is_padded else None, balance=usage)
    loss = ours.eval()(ids[:, :-1], labels[:, 1:], attention_mask=mask[:, :-1] if is_padded else None)
    loss = loss + 0.5 * balance_loss(usage, ours.config.balance_over)
    loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert expected.aux_loss > 0.1 and ours.config.balance_loss == 0.5
    family = FAMILIES[name]
    theirs, _ = family.separate_experts({n: p.grad for n, p in hf_model.named_parameters()}, {})
    grads = family.to_layout(ours.config, {n: p.grad for n, p in ours.named_parameters()})
    assert grads.keys() == theirs.keys()
    for tensor, grad in grads.items():
        torch.testing.assert_close(grad, theirs[tensor], rtol=1e-5, atol=1e-5, msg=lambda m, n=tensor: f"{n}: {m}")


@pytest.mark.parametrize("name", FAMILY)
def test_the_balance_loss_of_training_mode_is_that_of_transformers(name, tmp_path):
    """Without targets left out: every position of both has one."""
    hf_model = build(name, output_router_logits=True, router_aux_loss_coef=0.5).train()
    hf_model.save_pretrained(tmp_path)
    ours, ids = peakgpt.GPT.from_pretrained(tmp_path), torch.randint(41, (2, T))
    aux = hf_model(ids).aux_loss
    targets = torch.randint(41, (2, T))
    torch.testing.assert_close(ours.train()(ids, targets) - ours.eval()(ids, targets), 0.5 * aux, rtol=1e-4, atol=1e-5)
    off = build(name, output_router_logits=False, router_aux_loss_coef=0.5)
    off.save_pretrained(tmp_path / "off")
    assert peakgpt.GPT.from_pretrained(tmp_path / "off").config.balance_loss == 0


@pytest.mark.parametrize("name", ("mixtral", "qwen3_moe"))
def test_both_layouts_of_the_weights_are_read(name, tmp_path):
    """One tensor for each expert, as transformers writes by default, and all experts stacked, in shards or not."""
    hf_model = build(name)
    hf_model.save_pretrained(tmp_path / "separate")
    hf_model.save_pretrained(tmp_path / "stacked", save_original_format=False, max_shard_size="20KB")
    separate = load_file(tmp_path / "separate" / "model.safetensors")
    shards = sorted((tmp_path / "stacked").glob("*.safetensors"))
    stacked = {n for shard in shards for n in load_file(shard)}
    assert len(shards) > 1 and not stacked >= separate.keys() and any(n.endswith("gate_up_proj") for n in stacked)
    one, two = (peakgpt.GPT.from_pretrained(tmp_path / kind).state_dict() for kind in ("separate", "stacked"))
    assert all(torch.equal(tensor, two[n]) for n, tensor in one.items())
    first = next(shard for shard in shards if any(n.endswith("down_proj") for n in load_file(shard)))
    tensors = load_file(first)
    damaged = next(n for n in tensors if n.endswith("down_proj"))
    save_file({**tensors, damaged: tensors[damaged][:-1].clone()}, first, {"format": "pt"})
    with pytest.raises(ValueError, match=r"got no tensor .*experts\.4\."):
        peakgpt.GPT.from_pretrained(tmp_path / "stacked")


BAD = [
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1, expected 0.0"),
    ("mixtral", {"num_local_experts": 9}, "got 5 experts, expected 9 as num_local_experts"),
    ("qwen3_moe", {"mlp_only_layers": [3]}, r"mlp_only_layers is \(3,\), expected layers below n_layer 3"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "experts_every is 0, expected at least 1"),
    ("mixtral", {"num_experts_per_tok": 6}, "experts_per_token is 6, expected at most experts 5"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_bad_configs_are_named_in_the_error(name, changes, message, tmp_path):
    build(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        peakgpt.GPT.from_pretrained(tmp_path)
