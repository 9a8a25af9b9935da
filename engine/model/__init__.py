"""The GPT network: configuration, layers, parameter and FLOP counts."""
