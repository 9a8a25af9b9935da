"""Model, checkpoints, data, training, inference and evaluation; `gpt.GPT` joins them."""
