"""LoRA adapters of every family equal PEFT's: logits, loss, gradients, files both ways, merged weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from family_variants import batch, reference

from peakgpt import GPT, LoraConfig
from peakgpt.engine.checkpoint.adapters.attach import SavedAdapter

peft = pytest.importorskip("peft")
# One variant of each way in which a layer of ours differs from the modules of transformers.
LAYOUTS = ["gpt2", "gpt_neox", "llama", "qwen2", "phi3", "codegen", "opt post-norm", "mixtral"]
SLOW = ["openai-gpt", "gpt_neo", "bloom", "falcon 40b", "mpt", "qwen3", "gemma2", "olmo2", "starcoder2", "gpt_bigcode"]
CONFIGS = {
    "all": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "default": {"use_rslora": True, "r": 2},
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},  # PEFT has adapters of experts for "all"
}
CASES = [*((name, "attention" if name == "mixtral" else "all") for name in LAYOUTS), ("gpt2", "default"),
         ("llama", "default"), *(pytest.param((name, "all"), marks=pytest.mark.slow) for name in SLOW)]  # fmt: skip


def spread(parameters):
    """Give adapters values that change the output: B starts at zero."""
    with torch.no_grad():
        for name, parameter in parameters:
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def pair(request, tmp_path_factory):
    """Return the variant, PEFT's model with an adapter, and a folder with its base model and the adapter."""
    variant, name = request.param
    folder = tmp_path_factory.mktemp("hf")
    reference(variant).save_pretrained(folder / "base")
    adapted = peft.get_peft_model(reference(variant), peft.LoraConfig(**CONFIGS[name], task_type="CAUSAL_LM"))
    spread(adapted.named_parameters())
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return variant, CONFIGS[name], adapted.eval(), folder


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_loads_with_equal_logits_loss_and_gradients(pair):
    _, _, theirs, folder = pair
    ours = GPT.from_pretrained(folder / "base", dropout=0.0)
    ours.load_adapter(folder / "adapter", is_trainable=True)
    ids, targets = batch()
    theirs.zero_grad()
    logits = theirs(ids).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    same(ours(ids), logits)
    ours_loss = ours(ids, targets)
    ours_loss.backward()
    same(ours_loss, loss)
    trained = {name: p for name, p in ours.named_parameters(remove_duplicate=False) if p.requires_grad}
    grads = SavedAdapter(ours, None).tensors({name: p.grad for name, p in trained.items()})
    expected = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        same(grad, expected[name])
    assert all(p.grad is None for name, p in ours.named_parameters() if name not in trained), "frozen weights"


@pytest.mark.filterwarnings("ignore")
def test_our_adapter_loads_in_peft_with_equal_logits_and_merges(pair, tmp_path):
    variant, config, _, folder = pair
    ours = GPT.from_pretrained(folder / "base", dropout=0.0)
    before = ours(batch()[0])
    ours.add_adapter(LoraConfig(**config))
    same(ours(batch()[0]), before)  # B starts at zero
    spread(ours.named_parameters())
    ours.save_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(reference(variant), tmp_path).eval()
    expected = ours(batch()[0])
    assert not torch.allclose(expected, before, atol=1e-3)
    same(theirs(batch()[0]).logits, expected)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "base")

    same(GPT.from_pretrained(tmp_path)(batch()[0]), expected)
    ours.set_adapter(None)
    same(ours(batch()[0]), before)
    ours.set_adapter("default")
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(batch()[0]), expected, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == GPT(merged.config).state_dict().keys()
