"""A server on this machine that speaks the protocol of the Hugging Face hub, for tests with the real client.

    GET  /api/models/NAME/revision/REVISION     the commit of a revision
    GET  /api/models/NAME/tree/COMMIT           its files, with sizes and hashes
    HEAD /NAME/resolve/COMMIT/FILE              X-Repo-Commit, ETag; a large file redirects to another address
    GET  /NAME/resolve/COMMIT/FILE              its bytes, or a range of them
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 10_000  # files from this size are stored as in Git LFS, at another address


@dataclass
class Repository:
    """A model of the hub.

    Args:
        revisions: name of a branch or tag -> folder with the files.
        token: that a client must send; None is a public model.
        gated: a client with another token sees the list of the files only.
    """

    revisions: dict[str, Path]
    token: str | None = None
    gated: bool = False

    def commit(self, revision):
        """Return the commit and the folder of a branch, a tag or a commit; None if there is none."""
        by_commit = {hashlib.sha1(name.encode()).hexdigest(): folder for name, folder in self.revisions.items()}
        if revision in self.revisions:
            return hashlib.sha1(revision.encode()).hexdigest(), self.revisions[revision]
        return (revision, by_commit[revision]) if revision in by_commit else None


@dataclass
class Hub:
    """The models, and what happens to requests.

    Attributes:
        status: answered to every request instead of the right answer; None is the right answer.
        cut: name of a file -> bytes after which the connection is closed, once.
        requests: "METHOD path Range" of each request.
    """

    models: dict[str, Repository] = field(default_factory=dict)
    status: int | None = None
    cut: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.store = f"http://localhost:{self.server.server_port}/lfs"  # another host, as on the hub
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def downloads(self):
        """Return the names of the files whose bytes were sent, in order."""
        return sorted(r.split()[1].rpartition("/")[2] for r in self.requests if r.startswith("GET /lfs/") or
                      (r.startswith("GET ") and "/resolve/" in r))  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        if not re.search("^/api/models/|^/lfs/|/resolve/", path):
            return self._send(404, b"")
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if self.hub.status is not None:
            return self._send(self.hub.status, b"out of order")
        if path.startswith("/api/models/"):
            name, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            name, _, tree = name.partition("/tree/")
            return self._send_listing(name, tree) if tree else self._send_commit(name, rest or "main")
        if path.startswith("/lfs/"):
            return self._send_bytes(Path("/", path.removeprefix("/lfs/")), {})
        name, _, rest = path.lstrip("/").partition("/resolve/")
        return self._send_file(name, *rest.split("/", 1))

    def _found(self, name, revision, *, is_file):
        """Return the commit and the folder that a client may see; None if an error was sent."""
        model = self.hub.models.get(name)
        is_allowed = model and (model.token is None or self.headers.get("Authorization") == f"Bearer {model.token}")
        if model is None or not (is_allowed or model.gated):
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if is_file and not is_allowed:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        found = model.commit(revision)
        return found or self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev"})

    def _send_commit(self, name, revision):
        if found := self._found(name, revision, is_file=False):
            self._send(200, json.dumps({"id": name, "sha": found[0], "siblings": []}).encode())

    def _send_listing(self, name, revision):
        if found := self._found(name, revision, is_file=False):
            files = [file for file in sorted(found[1].rglob("*")) if file.is_file()]
            self._send(200, json.dumps([_entry(found[1], file) for file in files]).encode())

    def _send_file(self, name, revision, file_name):
        if not (found := self._found(name, revision, is_file=True)):
            return
        commit, file = found[0], found[1] / file_name
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = file.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if len(data) < LARGE_BYTES:
            return self._send_bytes(file, headers)
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.store}{file.as_posix()}"})

    def _send_bytes(self, file, headers):
        data, begin = file.read_bytes(), 0
        if wanted := self.headers.get("Range"):
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
            headers = {**headers, "Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
        cut = self.hub.cut.pop(file.name, None) if self.command == "GET" else None
        self._send(206 if wanted else 200, data[begin:], {**headers, "Accept-Ranges": "bytes"}, cut)

    def _send(self, status, data, headers=None, cut=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])
        self.close_connection = cut is not None


def _entry(folder, file):
    data = file.read_bytes()
    entry = {"type": "file", "path": file.relative_to(folder).as_posix(), "size": len(data),
             "oid": hashlib.sha1(data).hexdigest()}  # fmt: skip
    if len(data) < LARGE_BYTES:
        return entry
    return {**entry, "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
