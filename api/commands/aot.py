"""peakgpt aot: the static check of every Triton kernel."""

from __future__ import annotations

from peakgpt.kernels.gpu import static_check

add_arguments, run = static_check.add_arguments, static_check.run
