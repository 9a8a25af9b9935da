"""The documents are true: their code runs as printed, and their commands, links and file names exist."""

import argparse
import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import fixed_peaks
import pytest
import torch

from peakgpt.bench import command as bench
from peakgpt.bench.chosen_runs import DIRTY, History
from peakgpt.bench.command import BENCHES, TOOLS
from peakgpt.bench.readme import written_documents
from peakgpt.bench.schema import read_results
from peakgpt.cli import COMMANDS, main
from peakgpt.commands import quickstart, serve
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.command_line import Parser

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
    """All blocks as one program, with a small GPT-2 and peaks that are not measured."""
    code = "\n".join(blocks("README.md", "python"))
    shown, quick = 'from_preset("gpt2")', 'from_preset("gpt2", n_layer=2, n_embd=96, n_head=2)'
    assert shown in code
    program = f"import fixed_peaks; fixed_peaks.use()\n{code.replace(shown, quick)}"
    helpers = Path(fixed_peaks.__file__).parent
    assert "backends in order" in python("-c", program, cwd=tmp_path, PYTHONPATH=str(helpers))
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


@pytest.mark.slow
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
            assert bench[1] in {*BENCHES, *TOOLS}, rest


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
    history = complete_history()
    for path in folder.glob("*.json"):
        commit = read_results(path)[1]["commit"].removesuffix(DIRTY)
        assert history.find(commit), f"{path.name}: commit {commit} is not in the history"


def test_tables_of_results_are_what_bench_readme_writes():
    """Fails if a row is edited by hand, or if results were added and the tables are not written anew."""
    complete_history()
    for path, text in written_documents(ROOT).items():
        assert path.read_text() == text, f"{path.name}: run `peakgpt bench readme`"


def complete_history():
    try:
        return History.of(ROOT)
    except ValueError as error:
        pytest.skip(str(error))


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


