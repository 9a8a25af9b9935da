"""Imports: packages with common names do not shadow other packages, and peakgpt loads no heavy package."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HELPERS = str(ROOT / "tests" / "helpers")


def python(code: str) -> str:
    """Run `code` in a new interpreter in the repository root, without a GPU. Return its standard output."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONSAFEPATH", "TRITON_INTERPRET"}}
    env |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", ["kernels", "engine", "bench"])
def test_package_init_contains_only_a_docstring(folder):
    """transformers imports any `kernels` on the path as Hugging Face's package of that name, so ours runs no code."""
    body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_transformers_imports_and_runs_from_the_repository_root():
    """Regression: a `kernels/__init__.py` that raises breaks `import transformers` in this folder."""
    code = """
import torch, transformers
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))
print(tuple(model(torch.tensor([[1, 2, 3]])).logits.shape))
"""
    assert python(code).strip() == "(1, 3, 11)"


def test_import_of_peakgpt_does_not_load_heavy_packages():
    """`import peakgpt` imports neither Triton (0.4 s) nor transformers nor matplotlib."""
    code = "import sys, torch; before = set(sys.modules); import peakgpt; print(*(set(sys.modules) - before))"
    added = {name.split(".")[0] for name in python(code).split()}
    assert "peakgpt" in added
    assert not added & {"triton", "transformers", "matplotlib", "kernels", "engine", "bench", "api"}


def test_training_does_not_load_dynamo_or_sympy(tmp_path):
    """torch imports torch._dynamo and sympy implicitly in some functions. They would hold 150 MiB for the whole run.

    Regression: the first save waited 5 s for the import in Optimizer.state_dict, and loading a model for the one in
    Tensor.normal_ on the meta device.
    """
    code = f"""
import sys; sys.path.insert(0, {HELPERS!r})
from tiny_run import RunFolder, make_loop, new_run, train
run = new_run({str(tmp_path / "run")!r})
train(run, make_loop(run.tokens), until=3)
train(RunFolder.reopen(run.path), make_loop(run.tokens), until=6)
print(*({{"torch._dynamo", "sympy", "triton"}} & set(sys.modules)))
"""
    assert python(code).strip() == ""
