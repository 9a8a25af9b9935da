"""The import graph: no import circles, and imports point downward only.

All imports count, also those under TYPE_CHECKING and inside functions.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"kernels": "peakgpt.kernels", "engine": "peakgpt.engine", "bench": "peakgpt.bench", "api": "peakgpt"}
EXTENSION = "peakgpt._C"
# From the lowest layer up. A module imports from its own package and from lower layers. Packages in one row do not
# import each other. A module belongs to the longest package name that contains it.
LAYERS = (
    ("peakgpt.kernels.files", "peakgpt.kernels.command_line", "peakgpt.kernels.strict_json"),
    ("peakgpt.kernels.cpu.sources", "peakgpt.kernels.hardware.cpu_threads"),
    ("peakgpt.kernels.cpu.ext",),
    ("peakgpt.kernels.hardware",),
    ("peakgpt.kernels.core",),
    ("peakgpt.kernels.ops",),
    ("peakgpt.kernels.cpu", "peakgpt.kernels.gpu"),
    ("peakgpt.kernels",),
    ("peakgpt.engine.settings",),
    ("peakgpt.engine.data", "peakgpt.engine.graph_capture", "peakgpt.engine.graph_dry_run"),
    ("peakgpt.engine.model",),
    ("peakgpt.engine.checkpoint",),
    ("peakgpt.engine.training", "peakgpt.engine.inference"),
    ("peakgpt.engine.evaluation",),
    ("peakgpt.engine",),
    ("peakgpt.engine.finetuning",),
    ("peakgpt.dropin",),
    ("peakgpt.bench",),
    ("peakgpt",),
)
# Only these packages import the C++ extension. Others get it from kernels.cpu.ext, which checks that it is up to date.
EXTENSION_USERS = ("peakgpt.kernels.cpu",)


def modules(root: Path) -> dict[str, Path]:
    """Return module name -> file for all Python files of the packages below root."""
    files = {}
    for folder, package in PACKAGES.items():
        for file in (root / folder).rglob("*.py"):
            parts = file.relative_to(root / folder).with_suffix("").parts
            files[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = file
    return files


def imports_of(source: str, name: str, known: set[str]) -> set[str]:
    """Return the modules in `known`, and the extension, that a module's source imports."""
    targets = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import in line {node.lineno}, expected an absolute one"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                targets.add(full if full in known or full == EXTENSION else node.module)
    return (targets & (known | {EXTENSION})) - {name}


def import_graph(root: Path) -> dict[str, set[str]]:
    files = modules(root)
    return {name: imports_of(file.read_text(), name, set(files)) for name, file in files.items()}


def import_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components with more than one module (Tarjan 1972)."""
    index, low, stack, components = {}, {}, [], []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph.get(name, ())):
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            start = stack.index(name)
            components.append(sorted(stack[start:]))
            del stack[start:]

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return [component for component in components if len(component) > 1]


def layer_of(name: str) -> tuple[int, str]:
    """Return the row of a module in LAYERS, and its package in that row."""
    rows = ((level, package) for level, row in enumerate(LAYERS) for package in row)
    return max((row for row in rows if f"{name}.".startswith(f"{row[1]}.")), key=lambda row: len(row[1]))


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return a line for each import that points neither to the module's own package nor to a lower layer."""
    wrong = []
    for name, targets in sorted(graph.items()):
        level, package = layer_of(name)
        for target in sorted(targets):
            if target == EXTENSION:
                allowed = any(f"{name}.".startswith(f"{user}.") for user in EXTENSION_USERS)
            else:
                target_level, target_package = layer_of(target)
                allowed = target_package == package or target_level < level
            if not allowed:
                wrong.append(f"{name} imports {target}")
    return wrong


@pytest.fixture(scope="module")
def graph():
    return import_graph(ROOT)


def test_import_graph_has_no_circles(graph):
    circles = import_circles(graph)
    assert not circles, "import circles:\n" + "\n".join(" <-> ".join(circle) for circle in circles)


def test_imports_point_to_lower_layers_only(graph):
    assert not (wrong := upward_imports(graph)), "imports upward or sideways:\n" + "\n".join(wrong)


def test_type_only_and_late_imports_count():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from peakgpt.engine import gpt
def late():
    import peakgpt.bench.ops
    from peakgpt import _C
"""
    known = {"peakgpt.engine", "peakgpt.engine.gpt", "peakgpt.bench.ops", "peakgpt"}
    expected = {"peakgpt.engine.gpt", "peakgpt.bench.ops", EXTENSION}
    assert imports_of(source, "peakgpt.kernels.cpu.gemm", known) == expected


def test_import_circles_and_upward_imports_are_reported():
    """A circle of three modules, which another module imports, and each kind of invalid import."""
    graph_with_circle = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "user": {"a"}}
    assert import_circles(graph_with_circle) == [["a", "b", "c"]]
    graph_with_upward_imports = {
        "peakgpt.kernels.core.dispatch": {"peakgpt.kernels.ops.mlp"},  # upward
        "peakgpt.kernels.cpu.mlp": {"peakgpt.kernels.gpu.launch", EXTENSION, "peakgpt.kernels.core.check"},  # sideways
        "peakgpt.engine.model.block": {EXTENSION, "peakgpt.kernels.ops.mlp"},
        "peakgpt.cli": {"peakgpt.bench.ops"},
    }
    assert upward_imports(graph_with_upward_imports) == [
        "peakgpt.engine.model.block imports peakgpt._C",
        "peakgpt.kernels.core.dispatch imports peakgpt.kernels.ops.mlp",
        "peakgpt.kernels.cpu.mlp imports peakgpt.kernels.gpu.launch",
    ]
