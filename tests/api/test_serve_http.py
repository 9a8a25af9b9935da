"""HTTP as its standard and its clients expect it: methods, hosts, keys, framing, headers of the page."""

import base64
import json
import socket

import pytest
import serving  # skips all where the packages of peakgpt[serve] are missing
from serving import Running, guard, posted

from peakgpt.serve.errors import ERRORS

KEYS = ["first key", "second"]


@pytest.fixture(scope="module")
def running():
    tokenizer = serving.tiny_tokenizer()
    with Running(serving.tiny_model(tokenizer), tokenizer, hosts=guard.LOOPBACK) as running:
        yield running


def send(running, sent):
    """Send bytes; return status, headers, body and what follows until the server closes or 0.3 s pass."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(sent)
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(4096)
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        connection.settimeout(0.3)
        try:
            while part := connection.recv(4096):
                rest += part
            closed = True
        except TimeoutError:
            closed = False
    return int(lines[0].split()[1]), headers, rest, closed


def request(method, path, *lines, host="localhost", connection="close"):
    head = (f"{method} {path} HTTP/1.1", f"host: {host}", f"connection: {connection}", *lines)
    return "\r\n".join((*head, "", "")).encode()


GET = ["/", "/health", "/metrics", "/v1/models", "/v1/models/tiny"]
POST = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"]


def test_every_route_is_in_this_test(running):
    routes = {
        (route.path.replace("{name:path}", "tiny"), *sorted(route.methods)) for route in running.server.app.routes
    }
    assert routes == {*((path, "GET", "HEAD") for path in GET), *((path, "POST") for path in POST)}


@pytest.mark.parametrize("path", [*GET, "/v1/models/other"])
def test_head_answers_like_get_without_a_body(running, path):
    status, headers, body, _ = send(running, request("GET", path))
    head_status, head_headers, rest, _ = send(running, request("HEAD", path))
    changing = {"date"} | ({"content-length"} if path == "/metrics" else set())
    same = [{name: value for name, value in one.items() if name not in changing} for one in (headers, head_headers)]
    assert status == head_status == (404 if path.endswith("other") else 200) and same[0] == same[1]
    assert rest == b"" and len(body) == int(headers["content-length"])


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", [*GET, *POST])
def test_other_methods_get_405_with_allow(running, path, method):
    allowed = {"GET", "HEAD"} if path in GET else {"POST"}
    if method in allowed:
        return
    status, headers, body, _ = send(running, request(method, path, "content-length: 0"))
    assert status == 405 and set(headers["allow"].upper().split(", ")) == allowed
    assert method == "HEAD" or json.loads(body)["error"]["code"] == "method_not_supported"


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1", "/v1/", "/health/", "//health", "/v1/models/", "/%00", "/../etc/passwd"]
)
def test_unknown_paths_get_404_without_a_redirect(running, path):
    status, headers, body, _ = send(running, request("GET", path))
    assert status == 404 and "location" not in headers
    assert json.loads(body)["error"]["code"] in ("unknown_url", "model_not_found")


HOSTS = ["localhost", "LOCALHOST", "LocalHost:80", "localhost.", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000",
         "[0:0:0:0:0:0:0:1]", "localhost:"]  # fmt: skip
OTHERS = ["example.org", "localhost.example.org", "127.0.0.1.example.org", "[::2]", "[::1].example.org", "::1:80:x",
          "0.0.0.0", "10.0.0.1", "localhost:x", "evil@localhost", "localhost@evil", "[::1", "localhost:80:80",
          "xlocalhost", ""]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_every_spelling_of_a_loopback_host_is_allowed(running, host):
    assert send(running, request("GET", "/health", host=host))[0] == 200


@pytest.mark.parametrize("host", OTHERS)
def test_other_hosts_are_refused(running, host):
    status, _, body, _ = send(running, request("GET", "/health", host=host))
    assert status in (400, 403) and json.loads(body)["error"]["code"] in ("host_not_allowed", "invalid_http")


FRAMINGS = ["content-length: 5\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 5",
            "Transfer-Encoding: CHUNKED\r\nContent-Length: 0", "content-length: 5\r\ncontent-length: 6",
            "transfer-encoding: gzip, chunked", "content-length: +5", "content-length: 5, 6"]  # fmt: skip


@pytest.mark.parametrize("lines", FRAMINGS)
@pytest.mark.parametrize("path", ["/v1/completions", "/health", "/nowhere"])
def test_ambiguous_framing_is_refused_and_the_connection_closed(running, lines, path):
    """RFC 9112, 6.3: what follows may be a request that a proxy did not see."""
    smuggled = b"0\r\n\r\n" + request("GET", "/health")
    sent = request("POST", path, "content-type: application/json", lines, connection="keep-alive")
    status, _, body, closed = send(running, sent + smuggled)
    assert 400 <= status <= 501 and status != 404 and closed and b'"ok"' not in body
    assert ERRORS[json.loads(body)["error"]["code"]][0] == status


def test_chunked_bodies_work(running):
    body = b'{"prompt": "x", "max_tokens": 1}'
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = request("POST", "/v1/completions", "content-type: application/json", "transfer-encoding: chunked")
    assert send(running, head + chunked)[0] == 200


@pytest.mark.parametrize("name", ["tiny", "org/model", "a b", "ü", "..", "x" * 200])
def test_model_is_retrieved_by_name(name):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    tokenizer = serving.tiny_tokenizer()
    with Running(serving.tiny_model(tokenizer), tokenizer, name=name) as named:
        client = named.openai_client()
        if name != "..":  # a path that clients shorten
            assert client.models.retrieve(name).id == name == client.models.list().data[0].id
        with pytest.raises(openai.NotFoundError) as refusal:
            client.models.retrieve("other")
        assert refusal.value.code == "model_not_found" and refusal.value.param == "model"


def test_page_can_not_be_framed_and_does_not_start_by_itself(running):
    _, headers, body, _ = send(running, request("GET", "/"))
    assert "frame-ancestors 'none'" in headers["content-security-policy"] and headers["x-frame-options"] == "deny"
    assert b"location" not in body and b"run();" in body and b"preventDefault(); run();" in body


def test_large_answers_are_sent_in_pieces(running):
    """The time limit for writing counts for each piece, so that a slow client that reads is served."""
    data = {"prompt": [[5, 6, 7] * 40] * 8, "echo": True, "logprobs": 20, "max_tokens": 1}
    sent = posted(data).replace(b"host: localhost", b"host: localhost\r\nconnection: close")
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(sent)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert len(json.loads(body)["choices"]) == 8 and len(body) > 1 << 17
    assert f"content-length: {len(body)}".encode() in head.lower()


def bearer(value):
    return {"authorization": f"Bearer {value}"}


def basic(value):
    return {"authorization": "Basic " + base64.b64encode(value.encode()).decode()}


@pytest.fixture(scope="module")
def keyed():
    tokenizer = serving.tiny_tokenizer()
    with Running(serving.tiny_model(tokenizer), tokenizer, key=KEYS) as keyed:
        yield keyed


@pytest.mark.parametrize("key", KEYS)
def test_each_of_several_keys_opens_every_route(keyed, key):
    for path in (*GET, *POST):
        for header in (bearer(key), bearer(f"  {key} "), basic(f"user:{key}"), {"authorization": f"bearer {key}"}):
            assert keyed.ask(path, headers=header)[0] in (200, 405)


WRONG = [{}, bearer(""), bearer(" "), bearer("first"), bearer("first key second"), bearer("FIRST KEY"),
         basic("first key"), basic(":"), basic(":wrong"), {"authorization": "first key"}, bearer("sécond"),
         {"authorization": "Basic %%%"}, {"authorization": "Token second"}, {"x-api-key": "second"}]  # fmt: skip


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_wrong_keys_open_no_route_except_health(keyed, headers):
    for path in (*GET, *POST, "/nowhere", "/health/", "/HEALTH", "//health", "/v1/../health"):
        lines = [f"{name}: {value}" for name, value in headers.items()]
        for method in ("GET", "HEAD", "POST", "OPTIONS"):
            sent = "\r\n".join((f"{method} {path} HTTP/1.1", "host: x", *lines, "connection: close", "", ""))
            status = send(keyed, sent.encode("latin-1"))[0]
            expected = (200, 405) if path == "/health" else (401, 400)
            assert status in expected, (method, path, status)


@pytest.mark.parametrize("key", ["", " ", "\n", [], [""], ["good", " "], "schlüssel", "a\nb", "\x00"], ids=repr)
def test_blank_and_unusable_keys_are_an_error_and_never_an_open_server(key):
    tokenizer = serving.tiny_tokenizer()
    engine = serving.Engine(serving.tiny_model(tokenizer), tokenizer, blocks=4)
    with pytest.raises(ValueError, match=r"API key, expected|expected printable") as error:
        serving.serve.Server(engine, tokenizer, name="x", key=key)
    assert "good" not in str(error.value) and "schl" not in str(error.value)
