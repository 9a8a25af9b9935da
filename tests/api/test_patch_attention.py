"""attn_implementation="peakgpt" handles masks, caches and options of the attention interface of transformers."""

import pytest
import torch
import transformers
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import peakgpt
from peakgpt.dropin import attention_function
from peakgpt.dropin.attention_function import Mask, attention_forward

transformers.logging.set_verbosity_error()
peakgpt.register_attention()
VOCAB = 97
WIDTH = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48,
         "vocab_size": VOCAB, "max_position_embeddings": 64}  # fmt: skip


def model_of(kind, implementation="peakgpt", **fields):
    torch.manual_seed(0)
    config, model = (getattr(transformers, kind + suffix) for suffix in ("Config", "ForCausalLM"))
    config = config(**{**WIDTH, **fields})
    return model._from_config(config, attn_implementation=implementation).eval()


def pair(kind, reference="sdpa", **fields):
    """Build the same model with a reference attention and with "peakgpt"."""
    stock, ours = model_of(kind, reference, **fields), model_of(kind, **fields)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.fixture
def calls(monkeypatch):
    """Record the keyword arguments of each call of the attention op."""
    recorded = []
    op = peakgpt.attention
    monkeypatch.setattr(attention_function, "attention", lambda *a, **k: recorded.append(k) or op(*a, **k))
    return recorded


IDS = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
LIVE = {
    "left": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9]),
    "right": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 9]),
    "holes": torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1], [1] * 9]),
    "none": torch.ones(2, 9, dtype=torch.long),
}


@pytest.mark.parametrize("padding", LIVE)
@pytest.mark.parametrize("kind", ["Llama", "OPT", "GPTNeoX"])
def test_padding_is_applied_without_a_dense_mask(kind, padding, calls):
    """Without a registered mask function, transformers ignores left padding silently."""
    stock, ours = pair(kind)
    live = LIVE[padding]
    with torch.no_grad():
        expected, got = (m(IDS, attention_mask=live).logits[live.bool()] for m in (stock, ours))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    for call in calls:
        ranges, bias = call["kv_start"] is not None, call["bias"]
        assert (ranges, bias is not None) == (padding in ("left", "right"), padding == "holes")
        assert bias is None or bias.stride()[1:3] == (0, 0) or bias.stride(2) == 0  # no (T, S) tensor


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Bloom", {"n_head": 4, "n_layer": 2}), ("CodeGen", {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}),
        ("XGLM", {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 48}), ("GPTNeoXJapanese", {}),
    ],
)  # fmt: skip
def test_model_that_adds_masks_itself_raises(kind, fields):
    """Regression: such models got no mask, so queries saw later keys."""
    model = model_of(kind, **fields)
    with pytest.raises((TypeError, AttributeError), match=r"applies its mask itself.*expected peakgpt.patch\(model\)"):
        model(IDS)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("GPTJ", {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}), ("Falcon", {}),
        ("GPTNeo", {"num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
    ],
)  # fmt: skip
def test_model_without_attention_interface_raises_at_construction(kind, fields):
    with pytest.raises(KeyError, match="peakgpt"):
        model_of(kind, **fields)


def test_scale_of_the_caller_is_used(calls):
    """OPT scales its queries and passes 1.0."""
    stock, ours = pair("OPT")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-5)
    assert {call["scale"] for call in calls} == {1.0}


