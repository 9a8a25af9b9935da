"""peakgpt's ops in existing PyTorch models: `patch`, `unpatch`, and attn_implementation="peakgpt" in transformers."""
