"""`read_text` reads files and pipes, and refuses in one sentence what would never end."""

import os
import threading
from pathlib import Path

import pytest

from peakgpt.engine.checkpoint.folder import read_json
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.text_file import read_text
from peakgpt.engine.inference.prompt_file import read_prompt


def test_a_file_and_a_pipe_are_read_to_the_end(tmp_path):
    text = "naïve\ntext\n" * 9000  # longer than the buffer of a pipe
    (tmp_path / "file").write_text(text, encoding="utf-8")
    assert read_text(tmp_path / "file") == text
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,), kwargs={"encoding": "utf-8"})
    writer.start()
    while True:  # until the writer has opened the pipe
        try:
            assert read_text(tmp_path / "pipe") == text
            break
        except ValueError as error:
            assert "no process writes to" in str(error)
    writer.join()


def test_what_never_ends_or_is_no_text_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path, expected in {
        tmp_path / "pipe": "got a pipe that no process writes to",
        "/dev/zero": "got a folder or a device",
        tmp_path: "got a folder or a device|Is a directory",
        tmp_path / "binary": "expected UTF-8",
        tmp_path / "missing": "No such file",
        os.fsdecode(os.fsencode(tmp_path) + b"/\xff"): "No such file",
    }.items():
        with pytest.raises(ValueError, match=expected):
            read_text(path)


@pytest.mark.parametrize("read", [read_text, read_json, read_prompt, lambda path: load_corpus([path])],
                         ids=["text", "JSON", "prompt", "corpus"])  # fmt: skip
def test_every_reader_of_a_named_file_refuses_what_never_ends(read, tmp_path):
    """Regression: only `score` and `quantize` did; `train` and `generate --file` waited or took all memory."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", os.fsdecode(os.fsencode(tmp_path) + b"/\xff")):
        with pytest.raises(ValueError, match=r"expected a (text )?file"):
            read(Path(path))
