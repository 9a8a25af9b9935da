"""The memory of training adapters over 4-bit weights, measured by examples/qlora_memory.py in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "qlora_memory.py"
RANK, TOKENS, WIDTH, MATRIX = 8, 64, 768, 12 * 768**2  # MATRIX: weights of one layer of GPT-2


def peak(layers, *flags):
    """Return the peak of resident memory in bytes."""
    flags = ["--preset", "gpt2", "--layers", str(layers), "--rank", str(RANK), "--tokens", str(TOKENS), *flags]
    done = subprocess.run([sys.executable, str(EXAMPLE), *flags], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return float(re.search(r"peak resident memory +([\d.]+) GB", done.stdout)[1]) * 1e9


@pytest.mark.slow
def test_a_further_layer_takes_its_4_bit_weights_and_its_adapter():
    """Nothing of a float weight's size stays: with a bfloat16 copy of each weight a layer takes 14 MB more.

    Mutation that makes it fail: backward that dequantizes the weight in forward and saves it.
    """
    layers = 24
    weights = MATRIX * 4.25 / 8
    adapters = RANK * (WIDTH + 3 * WIDTH + 2 * WIDTH + 2 * 5 * WIDTH) * 16  # value, gradient, master, moments, spare
    inputs = 2 * TOKENS * WIDTH * 2  # of a recomputed block
    more = (peak(2 + layers) - peak(2)) / layers
    assert 0.9 * weights < more < 1.5 * (weights + adapters + inputs)


@pytest.mark.slow
def test_the_example_fails_above_its_limit():
    with pytest.raises(AssertionError, match=r"the peak is .* GB, expected at most 0\.1 GB"):
        peak(1, "--limit-gb", "0.1")
