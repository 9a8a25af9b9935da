"""Subclasses that run a module of another library on peakgpt's ops: layers, attention, blocks, language-model heads."""
