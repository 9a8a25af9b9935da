"""C++ backend: one file for each op, which calls peakgpt._C."""
