"""The layouts of model families: how the config.json and the tensors of each correspond to ours."""