# What stands for a value in a documented command -> what the test puts there.
FILLED = {"FILE...": "text", "FILE": "text/a.txt", "CHECKPOINT": "checkpoint", "IN": "checkpoint"}
# The beginning of a documented command -> flags that are appended to make it small.
TINY_OP = "--dtype float32 --seconds 0.01 --contenders peakgpt --out results"
SMALL = {
    "peakgpt doctor": "",
    "peakgpt quickstart": "--minutes 0.001",
    "peakgpt report": "",
    "peakgpt prepare FILE...": "",
    "peakgpt prepare web.jsonl.gz": "",
    "peakgpt prepare shakespeare_char": "",
    "peakgpt train --dataset prepared/web --steps": "--steps 2 --batch 2 --tokens 16",
    "python examples/protein/grammar.py proteins.fasta": "",
    "python examples/protein/grammar.py held_out.fasta": "",
    "peakgpt train --text proteins.fasta": "--steps 2 --batch 2 --tokens 64",
    "peakgpt generate runs/protein": "--max-tokens 2",
    "python examples/protein/residue_perplexity.py": "",
    "peakgpt prepare proteins.fasta": "",
    "peakgpt dedup": "",
    "peakgpt contamination": "",
    "peakgpt train --text": "--steps 2 --batch 2 --tokens 16 --vocab 300",
    "peakgpt train --resume": "",
    "peakgpt train --config tiny": "--steps 2 --batch 2 --tokens 16 --vocab 300",
    "peakgpt finetune --task classification": "--steps 2 --batch 2 --tokens 64",
    "peakgpt predict": "",
    "peakgpt finetune --task sft": "--steps 2 --batch 2",
    "peakgpt finetune --resume": "",
    "peakgpt finetune --config alpaca": "--epochs 0.5 --batch 2 --micro-batch 1",
    "peakgpt finetune --task sft --init CHECKPOINT --data answers.jsonl --lora-rank": "--steps 2 --batch 2 --tokens 64",
    "peakgpt finetune --task sft --init base-q4": "--steps 2 --batch 2 --tokens 64",
    "peakgpt generate runs/adapter": "--max-tokens 2",
    "peakgpt verify": "",
    "peakgpt generate runs/mine": "--max-tokens 2",
    "peakgpt generate runs/sft/checkpoints/best": "--max-tokens 2",
    "peakgpt generate CHECKPOINT": "--max-tokens 2",
    "peakgpt generate model.gguf": "--max-tokens 2",
    "peakgpt quantize": "",
    "peakgpt export": "",
    "peakgpt score": "",
    **{f"peakgpt evaluate --task examples/tasks/{name}": "--limit 2" for name in (
        "arithmetic.jsonl", "boolean_expressions.json", "question_answering.jsonl", "sentiment.jsonl",
        "summarization.jsonl", "translation.jsonl")},
    "peakgpt evaluate --task examples/tasks/sentiment.jsonl runs/mine": "--limit 2 --truncate",  # a context of 16
    "peakgpt evaluate --task examples/tasks/reasoning.jsonl": "--limit 2 --max-tokens 4",
    "peakgpt serve": "--port 0",
    "peakgpt bench packing": "--model gpt2-tiny --batch 1 --tokens 32 --rounds 2",
    "peakgpt bench ops": f"--op rmsnorm --size rows=4 --size width=8 --pass forward {TINY_OP}",
    "peakgpt bench ops --device cpu --op attention": f"--size tokens=8 {TINY_OP}",
    "peakgpt bench ops --device cpu --op adamw": f"--size count=9 {TINY_OP}",
    "peakgpt bench ops --device cpu --op linear_cross_entropy":
        f"--size rows=4 --size width=8 --size vocab=9 {TINY_OP}",
    "peakgpt aot": "--op layernorm --target sm_90",
    "python examples/occupation_bias.py": "",
    "python examples/qlora_memory.py": "--preset gpt2 --layers 1 --rank 2 --tokens 8 --steps 1",
}  # fmt: skip
GPU, LARGE = "needs a GPU; test_bench_device.py runs its parts", "measures models of 124M parameters for minutes"
# The beginning of a documented command -> why this test only parses it.
NOT_RUN = {
    "peakgpt prepare hf:roneneldan/TinyStories": "downloads a data set; tests/engine/data/test_documents.py reads one",
    "peakgpt train --dataset prepared/web prepared/books": "tests/engine/data/test_dataset.py trains on two folders",
    "python -m peakgpt.bench device": GPU,
    "peakgpt bench device": GPU,
    "peakgpt bench fp8": GPU,
    "peakgpt generate openai-community/gpt2": "downloads a model; test_hub.py runs it with a server of this machine",
    "peakgpt bench train": LARGE,
    "peakgpt bench suite": LARGE,
    "peakgpt bench finetune": LARGE,
    "peakgpt bench patch": LARGE,
    "peakgpt bench prefill": LARGE,
    "peakgpt bench gemm": LARGE,
    "peakgpt bench load": LARGE,
    "peakgpt bench decode": LARGE,
    "peakgpt bench serve": LARGE,
    "peakgpt bench neighbours": LARGE,
    "peakgpt bench memory_bound": "its streams are larger than any cache; test_bench_ops.py runs its kernels",
    "peakgpt bench compare": "needs two committed runs; test_compare.py runs it",
    "peakgpt bench readme": "writes into a checkout; a test above compares what it writes",
    "python examples/gpt1_ablation.py": "trains for minutes; test_gpt1_ablation.py runs it at tiny size",
    "peakgpt evaluate --task hellaswag": "downloads a data set; test_harness.py evaluates a local task",
}
SHELL_DOCUMENTS = ["README.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md")))]
COMMAND = re.compile(r"((?:[A-Z_]+=\S+ )*)((?:peakgpt (?=[a-z])|python -m peakgpt|python examples/).*?)(?=  |#|$)")


def commands(name):
    """Yield (environment, command) of each line of the shell blocks and the indented code, its comments included.

    Prose comes after two blanks.
    """
    indented = re.findall(r"^ {4}(?=[A-Z_]+=|peakgpt |python )(.*)", (ROOT / name).read_text(), re.MULTILINE)
    for line in (*"".join(blocks(name, "sh")).splitlines(), *indented):
        for environment, command in COMMAND.findall(line):
            yield dict(part.split("=") for part in environment.split()), command.strip()


