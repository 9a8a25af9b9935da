"""Mutable state of the process: every place that a call may change is in the table, with the reason why it is safe.

A new `global` statement, a module-level container or object that a function changes, a cache, or a `static` of C++ that
is not constant fails here until it is reviewed.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "engine", "api")
CHANGES = re.compile("add|append|clear|discard|extend|insert|pop|popitem|register|remove|setdefault|update")

IMPORT = "filled while modules are imported, under the lock of the import"
CONSTANT = "its result depends on its arguments and the machine only; two threads compute the same one"
THREAD = "one value for each thread"

REVIEWED = {
    "kernels/core/autograd.py _buffers": THREAD,
    "kernels/core/backends.py _forced": THREAD,
    "kernels/core/recording.py _recorder": THREAD,
    "kernels/core/seeds.py _source": THREAD,
    "kernels/gpu/gemm/mlp.py _strategy": THREAD,
    "kernels/cpu/ext.py _workspaces": THREAD,
    "kernels/core/dispatch.py OPS": IMPORT,
    "kernels/core/flops.py _formulas": IMPORT,
    "engine/model/plain.py FORWARDS": IMPORT,
    "engine/model/plain.py PARAMETERS": IMPORT,
    "engine/settings/setting.py settings_of": CONSTANT,
    "engine/training/run_settings.py _settings": CONSTANT,
    "engine/training/run_settings.py sections_of": CONSTANT,
    "engine/inference/text_stream.py _shorter_matches": CONSTANT,
    "engine/inference/executor.py _idle_executors": "dict.pop is atomic: one thread gets the executor",
    "api/dropin/class_swap.py _subclass": "a race makes two equal classes, and each model keeps its own",
    "engine/data/template_process.py Generation.tags": "Jinja only reads it",
    "engine/data/template_process.py compile_template": "the process has one thread",
    "kernels/core/autograd.py _takes_into": CONSTANT,
    "kernels/core/backends.py module_names": CONSTANT,
    "kernels/core/backends.py load": CONSTANT,
    "kernels/core/backends.py _modules": CONSTANT,
    "kernels/cpu/memory.py keep_pages": "malloc has one setting for the process, and it is only ever turned on",
    "kernels/cpu/sources.py missing": CONSTANT,
    "kernels/cpu/sources.py objection": CONSTANT,
    "kernels/gpu/attention/attention.py _cache_bytes": CONSTANT,
    "kernels/gpu/interpreter.py patch": "runs during an import",
    "kernels/gpu/launch.py _arch": CONSTANT,
    "kernels/gpu/launch.py _processors": CONSTANT,
    "kernels/hardware/device.py _describe": CONSTANT,
    "kernels/hardware/measured_peaks.py _flops": "a measurement; a race measures twice",
    "kernels/hardware/measured_peaks.py _measure": "a measurement; a race measures twice",
    "csrc/base/isa.h slot": "atomic; a limit for tests, and all instruction sets are correct",
    "csrc/base/memory.cpp memory": THREAD,
    "csrc/base/parallel.cpp state": "random delays of the tests",
    "csrc/base/parallel.cpp threads": "random delays of the tests",
    "csrc/base/parallel.h member": THREAD,
    "csrc/python/tape.h tape": THREAD,
}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]


def root_name(node):
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def changed_names(function):
    """Names whose value a function changes: assigned items and attributes, mutating methods, `global`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Global):
            yield from node.names
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and CHANGES.fullmatch(node.func.attr):
            yield root_name(node.func.value)
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
        targets = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else targets
        yield from (root_name(t) for t in targets if isinstance(t, (ast.Subscript, ast.Attribute)))


def assigned(body):
    """Names that statements assign, with their values."""
    for node in body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        yield from ((t.id, node.value) for t in targets if isinstance(t, ast.Name))


def python_state(source):
    """Names of the mutable state of a module."""
    tree = ast.parse(source)
    own = dict(assigned(tree.body))
    for function in functions(tree):
        yield from (name for name in changed_names(function) if name in own)
        for decorator in getattr(function, "decorator_list", ()):
            if re.search(r"\b(lru_)?cache\b(?!d_property)", ast.unparse(decorator).split("(")[0]):
                yield function.name
    yield from (
        name for name, value in own.items() if value and re.match(r"ThreadState|threading\.", ast.unparse(value))
    )
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for name, value in assigned(node.body):
            if isinstance(value, (ast.Dict, ast.List, ast.Set)):
                yield f"{node.name}.{name}"


def cpp_state(source):
    """Names of static variables that are not constant."""
    code = re.sub(r"//.*", "", source)
    found = re.findall(r"\bstatic\s+((?:thread_local\s+)?[^;(){}=]*?)\b(\w+)\s*[;={]", code)
    return [
        name for kind, name in found if not re.search(r"\bconst(expr)?\s*$|^const\s[^*]*$|constexpr|\*\s*const", kind)
    ]


def state():
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for name in dict.fromkeys(python_state(file.read_text())):
                yield f"{file.relative_to(ROOT)} {name}"
    for file in sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]):
        for name in cpp_state(file.read_text()):
            yield f"{file.relative_to(ROOT)} {name}"


def test_every_mutable_state_of_the_process_is_reviewed():
    assert sorted(state()) == sorted(REVIEWED)


@pytest.mark.parametrize(
    "code",
    [
        "x = None\ndef f():\n    global x\n    x = 1",
        "x = {}\ndef f():\n    x[1] = 2",
        "x = []\ndef f():\n    x.append(1)",
        "x = Thing()\ndef f():\n    x.field = 1",
        "import functools\n@functools.lru_cache(maxsize=None)\ndef x(): ...",
        "class C:\n    x = []",
        "import threading\nx = threading.local()",
    ],
)
def test_the_search_finds_every_kind_of_state(code):
    assert [name.removeprefix("C.") for name in python_state(code)] == ["x"]


@pytest.mark.parametrize(
    "code",
    ["static int x = 0;", "static std::atomic<int> x{1};", "static thread_local Memory x;", "static const T* x = y;"],
)
def test_the_search_finds_static_variables_of_cpp(code):
    assert cpp_state(code) == ["x"] and cpp_state(f"// {code}") == []
