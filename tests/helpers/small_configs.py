"""Small sizes for each family of transformers, as arguments of its config class."""

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
}  # fmt: skip
