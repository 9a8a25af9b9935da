"""Adapters: which layers they are for, and their folders in PEFT's format."""
