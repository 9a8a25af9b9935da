"""peakgpt: GPT models at the speed of their hardware."""
