"""Check that an installed wheel has all modules of the tree. Run outside of the tree: smoke.py VENV TREE."""

import sys
from pathlib import Path

import peakgpt
import peakgpt._C

venv, tree = map(Path, sys.argv[1:])
installed = Path(peakgpt.__file__).parent
assert installed.is_relative_to(venv), f"imported {installed}, not the wheel in {venv}"
assert Path(peakgpt._C.__file__).parent == installed

folders = {"api": ".", "kernels": "kernels", "engine": "engine", "bench": "bench"}
expected = {
    str(Path(home, path.relative_to(tree / folder)))
    for folder, home in folders.items()
    for path in (tree / folder).rglob("*.py")
    if "test_speed" not in path.parts  # runs from a checkout only
}
found = {str(path.relative_to(installed)) for path in installed.rglob("*.py")}
assert found == expected, f"wheel and tree differ: {sorted(found ^ expected)}"
