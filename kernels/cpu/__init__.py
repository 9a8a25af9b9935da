"""C++ backend: one file per op, glue to peakgpt._C."""
