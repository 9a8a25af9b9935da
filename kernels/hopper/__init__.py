"""Gluon backend for sm_90: one file per op, none yet."""
