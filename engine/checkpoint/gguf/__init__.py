"""Models in .gguf files, the format of llama.cpp: reading, writing, and the architectures of llama.cpp."""
