"""The environment of a measurement: device, allocator settings, and the commit of our checkout."""

import json
import subprocess

from peakgpt.bench import environment


def test_environment_has_commit_device_and_malloc_settings(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    monkeypatch.setenv("LD_PRELOAD", "/opt/lib/libjemalloc.so")
    env = environment.environment("cpu", commit="abc")
    assert json.loads(json.dumps(env)) == env
    assert env["commit"] == "abc" and env["clocks"] == {} and env["threads"] >= 1
    assert env["device"]["kind"] == "cpu" and env["device"]["versions"]["torch"]
    assert env["malloc"]["GLIBC_TUNABLES"] == "glibc.malloc.mmap_max=0"
    assert env["malloc"]["LD_PRELOAD"] == "libjemalloc.so"


def test_commit_is_of_the_checkout_that_holds_the_package(tmp_path, monkeypatch):
    """Installed inside another project's checkout, that project's HEAD is not ours."""
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    file = tmp_path / "environment.py"
    file.write_text("")
    monkeypatch.setattr(environment, "__file__", str(file))
    assert environment._commit() is None
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    assert environment._commit() is None
    for command in (["add", "environment.py"], ["commit", "-q", "-m", "ours"]):
        subprocess.run([*git, *command], check=True)
    head = environment._commit()
    assert len(head) == 40
    file.write_text("changed")
    assert environment._commit() == head + "+dirty"