def of_prefix(table, command):
    """Return the value of the longest key that the command begins with; None if there is none."""
    return table.get(max((key for key in table if f"{command} ".startswith(f"{key} ")), key=len, default=None))


def test_every_documented_command_is_run_or_has_a_reason():
    found = [command for name in SHELL_DOCUMENTS for _, command in commands(name)]
    assert len(found) >= 40
    for command in found:
        assert (of_prefix(SMALL, command) is None) != (of_prefix(NOT_RUN, command) is None), command
    for key in (*SMALL, *NOT_RUN):
        assert any(of_prefix({key: key}, command) for command in found), f"{key} is not documented any more"


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with what FILLED names; the model, the text and the time of all commands are small."""
    (tmp_path / "text").mkdir()
    text = (ROOT / "docs" / "serving.md").read_text()
    for name, part in {"a.txt": text[:3000], "b.txt": text[3000:12000]}.items():
        (tmp_path / "text" / name).write_text(part)
    lines = "".join(json.dumps({"body": line}) + "\n" for line in text.splitlines() if line)
    (tmp_path / "web.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "shakespeare_char").mkdir()
    for name in ("train.bin", "val.bin"):
        (tmp_path / "shakespeare_char" / name).write_bytes(bytes([7, 0] * 40))
    rows = [{"prompt": f"Count {count}:", "completion": " one two"} for count in range(9)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reviews = [{"text": f"It was {word}.", "label": word} for word in ("good", "bad") * 5]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "shots.json").write_text('{"input": "peakgpt"}')
    (tmp_path / "questions.jsonl").write_text('{"question": "One two three four five six seven eight nine?"}')
    chat = {"prompt": "What is 2 plus 2?", "completion": "4"}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 4)
    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    torch.manual_seed(0)
    tokenizer = train_tokenizer([text], 300)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=1024, vocab_size=tokenizer.vocab_size)
    GPT(config).save_pretrained(tmp_path / "checkpoint", tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "CONFIG", replace(quickstart.CONFIG, batch=2, tokens=32))
    monkeypatch.setattr(quickstart, "MIN_MINUTES", 0.0)
    monkeypatch.setattr(quickstart, "check_minutes", lambda *_: None)
    fixed_peaks.use(monkeypatch)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    if importlib.util.find_spec("uvicorn"):
        import uvicorn

        monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: [s.getsockname() for s in sockets])


def run_command(words):
    """Run the words of a command that begins with "peakgpt" or "python"; return its exit code."""
    if words[0] == "peakgpt":
        return main(words[1:])
    return subprocess.run([sys.executable, str(ROOT / words[1]), *words[2:]]).returncode


@pytest.mark.parametrize("name", [name for name in SHELL_DOCUMENTS if list(commands(name))])
def test_documented_commands_run(name, workspace, monkeypatch):
    """In the order of the document, so that a later command finds the files of an earlier one."""
    for number, (environment, command) in enumerate(commands(name)):
        words = [FILLED.get(word, word) for word in shlex.split(command.replace(" OUT", f" out-{number}"))]
        if (more := of_prefix(SMALL, command)) is None:
            parse(words)
            continue
        if words[1] == "serve":
            pytest.importorskip("uvicorn", reason="the packages of peakgpt[serve] are not installed")
        if words[1] == "export":
            pytest.importorskip("gguf", reason="the package of peakgpt[gguf] is not installed")
        with monkeypatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            assert run_command([*words, *more.split()]) == 0, command


def parse(words):
    """Parse a documented command without running it, to check its flags and their values."""
    if words[1].startswith("examples/"):
        return
    if words[1] == "bench" or words[2] == "peakgpt.bench":
        parser = Parser()
        bench.add_arguments(parser)
        parser.parse_args(words[2 if words[1] == "bench" else 3 :])
