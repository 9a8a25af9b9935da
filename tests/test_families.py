"""Every family against transformers, tiny and random: logits, loss, gradients, greedy text, and files both ways."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import peakgpt
from peakgpt.engine import families, flops
from peakgpt.engine.cache import KVCache
from peakgpt.kernels.dispatch import use_backend

V, T, PROMPT = 41, 24, 7
NEO = {"hidden_size": 32, "num_layers": 4, "num_heads": 2, "max_position_embeddings": T}
NEOX = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80,
        "max_position_embeddings": T}  # fmt: skip
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 72, "max_position_embeddings": T}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": T}
BLOOM = {"n_layer": 2, "seq_length": T}
# Every choice that a row of engine/families.py makes, by the config class's name in transformers.
VARIANTS = {
    "gpt2": ("GPT2", GPT),
    "gpt2 scaled by layer": ("GPT2", {**GPT, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    "gpt2 not scaled": ("GPT2", {**GPT, "scale_attn_weights": False, "n_inner": 40}),
    "openai-gpt": ("OpenAIGPT", GPT),
    "gpt_neo": ("GPTNeo", {**NEO, "attention_types": [[["global", "local"], 2]], "window_size": 5}),
    "gpt_neo uneven": ("GPTNeo", {**NEO, "attention_types": [[["local"], 1], [["global"], 3]], "window_size": 3}),
    "gptj": ("GPTJ", {**GPT, "n_embd": 48, "rotary_dim": 6}),
    "gpt_neox": ("GPTNeoX", {**NEOX, "hidden_act": "gelu_fast"}),
    "gpt_neox serial": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, "attention_bias": False,
                                    "rotary_pct": 1.0, "rotary_emb_base": 500}),
    "opt": ("OPT", OPT),
    "opt post-norm": ("OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt without biases": ("OPT", {**OPT, "enable_bias": False, "activation_function": "gelu"}),
    "bloom": ("Bloom", {**BLOOM, "hidden_size": 32, "n_head": 4}),
    "bloom of 6 heads": ("Bloom", {**BLOOM, "hidden_size": 48, "n_head": 6}),
}  # fmt: skip
BACKENDS = ("eager", "cpu")


def reference(variant):
    """transformers' model with weights far from their initial ones, or attention would be uniform."""
    torch.manual_seed(sum(map(ord, variant)))
    kind, sizes = VARIANTS[variant]
    config = getattr(transformers, f"{kind}Config")(
        **sizes, vocab_size=V, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.dim() > 1 else 0.05) * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """transformers' model, the folder that it was saved in, and ours from it."""
    theirs, folder = reference(request.param), tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, folder, peakgpt.GPT.from_pretrained(folder, dropout=0.0)


def batch(rows=2, tokens=17):
    torch.manual_seed(3)
    ids = torch.randint(V, (rows, tokens + 1))
    targets = ids[:, 1:].clone()
    targets[0, -3:] = -100
    return ids[:, :-1].contiguous(), targets


def file_names(state):
    """Names of a transformers model's tensors as its files have them."""
    return {name.replace("lm_head", "embed_out") if "gpt_neox.embed_in.weight" in state else name: t
            for name, t in state.items()}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_loss_and_gradients_equal_transformers(pair, backend):
    theirs, _, ours = pair
    ids, targets = batch()
    for model in (theirs, ours):
        model.zero_grad()
    logits = theirs(ids).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    with use_backend(backend):
        torch.testing.assert_close(ours(ids), logits, rtol=1e-5, atol=1e-5)
        ours_loss = ours(ids, targets)
        ours_loss.backward()
    torch.testing.assert_close(ours_loss, loss, rtol=1e-5, atol=1e-5)
    family = families.family_of(ours.config)
    expected = file_names({name: p.grad for name, p in theirs.named_parameters()})
    grads = family.to_theirs(ours.config, {name: p.grad for name, p in ours.named_parameters()})
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_greedy_text_equals_transformers(pair, backend):
    theirs, _, ours = pair
    prompt = batch(4)[0][:, :PROMPT]
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_length=T, min_length=T, pad_token_id=0
    )
    with use_backend(backend):
        assert torch.equal(ours.generate(prompt, temperature=0), expected)
    assert len({*expected[:, PROMPT:].flatten().tolist()}) > 3, "a text that repeats one token proves little"


@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_equals_the_whole_forward(pair, backend):
    _, _, model = pair
    ids = batch(2, 14)[0]
    cache = KVCache(model.config, 2, 14, dtype=torch.float32, device="cpu")
    with use_backend(backend), torch.no_grad():
        parts = [model.head(model.features(part, cache)) for part in ids.split((6, 3, 1, 1, 1, 1, 1), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_changes_nothing(pair, backend):
    """Against each sequence alone, loss and gradients included; and against transformers' padded greedy text."""
    theirs, _, ours = pair
    ids, targets = batch()
    starts = torch.tensor([0, 4])
    padded, padded_targets = ids.clone(), targets.clone()
    padded[1, 4:], padded_targets[1, 4:] = ids[1, :-4], targets[1, :-4]
    padded_targets[1, :4] = -100
    with use_backend(backend):
        grads = []
        for call in (
            lambda: ours(padded, padded_targets, start=starts),
            lambda: (ours(ids[:1], targets[:1]) * 14 + ours(ids[1:, :-4], targets[1:, :-4].contiguous()) * 13) / 27,
        ):
            ours.zero_grad()
            loss = call()
            loss.backward()
            grads.append([loss.detach(), *(p.grad for p in ours.parameters())])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        text = ours.generate(padded[:, :9], temperature=0, start=starts, max_new_tokens=8)
        alone = ours.generate(ids[1:, :5], temperature=0, max_new_tokens=8)
    assert torch.equal(text[1, 4:], alone[0])
    mask = (torch.arange(9) >= starts[:, None]).long()
    expected = theirs.generate(padded[:, :9], attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert torch.equal(text, expected)


def test_files_go_both_ways(pair, tmp_path):
    """Tensor for tensor; transformers finds nothing missing, nothing too much, and computes the same."""
    theirs, folder, _ = pair
    ours = peakgpt.GPT.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    ids, _ = batch()
    assert torch.equal(again.eval()(ids).logits, theirs(ids).logits)
    assert peakgpt.GPT.from_pretrained(tmp_path).config == ours.config


def test_parameters_are_counted(pair):
    _, _, ours = pair
    assert flops.parameter_count(ours.config) == sum(p.numel() for p in ours.parameters())
