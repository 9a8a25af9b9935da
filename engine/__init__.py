"""Configuration, model, data, training and generation."""
