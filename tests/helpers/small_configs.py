"""Small sizes for each family of transformers, as arguments of its config class."""

LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
         "intermediate_size": 48, "max_position_embeddings": 32}  # fmt: skip
SMALL = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32},
    "openai-gpt": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "max_position_embeddings": 32,
                "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "rotary_dim": 8},
    "gpt_neox": {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48,
                 "max_position_embeddings": 32},
    "opt": {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "ffn_dim": 48,
            "max_position_embeddings": 32, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 2, "hidden_size": 32},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 5},
    "qwen2": {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "smollm3": {**LLAMA, "no_rope_layer_interval": 2, "pad_token_id": 0},
    "mixtral": {**LLAMA, "num_local_experts": 3},
    "olmo": LLAMA,
}  # fmt: skip
