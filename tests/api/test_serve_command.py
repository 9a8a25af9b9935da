"""peakgpt serve on the command line: a wrong flag is one sentence before the model is loaded, and no key is lost."""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import serving  # skips all where the packages of peakgpt[serve] are missing

from peakgpt.cli import main
from peakgpt.commands import serve

SECRET = "SECRET-1234"


class LoadedError(Exception):
    """The model was loaded."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = serving.tiny_tokenizer()
    serving.tiny_model(tokenizer).save_pretrained(folder / "model", tokenizer)
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Run the command up to the point where it loads the model; return exit code and standard error."""
    monkeypatch.delenv(serve.KEY, raising=False)

    def load(*_, **__):
        raise LoadedError

    monkeypatch.setattr(serve.Tokenizer, "load", load)
    monkeypatch.setattr(serve.GPT, "from_pretrained", load)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)

    def run(*arguments):
        try:
            code = main(["serve", str(folder / "model"), *map(str, arguments)])
        except LoadedError:
            code = "loaded"
        return code, capsys.readouterr().err

    return run


def assert_refused(answer, *words):
    code, text = answer
    assert code == 2 and text.startswith("peakgpt: error: ") and text.count("\n") == 1 and len(text) < 500, text
    assert all(word in text for word in words) and SECRET not in text, text


def numeric_flags():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return [action.option_strings[0] for action in parser._actions if action.type not in (None, Path)]


NUMBERS = [
    "-1",
    "1e30",
    "nan",
    "inf",
    "text",
    "",
    " ",
    "1.5",
    "0x10",
    "1" * 30,
    "1" * 5000,
    "-0.0",
    "٣x",
    "99999999999",
]


def test_there_are_numeric_flags():
    assert numeric_flags() == ["--port", "--blocks"]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: value[:12])
@pytest.mark.parametrize("flag", numeric_flags())
def test_wrong_numbers_are_one_sentence_before_loading(run, flag, value):
    assert_refused(run(f"{flag}={value}"), flag, "expected an integer from")


@pytest.mark.parametrize(("flags", "words"), [
    (("--port", 65536), "0 to 65535"), (("--port", 99999), "0 to 65535"), (("--blocks", 0), "1 to"),
    (("--blocks", -5), "1 to"), (("--blocks", 2**31 - 1), "all memory of this machine"),
    (("--host", "no.such.host.invalid"), "--host"), (("--host", ""), "--host"), (("--host", " "), "--host"),
    (("--host", "a" * 300), "--host"), (("--host", ".."), "--host"), (("--host", "192.0.2.1"), "API key"),
    (("--host", "::"), "API key"), (("--host", "0.0.0.0"), "API key"), (("--device", "tpu"), "device"),
    (("--device", "cuda:99"), "device"), (("--device", ""), ""), (("--dtype", "int8"), "--dtype"),
    (("--kv-cache-dtype", "x"), "--kv-cache-dtype"), (("--po", "1"), "--po"), (("extra",), "extra"),
], ids=str)  # fmt: skip
def test_wrong_flags_are_one_sentence_before_loading(run, flags, words):
    if flags == ("--device", ""):
        assert run(*flags)[0] == "loaded"  # the default
    else:
        assert_refused(run(*flags), words)


