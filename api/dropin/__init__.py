"""peakgpt's ops in models that people already have: `patch`, `unpatch`, and transformers' attn_implementation."""
