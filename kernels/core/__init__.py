"""Dispatch of an op call to a backend."""