def test_missing_checkpoint_is_one_sentence(run, tmp_path, capsys):
    for arguments in (["serve", str(tmp_path), "--blocks", "5"], ["serve", str(tmp_path / "nothing"), "--blocks", "5"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.0.0.2"])
def test_port_in_use_is_one_sentence_before_loading(run, host):
    with socket.create_server((host.lower(), 0)) as used:
        assert_refused(run("--host", host, "--port", used.getsockname()[1]), "in use", "expected a free port")
    assert run("--host", host, "--port", 0)[0] == "loaded"


def test_foreign_address_is_one_sentence(run):
    code, text = run("--host", "192.0.2.1", "--api-key", SECRET)
    assert_refused((code, text.splitlines(keepends=True)[-1]), "192.0.2.1")  # after the warning


KEY_FILES = {
    "empty": b"", "blank": b" ", "newlines": b"\n\n\r\n", "tabs": b"\t \n", "BOM": b"\xef\xbb\xbf\n", "NUL": b"\0",
    "latin": SECRET.encode() + b"\xe9\n", "utf-8": (SECRET + "é").encode(), "control": SECRET.encode() + b"\x01",
    "huge": SECRET.encode() * 10_000, "nbsp": "\u00a0".encode(),
}  # fmt: skip


@pytest.mark.parametrize("environment", [None, SECRET, ""])
@pytest.mark.parametrize("name", KEY_FILES)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_file_without_a_key_never_starts_a_server(run, tmp_path, monkeypatch, name, environment, host):
    if environment is not None:
        monkeypatch.setenv(serve.KEY, environment)
    (tmp_path / "key").write_bytes(KEY_FILES[name])
    assert_refused(run("--host", host, "--port", 0, "--api-key-file", tmp_path / "key"), "API key", "expected")


@pytest.mark.parametrize("value", ["", " ", "\n", "\t", "é", "a\x01"])
def test_blank_keys_in_environment_and_flag_never_start_a_server(run, monkeypatch, value):
    code, text = run("--api-key", value)
    assert_refused((code, text.splitlines(keepends=True)[-1]), "--api-key: got", "expected")
    monkeypatch.setenv(serve.KEY, value)
    assert_refused(run(), f"${serve.KEY}: got", "expected")


def test_unreadable_key_files_are_one_sentence(run, tmp_path):
    for path in (tmp_path, tmp_path / SECRET[:3], tmp_path / "x" / "y"):
        assert_refused(run("--api-key-file", path))


FLAGS = ("--api-key={}", "--api-k {}", "--api {}", "--api-key-fil {}", "--apikey={}", "--key={}", "--API-KEY={}",
         "--api_key={}", "--api-key-file={}", "--token {}")  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_no_message_shows_a_key(run, flag):
    """An abbreviated or misspelt flag must not be taken for another one that prints its value."""
    code, text = run(*flag.format(SECRET).split(" "), "--port", "99999")
    assert code == 2 and SECRET not in text


@pytest.mark.parametrize(("text", "keys"), [
    (b"one", ["one"]), (b"  one \r\n", ["one"]), (b"one\ntwo words\n\n three\n", ["one", "two words", "three"]),
    (b"\xef\xbb\xbfone\n", ["one"]), (b"one\r\ntwo", ["one", "two"]),
])  # fmt: skip
def test_keys_of_a_file_come_without_blanks_around_them(tmp_path, text, keys):
    (tmp_path / "key").write_bytes(text)
    arguments = argparse.Namespace(api_key_file=tmp_path / "key", api_key=None)
    assert serve._keys(arguments) == keys


def test_keys_of_flags_count_together_and_before_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(serve.KEY, " env ")
    (tmp_path / "key").write_text("file")
    keys = lambda file, flag: serve._keys(argparse.Namespace(api_key_file=file, api_key=flag))  # noqa: E731
    assert keys(None, None) == ["env"] and keys(tmp_path / "key", None) == ["file"]
    assert keys(tmp_path / "key", ["flag"]) == ["file", "flag"]
    assert "--api-key can be read in the process list" in capsys.readouterr().err
    monkeypatch.delenv(serve.KEY)
    assert keys(None, None) is None


# The engine's thread ends by an exception that no request isolation catches.
DYING = """
import sys
from peakgpt.cli import main
from peakgpt.engine.inference.engine import Engine
def step(self): raise SystemExit
Engine.step = step
sys.exit(main(["serve", sys.argv[1], "--port", "0", "--dtype", "float32", "--device", "cpu", "--api-key", "k"]))
"""


def test_process_exits_with_status_1_after_the_engine_thread_has_ended(folder):
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", DYING, str(folder / "model")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            port = int(process.stdout.readline().rsplit(":", 1)[1])
            sent = serving.posted({"prompt": "x"}).replace(b"host:", b"authorization: Bearer k\r\nhost:")
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(sent)
                assert connection.recv(4096).startswith(b"HTTP/1.1 503 ")
            assert process.wait(30) == 1
        finally:
            process.kill()
