"""A patched model that changes as a whole does what the unpatched model does after the same change."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from module_changes import expect_same, results, run_language_model, scaled
from tiny_transformers import batch, build, close, outputs_of
from torch import nn

import peakgpt


def lora(model):
    peft = pytest.importorskip("peft")
    targets = [n for n, m in model.named_modules() if "Linear" in type(m).__name__ or "Conv1D" in type(m).__name__]
    heads = ("lm_head", "cls", "vocab", "pooler")
    config = peft.LoraConfig(target_modules=[n for n in targets if not n.startswith(heads)], init_lora_weights=False)
    torch.manual_seed(7)
    return peft.get_peft_model(model, config)


def merged(model):
    return lora(model).merge_and_unload().requires_grad_(True)


def new_head(model):
    torch.manual_seed(7)
    model.set_output_embeddings(nn.Linear(32, model.config.vocab_size, bias=False))
    return model


def resized(model):
    torch.manual_seed(7)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    with torch.no_grad():
        for parameter in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            parameter[-8:] = 0.1
    return model


def eager_attention(model):
    model.set_attn_implementation("eager")
    return model


WHOLE = {
    "resized": resized, "new head": new_head, "LoRA": lora, "LoRA merged": merged,
    "double": lambda m: m.double(), "eager attention": eager_attention,
    "every hook": lambda m: [p.register_forward_hook(lambda *_: None) for p in m.modules()] and m,
    "frozen but the norms": lambda m: [
        p.requires_grad_("norm" in n.lower() or "ln" in n) for n, p in m.named_parameters()] and m,
    "fewer layers": lambda m: [
        setattr(p, "_modules", dict(list(p._modules.items())[:1])) for n, p in m.named_modules()
        if n.endswith((".h", ".layers", ".block", "encoder.layer"))] and m,
}  # fmt: skip


TIED = [("resized", True), *((name, name in ("LoRA", "double", "every hook", "fewer layers")) for name in WHOLE)]


@pytest.mark.parametrize(("change_model", "tied"), TIED)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "bart", "gptj"])
def test_change_of_the_whole_model_after_patch_has_its_effect(name, change_model, tied):
    model = build(name, tie_word_embeddings=tied)
    patched = copy.deepcopy(model)
    peakgpt.patch(patched, check=False)
    plain, other = (WHOLE[change_model](m) for m in (model, patched))
    expected = results(plain, run_language_model)
    assert not isinstance(expected, Exception), expected
    expect_same(results(other, run_language_model), expected, change_model)
    peakgpt.unpatch(other)
    again = results(other, run_language_model)
    assert all(torch.equal(again[key], value) for key, value in expected.items())


def test_model_with_adapters_is_patched_and_merged_later():
    model = lora(build("llama"))
    expected = run_language_model(model)
    peakgpt.patch(model)
    expect_same(run_language_model(model), expected, "LoRA before patch")
    inputs, _ = batch(model)
    close(outputs_of(copy.deepcopy(model).merge_and_unload(), inputs), expected["outputs"], 1e-3)
    peakgpt.unpatch(model)
    assert torch.equal(run_language_model(model)["outputs"], expected["outputs"])


def test_torch_ao_quantizes_before_patch_and_raises_after_it():
    """It finds layers by their exact class. Regression: it quantized nothing, without a word."""
    quantize = torch.ao.quantization.quantize_dynamic
    model = build("llama").eval()
    patched = copy.deepcopy(model)
    peakgpt.patch(patched, check=False)
    with pytest.raises(ValueError, match=r"call peakgpt\.unpatch before the quantization and peakgpt\.patch after it"):
        quantize(patched, {nn.Linear})
    inputs, _ = batch(model)
    quantized = quantize(model, {nn.Linear})
    expected = outputs_of(quantized, inputs)
    peakgpt.patch(quantized)
    close(outputs_of(quantized, inputs), expected, 1e-3)


def test_linear_layers_are_replaced_by_quantized_ones_after_patch():
    """Replace each nn.Linear by a layer of another class with a quantized weight, as bitsandbytes does."""

    class Int8Linear(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.scale = layer.weight.detach().abs().max() / 127
            self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
            self.bias = layer.bias

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    for name in ("llama", "bert", "opt"):
        model = build(name)
        patched = copy.deepcopy(model)
        peakgpt.patch(patched)
        for each in (model, patched):
            for path, module in list(each.named_modules()):
                if isinstance(module, nn.Linear) and not path.startswith(("lm_head", "cls")):
                    each.set_submodule(path, Int8Linear(module))
        inputs, _ = batch(model)
        close(outputs_of(patched, inputs), outputs_of(model, inputs))


def test_accelerate_hooks_before_and_after_patch():
    hooks = pytest.importorskip("accelerate.hooks")

    class Scaling(hooks.ModelHook):
        def post_forward(self, module, output):
            return scaled(output)

    for first in (True, False):
        model = build("gpt2")
        patched = copy.deepcopy(model)
        steps = [lambda m: peakgpt.patch(m), lambda m: hooks.add_hook_to_module(m.transformer.h[0].mlp.c_fc, Scaling())]
        for step in steps if first else steps[::-1]:
            step(patched)
        steps[1](model)
        expected = run_language_model(model)
        expect_same(run_language_model(patched), expected, "hook")
        peakgpt.unpatch(patched)
        assert torch.equal(run_language_model(patched)["outputs"], expected["outputs"])


def test_unpatch_raises_on_a_foreign_forward_and_changes_nothing():
    model = build("gpt2")
    inputs, _ = batch(model)
    peakgpt.patch(model)
    expected = outputs_of(model, inputs)
    forward = model.transformer.h[1].mlp.forward
    model.transformer.h[1].mlp.forward = lambda x: forward(x)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp, a GPT2MLP whose attribute `forward` was set after"):
        peakgpt.unpatch(model)
    close(outputs_of(model, inputs), expected)
    del model.transformer.h[1].mlp.forward
    peakgpt.unpatch(model)


def test_threads_do_not_see_the_head_of_each_other():
    """Regression: a head that passes its input through for a training step did so for a thread that generates too."""
    model = build("llama")
    inputs, labels = batch(model)
    peakgpt.patch(model, check=False)
    model.train()
    seen = []

    def generate_meanwhile(*_):
        if not seen:
            seen.append(None)
            with ThreadPoolExecutor(1) as pool:
                seen[0] = pool.submit(lambda: model(inputs["input_ids"]).logits.shape[-1]).result()

    model.model.norm.register_forward_hook(generate_meanwhile)
    model.lm_head.register_forward_pre_hook(generate_meanwhile)
    model(**inputs, labels=labels)
    assert seen == [model.config.vocab_size]
