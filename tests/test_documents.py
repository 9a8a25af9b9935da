"""The documents are true: their code runs as printed, and their commands, links and file names exist."""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from peakgpt.bench.command import BENCHES
from peakgpt.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "AGENTS.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md")))]
GUIDE = "CONTRIBUTING.md"
SOURCES = ("api", "bench", "csrc", "engine", "kernels", "tests", "README.md", "pyproject.toml", "setup.py")


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def python(*arguments, cwd, **environment):
    """Run a new interpreter and return what it prints."""
    environment = os.environ | environment
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_readme_python_runs(tmp_path):
    """All blocks as one program, with two layers of GPT-2 instead of twelve."""
    code = "\n".join(blocks("README.md", "python"))
    shown, quick = 'from_preset("gpt2")', 'from_preset("gpt2", n_layer=2)'
    assert shown in code
    assert "backends in order" in python("-c", code.replace(shown, quick), cwd=tmp_path)
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()


def follow_guide(root):
    """Copy the repository to `root` and follow the section "Add an op" there. Only changed C++ files are compiled."""
    objects = f"build/{sysconfig.get_config_var('SOABI')}"  # where setup.py keeps object files
    for name in (*SOURCES, *([objects] if (ROOT / objects).exists() else ())):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, root / name)
    section = (ROOT / GUIDE).read_text().split("\n## Add an op\n")[1].split("\n## ")[0]
    steps = re.findall(r"(Create|Add\s+to)\s+`([^`]+)`:\n\n```\w+\n(.*?)```", section, re.DOTALL)
    assert len(steps) == len(re.findall(r"^```(?!sh)\w", section, re.MULTILINE)), "a block without a file name"
    for verb, path, text in steps:
        if verb == "Create":
            assert not (root / path).exists(), f"{GUIDE} creates {path}, which exists"
            (root / path).write_text(text)
        else:
            insert(root / path, text)
    compiler = {}
    if (ninja := root / objects / "build.ninja").exists():  # another compiler would compile all files
        compiler["CXX"] = re.search(r"command = (.*?) -fPIC", ninja.read_text())[1]
    python("setup.py", "-q", "build_ext", "--inplace", cwd=root, PEAKGPT_REQUIRE_EXT="1", **compiler)
    package = root / "site" / "peakgpt"
    package.mkdir(parents=True)
    for path in (*(root / "api").iterdir(), root / "kernels", root / "engine", root / "bench"):
        (package / path.name).symlink_to(path)


def insert(file, diff):
    """Insert each line marked "+" after the unmarked line above it, which must occur once in the file."""
    lines, position = file.read_text().split("\n"), None
    for mark, line in ((line[0], line[1:]) for line in diff.rstrip("\n").split("\n")):
        if mark == "+":
            position += 1
            lines.insert(position, line)
        else:
            assert lines.count(line) == 1, f"{GUIDE}: {line!r} occurs {lines.count(line)} times in {file.name}"
            position = lines.index(line)
    file.write_text("\n".join(lines))


def test_guide_to_add_an_op_passes_the_op_tests_and_the_static_check(tmp_path):
    """Values, gradients, autocast, opcheck, compilation and cost, with the C++ backend and the Triton backend."""
    follow_guide(tmp_path)
    paths = {"PYTHONPATH": str(tmp_path / "site")}
    imported = python("-c", "import peakgpt.kernels as package; print(package.__file__)", cwd=tmp_path, **paths)
    assert Path(imported.strip()).is_relative_to(tmp_path)
    tests = ("tests/kernels/ops/test_ops.py", "tests/kernels/ops/test_op_types.py")
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "squared_relu or every_op_has")
    output = python("-m", "pytest", *options, *tests, cwd=tmp_path, **paths)
    assert int(re.search(r"(\d+) passed", output)[1]) > 20 and "skipped" not in output, output
    check = ("-m", "peakgpt.kernels.gpu.static_check", "--op", "squared_relu", "--target", "sm_90")
    assert "squared_relu_bwd" in python(*check, cwd=tmp_path, **paths)


def prose(name):
    """The text of a document without its fenced code, except shell commands."""
    return re.sub(r"```(?!sh).*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)


def options(parser):
    """The options of a parser and of its subparsers."""
    names = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names = names.union(*map(options, action.choices.values()))
    return names


@pytest.mark.parametrize("name", DOCUMENTS)
def test_command_line_options_exist(name):
    for command, rest in re.findall(r"(?:^ *|`)(?:[A-Z_]+=\S+ )?peakgpt ([a-z]+)([^`\n#]*)", prose(name), re.MULTILINE):
        assert command in COMMANDS, command
        parser = argparse.ArgumentParser()
        importlib.import_module(f"peakgpt.commands.{command}").add_arguments(parser)
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= options(parser), rest
        if command == "bench" and (bench := re.match(r" ([a-z]\w*)", rest)):
            assert bench[1] in BENCHES, rest


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_and_links_exist(name):
    text = prose(name)
    targets = re.findall(r"^([\w.\-]+)[\w .\-]*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^ *|`)make ([\w-]+)", text, re.MULTILINE):
        assert target in targets, target
    for link in re.findall(r"\]\(([^)#:]+)", text):
        assert ((ROOT / name).parent / link).exists(), link
    assert name != "AGENTS.md" or len(text.splitlines()) <= 80


def test_results_in_documents_exist_and_were_measured_at_known_commits():
    """A figure that cites a file or a commit that nobody has cannot be checked."""
    folder = ROOT / "bench" / "results"
    for name in (*DOCUMENTS, "CHANGELOG.md"):
        for file in re.findall(r"[a-z-]+-(?:cpu|cuda)-\d{8}-\d{6}\.json", (ROOT / name).read_text()):
            assert (folder / file).is_file(), f"{name} cites {file}"
    if not (ROOT / ".git").exists() or git("rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("no complete git history")
    for path in folder.glob("*.json"):
        commit = re.search(r'"commit": "(\w+)', path.read_text())[1]
        assert git("cat-file", "-t", commit) == "commit", f"{path.name}: {commit}"


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()


def missing_files(text, folder):
    """Return the names of the form folder/file.ext that exist neither below the repository root nor below `folder`.

    Names with a placeholder or a glob, such as "kernels/ops/<op>.py", "docs/*.md" and "runs/.../log.txt", are ignored.
    """
    names = re.findall(r"(?<![\w./<>*-])(?:[\w.-]+/)+[\w.-]+\.(?:py|md|h|cpp|json|txt|html|toml)\b", text)
    return sorted(n for n in set(names) if "..." not in n and not any((base / n).exists() for base in (ROOT, folder)))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_file_names_exist(name):
    text = re.sub(r"Create\s+`[^`]+`", "", prose(name))  # files that the guide creates do not exist yet
    assert missing_files(text, (ROOT / name).parent) == []


@pytest.mark.parametrize("name", ["AGENTS.md", "docs/architecture.md"])
def test_file_names_without_a_folder_exist_somewhere(name):
    names = set(re.findall(r"(?<![\w./>])[\w-]+\.(?:py|cpp|h)\b", prose(name)))
    files = {path.name for folder in SOURCES for path in (ROOT / folder).rglob("*")}
    assert names - files - set(SOURCES) == set()


def test_a_missing_file_is_reported():
    text = "kernels/core/dispatch.py, `engine/nothing.py`, docs/*.md, kernels/ops/<op>.py, runs/.../log.txt, a/b/c.json"
    assert missing_files(text, ROOT) == ["a/b/c.json", "engine/nothing.py"]
