"""Tiny random models of transformers for the tests of `peakgpt.patch`: one of each family, and what to compare."""

import torch
import transformers

transformers.logging.set_verbosity_error()
VOCAB, TOKENS = 101, 12

GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
BERT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48,
        "max_position_embeddings": 64}  # fmt: skip
NEOX = {**BERT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}}
LLAMA = {**BERT, "num_key_value_heads": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
      "dropout_rate": 0.0}  # fmt: skip
OPT = {**BERT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
NEO = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
       "window_size": 5, "max_position_embeddings": 64}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FALCON = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
# name: config class, model class, fields of the config
MODELS = {
    "gpt1": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT2),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt2, scale by layer, no tanh": (
        "GPT2Config", "GPT2LMHeadModel",
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"},
    ),
    "gpt_neo": ("GPTNeoConfig", "GPTNeoForCausalLM", NEO),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", NEOX),
    "gpt_neox, serial": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**NEOX, "use_parallel_residual": False}),
    "opt": ("OPTConfig", "OPTForCausalLM", OPT),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_head": 4, "n_layer": 2}),
    "bert": ("BertConfig", "BertForMaskedLM", BERT),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", BERT),
    "distilbert": (
        "DistilBertConfig", "DistilBertForMaskedLM",
        {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    "bart, its decoder": ("BartConfig", "BartForCausalLM", BART),
    "opt, norms after": ("OPTConfig", "OPTForCausalLM", {**OPT, "do_layer_norm_before": False}),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "t5, gated": (
        "T5Config", "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**LLAMA, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config", "Gemma2ForCausalLM",
        {**LLAMA, "head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**LLAMA, "head_dim": 16, "sliding_window": 5,
                                                         "layer_types": ["sliding_attention", "full_attention"]}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**LLAMA, "no_rope_layer_interval": 2}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", LLAMA),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", LLAMA),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {**LLAMA, "sliding_window": 5}),
    "phi": ("PhiConfig", "PhiForCausalLM", LLAMA),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**LLAMA, "sliding_window": 5}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", LLAMA),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {**LLAMA, "sliding_window": 5}),
    "falcon": ("FalconConfig", "FalconForCausalLM", FALCON),
    "falcon, 40b": (
        "FalconConfig", "FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon, rw": (
        "FalconConfig", "FalconForCausalLM",
        {**FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    ),
    "mpt": ("MptConfig", "MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {**GPT2, "attn_pdrop": 0.0}),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**GPT2, "rotary_dim": 4}),
    "mixtral, experts": ("MixtralConfig", "MixtralForCausalLM", {**LLAMA, **EXPERTS, "sliding_window": 5}),
    "qwen3_moe, balance loss": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**LLAMA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "output_router_logits": True},
    ),
    "gpt_oss, experts": (
        "GptOssConfig", "GptOssForCausalLM", {**LLAMA, **EXPERTS, "head_dim": 8, "sliding_window": 5},
    ),
}  # fmt: skip


# Their replacements are those of other families: the tests that try many changes leave them out.
ALIKE = {"qwen3", "gemma", "smollm3", "olmo", "olmo3", "phi", "stablelm", "gpt_bigcode", "codegen"}
FAMILIES = [name for name in MODELS if "," not in name and name not in ALIKE]


def build(name="gpt2", rate=0.0, **more):
    config, model, fields = MODELS[name]
    torch.manual_seed(0)
    fields = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **fields, **more}
    model = getattr(transformers, model)(getattr(transformers, config)(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0.0, 0.15)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and rate is not None:
            module.p = rate
    return model


def batch(model):
    torch.manual_seed(1)
    ids = torch.randint(5, VOCAB, (3, TOKENS))
    live = torch.ones_like(ids)
    live[0, :4] = 0  # on the left
    ids[0, :4] = model.config.pad_token_id or 0
    inputs = {"input_ids": ids, "attention_mask": live}
    labels = torch.where(live.bool(), ids, -100)
    labels[0, 4] = -100  # the position before it is padding, where sdpa gives zeros and eager gives means
    return inputs, labels


def train_step(model, labels, inputs):
    """Return the loss of a training step and every gradient."""
    model.zero_grad(set_to_none=True)
    loss = model.train()(**inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def outputs_of(model, inputs):
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": inputs["input_ids"]}
    with torch.no_grad():
        out = model.eval()(**inputs).logits
    return out if model.config.is_encoder_decoder else out[inputs["attention_mask"].bool()]


def close(got, expected, limit=2e-5):
    scale = expected.abs().max().clamp(min=1e-3)
    assert float(((got - expected).abs().max() / scale).detach()) < limit
