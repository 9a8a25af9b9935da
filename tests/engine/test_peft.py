"""PEFT adapters on GPT: they learn, change the output, generate, save, load and merge; the rest is refused."""

import pytest
import torch

import peakgpt
from peakgpt.engine.inference.executor import make_executor
from peakgpt.engine.inference.program_executor import ProgramExecutor
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer

peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 96, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
LLAMA = {"norm": "rms", "position": "rotary", "gated_mlp": True, "activation": "silu", "bias": False,
         "tied_head": False}  # fmt: skip
FAMILIES = {
    "gpt2": {}, "llama": LLAMA, "experts": {"experts": 2},
    "parallel": {"residual": "parallel", "position": "rotary", "tied_head": False, "head_bias": True},
}  # fmt: skip
LAYERS = ["c_attn", "c_fc", "c_gate", "c_proj", "router"]
ADAPTERS = {
    "lora": peft.LoraConfig(r=2, target_modules=LAYERS),
    "dora": peft.LoraConfig(r=2, target_modules=LAYERS, use_dora=True),
    "ia3": peft.IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]),
    "biases": peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all"),
    "norms": peft.LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"]),
    "oft": peft.OFTConfig(target_modules=["c_attn"], oft_block_size=4, r=0),
    "vera": peft.VeraConfig(target_modules=["c_attn"], r=4),
}
# The stacked weights of experts are parameters to PEFT, whose layers cannot replace ExpertLinear.
NO_EXPERTS = r".*(attn\.c_attn|attn\.c_proj|router|h\.0\.mlp\.c_fc)"
OF_EXPERTS = {
    "lora": peft.LoraConfig(r=2, target_modules=NO_EXPERTS, target_parameters=["experts.c_fc.weight"]),
    "dora": peft.LoraConfig(r=2, target_modules=NO_EXPERTS, use_dora=True),
    "ia3": peft.IA3Config(target_modules=NO_EXPERTS, feedforward_modules=r".*attn\.c_proj"),
}
UNTIED = {  # adapters of embedding and head
    "head": peft.LoraConfig(r=2, target_modules=["lm_head", "wte"]),
    "saved head": peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"]),
    "tokens": peft.TrainableTokensConfig(target_modules=["wte"], token_indices=[*range(9)]),
}
CASES = [(family, name) for family in FAMILIES for name in ADAPTERS] + [("llama", name) for name in UNTIED]
IDS = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(0))


def make_model(family):
    torch.manual_seed(1)
    model = peakgpt.GPT(peakgpt.GPTConfig(**SIZES, **FAMILIES[family]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name"), CASES)
def test_adapters_learn_change_the_output_save_load_and_merge(family, name, tmp_path):
    model = make_model(family)
    before = model(IDS)
    adapters = {**ADAPTERS, **UNTIED, **(OF_EXPERTS if family == "experts" else {})}
    adapted = peft.get_peft_model(model, adapters[name])
    adapted(IDS, IDS).backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(0.2 * torch.randn_like(p))
    adapted.eval()
    expected = adapted(IDS)
    assert not torch.allclose(expected, before, atol=1e-3)
    text = adapted.generate(IDS, max_new_tokens=9)
    assert torch.equal(text[:, 7], expected[:, -1].argmax(-1))

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make_model(family), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(IDS), expected)
    if name != "biases" and family != "parallel":  # no tensors of other names; no layout of transformers, a warning
        with pytest.raises(ValueError, match="merge_and_unload"):
            model.save_pretrained(tmp_path / "model")

    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(merged.generate(IDS, max_new_tokens=9), text)
    assert type(make_executor(merged, 4)) is ProgramExecutor
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(peakgpt.GPT.from_pretrained(tmp_path / "merged")(IDS), merged(IDS))


def test_the_trainer_trains_adapters_alone():
    adapted = peft.get_peft_model(make_model("gpt2"), ADAPTERS["lora"])
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    trainer = Trainer(adapted, TrainConfig(lr=1e-2, warmup=0, batch=2, tokens=7), steps=4)
    losses = [float(trainer.step(IDS, IDS)) for _ in range(4)]
    assert losses[-1] < losses[0]
    changed = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_what_needs_the_forward_of_transformers_is_refused(config):
    with pytest.raises(ValueError, match="expected get_peft_model without task_type"):
        peft.get_peft_model(make_model("gpt2"), config)


def test_fp8_refuses_adapters():
    adapted = peft.get_peft_model(make_model("gpt2"), ADAPTERS["lora"])
    with pytest.raises(ValueError, match="fp8: c_attn is a Linear with its own forward"):
        peakgpt.engine.model.fp8.set_fp8(adapted, True)