def test_position_bias_is_added_and_gets_gradient():
    """T5 passes it as a keyword argument."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    stock = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    ours = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="peakgpt")
    ours.load_state_dict(stock.state_dict())
    grads = []
    for model in (stock, ours):
        model.train()(IDS, attention_mask=LIVE["right"], labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if "relative_attention_bias" in n})
    assert len(grads[0]) == 2
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def tensors(queries=4, keys=4, heads=2, kv_heads=2):
    torch.manual_seed(0)
    return [torch.randn(2, h, n, 8) for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))]


class Causal(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize("name", ["head_mask", "cache", "whatever"])
def test_unknown_keyword_raises(name):
    with pytest.raises(ValueError, match=f"got {name}=float, expected None"):
        attention_forward(Causal(), *tensors(), None, **{name: 1.0})
    attention_forward(Causal(), *tensors(), None, **{name: None}, position_ids=torch.arange(4))


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (1, 5), (3, 6)], ids=["equal", "one query", "static prefill"])
@pytest.mark.parametrize("causal", [True, False])
def test_no_mask_equals_sdpa_attention_of_transformers(queries, keys, causal):
    q, k, v = tensors(queries, keys)
    module = Causal()
    module.is_causal = causal
    expected = transformers.AttentionInterface()["sdpa"](module, q, k, v, None)[0]
    got = attention_forward(module, q, k, v, None)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        attention_forward(Causal(), q, k, v, None, is_causal=causal)[0], expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_dense_mask_of_the_user_is_applied(kind):
    stock, ours = pair("Llama", num_key_value_heads=2)
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    mask = mask if kind == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(kind).min)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(IDS, attention_mask=mask).logits, stock(IDS, attention_mask=mask).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("window", [None, 4])
def test_greedy_tokens_are_same_with_dynamic_and_static_cache(cache, padding, window):
    fields = {"sliding_window": window, "num_key_value_heads": 2} if window else {}
    stock, ours = pair("Mistral" if window else "Llama", pad_token_id=0, **fields)
    options = {"max_new_tokens": 7, "do_sample": False, "cache_implementation": cache, "attention_mask": LIVE[padding],
               "disable_compile": True}  # fmt: skip
    assert torch.equal(ours.generate(IDS, **options), stock.generate(IDS, **options))


def test_second_prompt_chunk_attends_to_the_first():
    """More than one query and fewer than keys: the mask is aligned at the last key."""
    stock, ours = pair("Llama")
    with torch.no_grad():
        cache = ours(IDS[:, :4]).past_key_values
        got = ours(IDS[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(got, stock(IDS).logits[:, 4:], rtol=1e-4, atol=1e-5)


CAPPED = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("Gemma2", {"attn_logit_softcapping": 0.5}), ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1})],
)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("weights", [False, True])
def test_soft_cap_and_sinks_equal_eager_attention(kind, fields, padding, weights):
    """Without them the logits differ by more than 1e-2."""
    stock, ours = pair(kind, "eager", **CAPPED, **fields)
    live = LIVE[padding]
    with torch.no_grad():
        for model in (stock, ours):
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
        expected, got = (m(IDS, attention_mask=live, output_attentions=weights) for m in (stock, ours))
    torch.testing.assert_close(got.logits[live.bool()], expected.logits[live.bool()], rtol=1e-4, atol=1e-4)
    for a, b in zip(got.attentions or (), expected.attentions or (), strict=True):
        torch.testing.assert_close(*(t.transpose(1, 2)[live.bool()] for t in (a, b)), rtol=1e-4, atol=1e-5)


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 1]])


@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_are_read_from_position_ids(window, calls):
    fields = {"sliding_window": window, "num_key_value_heads": 2} if window else {}
    stock, ours = pair("Mistral" if window else "Llama", **fields)
    expected, got = (m(IDS, position_ids=PACKED, use_cache=False).logits for m in (stock, ours))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert all(call["cu_seqlens"].tolist() == [0, 3, 9, 16, 18] and call["window"] == window for call in calls)


def test_packed_documents_are_read_from_cu_seq_lens():
    stock, ours = pair("Llama")
    offsets = torch.tensor([0, 3, 9], dtype=torch.int32)
    with torch.no_grad():
        expected = stock(IDS[:1], position_ids=PACKED[:1], use_cache=False).logits
        got = ours(IDS[:1], position_ids=PACKED[:1], use_cache=False, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
                   max_length_q=6, max_length_k=6).logits  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_compiled_forward_has_no_dense_mask_and_rejects_packing():
    """Under torch.compile, transformers makes a dense mask of every batch because position_ids may be packed."""
    stock, ours = pair("Llama")
    shapes = []

    def record_shapes(graph, inputs):
        shapes.extend(tuple(n.meta["example_value"].shape) for n in graph.graph.nodes
                      if isinstance(n.meta.get("example_value"), torch.Tensor))  # fmt: skip
        return graph.forward

    run = torch.compile(ours, fullgraph=True, backend=record_shapes)
    got = run(IDS, use_cache=False, position_ids=torch.arange(9)[None]).logits
    torch.testing.assert_close(got, stock(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not [s for s in shapes if s[-2:] == (9, 9)]
    with pytest.raises(RuntimeError, match="packed position_ids while compiling: expected cu_seq_lens_q"):
        run(IDS, use_cache=False, position_ids=PACKED[:1])


@pytest.mark.parametrize("padding", ["left", "holes"])
def test_compiled_forward_applies_padding(padding):
    stock, ours = pair("Llama")
    live = LIVE[padding]
    run = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = run(IDS, attention_mask=live, use_cache=False).logits[live.bool()]
    expected = stock(IDS, attention_mask=live).logits[live.bool()]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_unknown_mask_patterns_become_dense_masks():
    config = model_of("Llama").config
    embeds = torch.zeros(2, 9, 32)
    options = {"config": config, "inputs_embeds": embeds, "attention_mask": None, "past_key_values": None}
    assert create_causal_mask(**options) == Mask(True)
    config.sliding_window = 4
    assert create_sliding_window_causal_mask(**options) == Mask(True, window=4)
    odd = create_causal_mask(**options, or_mask_function=lambda b, h, q, k: (q < 3) & (k < 3))
    assert odd.shape == (2, 1, 9, 9) and odd[0, 0, 0].tolist() == [True] * 3 + [False] * 6


def test_output_attentions_raises():
    config = model_of("Llama").config
    with pytest.raises(ValueError, match="output_attentions"):
        config.output_attentions = True
