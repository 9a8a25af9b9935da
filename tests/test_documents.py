"""The documents: their Python examples run, and the commands, targets and links that they name exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from peakgpt.cli import COMMANDS

ROOT = Path(__file__).parents[1]


def blocks(name, language):
    """Return the code blocks of a document in one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def run(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_python_examples_of_readme_run(tmp_path):
    """All blocks run as one program, because later blocks use earlier ones. GPT-2 has two layers to save time."""
    code = "\n".join(blocks("README.md", "python"))
    shown, smaller = 'from_preset("gpt2")', 'from_preset("gpt2", n_layer=2)'
    assert shown in code
    done = run(code.replace(shown, smaller), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "backends in order" in done.stdout and (tmp_path / "checkpoint" / "model.safetensors").is_file()


def test_example_op_of_contributing_compiles_and_explains_itself(tmp_path):
    contract = blocks("CONTRIBUTING.md", "python")[0]
    check = """
x = scale_shift.sample(rows=3, width=5)
assert torch.equal(torch.compile(scale_shift, fullgraph=True, backend="aot_eager")(*x), x[0] * x[1] + x[2])
print(scale_shift.explain(*x))
"""
    # In a file, because `op` evaluates the annotations of the eager function.
    (tmp_path / "scale_shift.py").write_text(contract + check)
    done = subprocess.run([sys.executable, "scale_shift.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "'eager': None" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["README.md", "AGENTS.md", "CONTRIBUTING.md", "docs/benchmarks.md"])
def test_commands_and_links_exist(name):
    text = (ROOT / name).read_text()
    targets = re.findall(r"^([\w.\-]+)[\w .\-]*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"^make (\w[\w-]*)", text, re.MULTILINE) + re.findall(r"`make ([\w-]+)`", text):
        assert target in targets, target
    shell = "\n".join(blocks(name, "sh"))
    for command in re.findall(r"^peakgpt (\w+)", shell, re.MULTILINE) + re.findall(r"`peakgpt (\w+)", text):
        assert command in COMMANDS, command
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / name).parent / link).exists(), link
    assert name != "AGENTS.md" or len(text.splitlines()) <= 80
