"""`read_text` and `load_corpus` read files and pipes, and refuse in one sentence what would never end."""

import os
import threading

import pytest

from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.text_file import read_text


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
        if path not in (tmp_path, tmp_path / "binary"):  # a corpus searches folders, and has its own words for bytes
            with pytest.raises(ValueError, match=expected):
                load_corpus([path])
