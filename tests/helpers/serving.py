"""A server with a tiny model in this process, for tests of the server and of its clients."""

import asyncio
import copy
import dataclasses
import importlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch

from peakgpt.engine.data.chat_template import ChatTemplates
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine
from peakgpt.engine.model.config import GPTConfig

uvicorn = pytest.importorskip("uvicorn", reason="the packages of peakgpt[serve] are not installed")
pytest.importorskip("fastapi", reason="the packages of peakgpt[serve] are not installed")
serve = importlib.import_module("peakgpt.serve.app")
guard = importlib.import_module("peakgpt.serve.guard")
LIMITS = importlib.import_module("peakgpt.serve.limits").LIMITS

LIMITS_HERE = dataclasses.replace(
    LIMITS, header_s=0.5, body_s=0.5, write_s=0.5, queue=40, connections=30, body_bytes=1 << 15
)


def tiny_tokenizer():
    return train_tokenizer(["the canary sings a song, é and more"], 270)


def with_chat(tokenizer, source, **others):
    """The same tokenizer with chat templates."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat = ChatTemplates({"default": source, **others}, {"eos_token": "<end>"})
    return tokenizer


def tiny_model(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_embd=16, n_head=2, block_size=128, vocab_size=tokenizer.vocab_size)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


class Running:
    """A server that runs in its own thread until the end of a `with` block."""

    def __init__(self, model, tokenizer, send_bytes=None, limits=LIMITS_HERE, name="tiny", **options):
        self.engine = Engine(model, tokenizer, blocks=40)
        self.server = serve.Server(self.engine, tokenizer, name=name, limits=limits, **options)
        listening = socket.create_server(("127.0.0.1", 0))
        if send_bytes:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        self.port = listening.getsockname()[1]
        self.uvicorn = uvicorn.Server(guard.config(self.server.app, limits))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.uvicorn.serve([listening])))
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.uvicorn.should_exit = True
        self.thread.join()

    def ask(self, path, data=None, headers=(), raw=None):
        """Send a request. Return (status, JSON or text)."""
        body = raw if raw is not None else None if data is None else json.dumps(data).encode()
        head = {"content-type": "application/json", **dict(headers)}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, head)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if text.startswith("{") else text

    def openai_client(self):
        """The client of OpenAI for this server; skips the test where openai is not installed."""
        openai = pytest.importorskip("openai", reason="openai is not installed")
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=0)

    def idle(self):
        """Wait until no request is left. Return the number of free cache blocks."""
        deadline, worker = time.monotonic() + 10, self.server.worker
        while worker.load or worker.jobs or self.engine.has_work:  # the worker's thread removes finished jobs
            assert time.monotonic() < deadline, "requests were left after 10 s"
            time.sleep(0.01)
        return self.engine.pool.free_blocks


def posted(data):
    """The bytes of a POST to /v1/completions."""
    body = json.dumps(data).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
