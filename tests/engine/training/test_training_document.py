"""The tables of docs/training.md and docs/finetuning.md are those of the declarations.

`python tests/engine/training/test_training_document.py` writes them.
"""

import re
from functools import partial
from pathlib import Path

import pytest
from sft_data import checkpoint

from peakgpt.engine.finetuning import synonyms as finetuning
from peakgpt.engine.finetuning.config import TASK_DEFAULTS, FinetuneConfig
from peakgpt.engine.settings.values import show
from peakgpt.engine.training.run_config import RunConfig, run_settings
from peakgpt.engine.training.run_file import read_config_file, recipe_names
from peakgpt.engine.training.synonyms import PROGRAMS, SYNONYMS

DOCUMENTS = Path(__file__).parents[3] / "docs"


def row(*cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def header(*cells):
    return [row(*cells), row(*("---" for _ in cells))]


def keys(settings):
    """A table for each section, in the order of config.toml."""
    lines, section = [], None
    for setting in settings:
        if setting.section != section:
            section = setting.section
            lines += ["", f"`[{section}]`", "", *header("key", "default", "meaning")]
        default = setting.automatic or f"`{show(setting.default)}`"
        note = " (may change with `--resume`)" if setting.resumable else ""
        choices = f"; one of {', '.join(setting.choices)}" if setting.choices and len(setting.choices) < 9 else ""
        lines.append(row(f"`{setting.name}`", default, f"{setting.help}{choices}{note}"))
    return lines[1:]


def own_keys():
    return keys(s for name, s in FinetuneConfig.settings().items() if s != run_settings().get(name))


def recipes(kind):
    lines = header("recipe", "source")
    for name in recipe_names(kind):
        comment = re.match(r"(?:# .*\n)+", (kind.RECIPES / f"{name}.toml").read_text())[0]
        lines.append(row(f"`{name}`", re.sub(r"\s*\n?# ", " ", comment).strip()))
    return lines


def names(programs, table):
    lines = header("peakgpt", *programs)
    for ours, theirs in table.items():
        lines.append(row(f"`{ours}`", *(", ".join(f"`{name}`" for name in other.split()) for other in theirs)))
    return lines


def task_defaults():
    lines = header("task", "values")
    for task, values in TASK_DEFAULTS.items():
        lines.append(row(f"`{task}`", ", ".join(f"`{name} = {show(value)}`" for name, value in values.items())))
    return lines


# Name of a block -> its document, and its lines.
TABLES = {
    "keys": ("training.md", lambda: keys(run_settings().values())),
    "recipes": ("training.md", partial(recipes, RunConfig)),
    "names": ("training.md", partial(names, PROGRAMS, SYNONYMS)),
    "finetuning keys": ("finetuning.md", own_keys),
    "finetuning recipes": ("finetuning.md", partial(recipes, FinetuneConfig)),
    "finetuning names": ("finetuning.md", partial(names, finetuning.PROGRAMS, finetuning.SYNONYMS)),
    "task defaults": ("finetuning.md", task_defaults),
}


def block(name, text):
    return re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- end of {name} -->", text, re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_the_declarations(name):
    document, lines = TABLES[name]
    found = block(name, (DOCUMENTS / document).read_text())[1]
    assert found == "\n".join(lines()), f"run {Path(__file__).name}"


@pytest.mark.parametrize("name", recipe_names(FinetuneConfig))
def test_a_recipe_of_fine_tuning_is_a_config(name, tmp_path):
    values = read_config_file(name, FinetuneConfig)
    config = FinetuneConfig.of({**values, "init": checkpoint(tmp_path), "data": ("data.jsonl",)})
    assert {key: config.values()[key] for key in values} == values


if __name__ == "__main__":
    for name, (document, lines) in TABLES.items():
        text = (DOCUMENTS / document).read_text()
        start, end = block(name, text).span(1)
        new = "\n".join(lines()) + ("" if text[end] == "\n" else "\n")
        (DOCUMENTS / document).write_text(text[:start] + new + text[end:])
