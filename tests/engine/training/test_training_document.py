"""The tables of docs/training.md are those of the declarations.

`python tests/engine/training/test_training_document.py` writes them.
"""

import re
from pathlib import Path

import pytest

from peakgpt.engine.settings.values import show
from peakgpt.engine.training.run_config import RunConfig, run_settings
from peakgpt.engine.training.run_file import recipe_names
from peakgpt.engine.training.synonyms import PROGRAMS, SYNONYMS

DOCUMENT = Path(__file__).parents[3] / "docs" / "training.md"


def row(*cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def header(*cells):
    return [row(*cells), row(*("---" for _ in cells))]


def keys():
    """A table for each section, in the order of config.toml."""
    lines, section = [], None
    for setting in run_settings().values():
        if setting.section != section:
            section = setting.section
            lines += ["", f"`[{section}]`", "", *header("key", "default", "meaning")]
        default = setting.automatic or f"`{show(setting.default)}`"
        note = " (may change with `--resume`)" if setting.resumable else ""
        choices = f"; one of {', '.join(setting.choices)}" if setting.choices and len(setting.choices) < 9 else ""
        lines.append(row(f"`{setting.name}`", default, f"{setting.help}{choices}{note}"))
    return lines[1:]


def recipes():
    lines = header("recipe", "source")
    for name in recipe_names():
        comment = re.match(r"(?:# .*\n)+", (RunConfig.RECIPES / f"{name}.toml").read_text())[0]
        lines.append(row(f"`{name}`", re.sub(r"\s*\n?# ", " ", comment).strip()))
    return lines


def names():
    lines = header("peakgpt", *PROGRAMS)
    for ours, theirs in SYNONYMS.items():
        lines.append(row(f"`{ours}`", *(", ".join(f"`{name}`" for name in other.split()) for other in theirs)))
    return lines


TABLES = {"keys": keys, "recipes": recipes, "names": names}


def block(name, text):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_the_declarations(name):
    assert block(name, DOCUMENT.read_text())[1] == "\n".join(TABLES[name]()), f"run {Path(__file__).name}"


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    for name, table in TABLES.items():
        start, end = block(name, text).span(1)
        text = text[:start] + "\n".join(table()) + text[end:]
    DOCUMENT.write_text(text)
