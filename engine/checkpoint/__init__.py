"""Reading and writing checkpoints of this and other libraries.

families/ has the layouts of model families, gguf/ and quantized/ have formats of weights. The modules here write the
folders of models and of runs.
"""
