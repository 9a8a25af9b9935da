"""Small random models of every family, built by transformers, and a batch for them."""

import torch
import transformers

V, T = 41, 24

NEO = {"hidden_size": 32, "num_layers": 4, "num_heads": 2, "max_position_embeddings": T}
NEOX = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80,
        "max_position_embeddings": T}  # fmt: skip
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 72, "max_position_embeddings": T}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": T}
BLOOM = {"n_layer": 2, "seq_length": T}
MPT = {"d_model": 32, "n_layers": 2, "max_seq_len": T}
FALCON = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": T}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 40, "max_position_embeddings": T}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 12}  # fmt: skip
TYPES = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 12,
        "beta_fast": 2.0}  # fmt: skip
# transformers has the short factors for texts up to 32 tokens, which is more than T.
LONGROPE = {"rope_type": "longrope", "partial_rotary_factor": 0.75, "factor": 4.0, "long_factor": [4.0] * 6,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]}  # fmt: skip
GPT_OSS = {**LLAMA, "head_dim": 16, "sliding_window": 5, "rope_parameters": YARN, "num_hidden_layers": 2}
# Every variant that engine/checkpoint/families/ reads: transformers' config class without "Config", and its fields.
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
    "cerebras": ("GPT2", {**GPT, "n_inner": 80, "activation_function": "gelu"}),
    "gpt_bigcode": ("GPTBigCode", {**GPT, "n_embd": 48, "n_head": 3}),
    "gpt_bigcode by head": ("GPTBigCode", {**GPT, "multi_query": False, "scale_attn_weights": False, "n_inner": 40}),
    "codegen": ("CodeGen", {**GPT, "n_embd": 64, "n_head": 8, "rotary_dim": 6}),
    "mpt": ("Mpt", {**MPT, "n_heads": 4}),
    "mpt of 6 heads": ("Mpt", {**MPT, "d_model": 48, "n_heads": 6, "attn_config": {"softmax_scale": 0.5}}),
    "mpt clipped": ("Mpt", {**MPT, "n_heads": 4, "attn_config": {"clip_qkv": 0.5}}),
    "falcon": ("Falcon", FALCON),
    "falcon 40b": ("Falcon", {**FALCON, "num_attention_heads": 6, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": ("Falcon", {**FALCON, "num_attention_heads": 6, "new_decoder_architecture": True, "num_kv_heads": 3,
                              "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 80, "tie_word_embeddings": False}),
    "falcon rw": ("Falcon", {**FALCON, "hidden_size": 32, "num_attention_heads": 4, "alibi": True, "bias": True,
                             "multi_query": False, "parallel_attn": False}),
    "starcoder2": ("Starcoder2", {**NEOX, "num_key_value_heads": 1, "sliding_window": 5}),
    "starcoder2 without biases": ("Starcoder2", {**NEOX, "num_key_value_heads": 3, "use_bias": False, "head_dim": 8,
                                                 "tie_word_embeddings": False}),
    "stablelm": ("StableLm", {**NEOX, "num_key_value_heads": 3, "partial_rotary_factor": 0.5}),
    "stablelm parallel": ("StableLm", {**NEOX, "num_key_value_heads": 1, "use_parallel_residual": True,
                                       "use_qkv_bias": True, "tie_word_embeddings": True}),
    "phi": ("Phi", NEOX),
    "phi of groups": ("Phi", {**NEOX, "num_key_value_heads": 1, "partial_rotary_factor": 0.25, "rope_theta": 500.0}),
    "phi3": ("Phi3", {**NEOX, "num_key_value_heads": 1, "sliding_window": 5}),
    "phi3 partial": ("Phi3", {**NEOX, "num_key_value_heads": 3, "partial_rotary_factor": 0.75, "rope_theta": 500.0,
                              "tie_word_embeddings": True}),
    "phi3 longrope": ("Phi3", {**NEOX, "num_key_value_heads": 1, "rope_parameters": LONGROPE,
                               "original_max_position_embeddings": 32}),
    "llama": ("Llama", LLAMA),
    "llama 3": ("Llama", {**LLAMA, "head_dim": 16, "rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "llama biases, yarn": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu",
                                     "rope_parameters": YARN}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 5}),
    "mistral without windows": ("Mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2 windows": ("Qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "smollm3": ("SmolLM3", {**LLAMA, "no_rope_layer_interval": 2}),
    "olmo": ("Olmo", LLAMA),
    "olmo clipped": ("Olmo", {**LLAMA, "clip_qkv": 0.5}),
    "olmo2": ("Olmo2", LLAMA),
    "olmo3": ("Olmo3", {**LLAMA, "sliding_window": 5, "layer_types": TYPES, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}, "full_attention": YARN}}),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 16}),
    "gemma": ("Gemma", {**LLAMA, "head_dim": 16}),
    "gemma2": ("Gemma2", {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 18, "sliding_window": 5,
                          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**LLAMA, "head_dim": 16, "sliding_window": 5, "layer_types": TYPES, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0}}}),
    "mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 5}),
    "mixtral all experts": ("Mixtral", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 3,
                                        "sliding_window": 5}),
    "qwen3_moe": ("Qwen3Moe", {**LLAMA, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                               "head_dim": 16, "norm_topk_prob": True, "num_hidden_layers": 4,
                               "decoder_sparse_step": 2}),
    "qwen3_moe all experts": ("Qwen3Moe", {**LLAMA, "num_experts": 3, "num_experts_per_tok": 3,
                                           "moe_intermediate_size": 24, "mlp_only_layers": [0], "attention_bias": True,
                                           "use_sliding_window": True, "sliding_window": 5}),
    "gpt_oss": ("GptOss", {**GPT_OSS, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "gpt_oss all experts": ("GptOss", {**GPT_OSS, "num_local_experts": 3, "num_experts_per_tok": 3,
                                       "attention_bias": False}),
}  # fmt: skip
# Falcon's eager attention in transformers 5.23 adds ALiBi twice: to the scores and in the mask.
ATTENTION = {"falcon rw": "sdpa"}


def reference(variant):
    """Build transformers' model with large weights; with the initial ones attention would be uniform."""
    torch.manual_seed(sum(map(ord, variant)))
    kind, sizes = VARIANTS[variant]
    config = getattr(transformers, f"{kind}Config")(
        **sizes, vocab_size=V, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    config._attn_implementation, config._experts_implementation = ATTENTION.get(variant, "eager"), "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.dim() > 1 else 0.05) * torch.randn_like(parameter))
    return model


def batch(rows=2, tokens=17):
    torch.manual_seed(3)
    ids = torch.randint(V, (rows, tokens + 1))
    targets = ids[:, 1:].clone()
    targets[0, -3:] = -100
    return ids[:, :-1].contiguous(), targets
