"""The HTTP server: its routes, and how a request becomes a response."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fastapi
import prometheus_client as prometheus
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.inference.engine import Engine
from peakgpt.engine.inference.sequence import Output
from peakgpt.serve.answers import Answer, WholeChoice, as_message, encode
from peakgpt.serve.chat import Chat
from peakgpt.serve.errors import BadRequest, code_of
from peakgpt.serve.guard import Guard, read_body
from peakgpt.serve.keys import check_keys
from peakgpt.serve.limits import LIMITS, Limits
from peakgpt.serve.preparation import RequestPreparation, unknown_model
from peakgpt.serve.stream import EventStream, Outputs, WholeResponse, sse
from peakgpt.serve.worker import Worker

PAGE = Path(__file__).with_name("page.html")
POLICY = ("default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip
PAGE_HEADERS = {"content-security-policy": POLICY, "x-frame-options": "DENY", "x-content-type-options": "nosniff"}
T = TypeVar("T")


@dataclass
class Metrics:
    """The Prometheus metrics of /metrics."""

    registry: prometheus.CollectorRegistry = field(default_factory=prometheus.CollectorRegistry)

    def __post_init__(self):
        options = {"registry": self.registry}
        self.answers = prometheus.Counter("peakgpt_answers", "answers by status", ["status"], **options)
        self.tokens = prometheus.Counter("peakgpt_tokens", "tokens read and written", ["kind"], **options)
        self.first = prometheus.Histogram("peakgpt_first_output_seconds", "until the first output", **options)
        self.load = prometheus.Gauge("peakgpt_continuations", "continuations running and waiting", **options)
        self.free = prometheus.Gauge("peakgpt_free_blocks", "free blocks of the cache", **options)


class Server:
    """Serve one model over HTTP. `app` is the ASGI application; its lifespan starts and stops the engine's thread."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, name: str, key: str | Sequence[str] | None = None,
                 hosts: tuple[str, ...] | None = None, limits: Limits = LIMITS):  # fmt: skip
        """
        Args:
            engine: made with the same tokenizer. Only the server may use it from now on.
            tokenizer: without chat templates, /v1/chat/completions answers 400.
            name: model name in requests and responses.
            key, hosts: see Guard.
        Raises:
            ValueError: a chat template is not Jinja, or none of them is the default.
        """
        if key is not None:
            key = check_keys([key] if isinstance(key, str) else key, "key")
        self.name, self.limits = name, limits
        self.chat = Chat(tokenizer.chat) if tokenizer.chat.sources else None
        self.worker, self.metrics, self.made = Worker(engine), Metrics(), int(time.time())
        self.metrics.load.set_function(lambda: self.worker.load)
        self.metrics.free.set_function(lambda: engine.pool.free_blocks)
        self.block_size = engine.config.block_size
        self.requests = RequestPreparation(engine.preparation, tokenizer, name, self.chat, limits)
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=self._lifespan)
        for path, method, answer in (
            ("/", "GET", self._page), ("/health", "GET", self._health), ("/metrics", "GET", self._metrics),
            ("/v1/models", "GET", self._models), ("/v1/models/{name:path}", "GET", self._model),
            ("/v1/completions", "POST", self._completions), ("/v1/chat/completions", "POST", self._chat),
            ("/v1/embeddings", "POST", self._embeddings),
            ("/tokenize", "POST", self._tokenize), ("/detokenize", "POST", self._detokenize),
        ):  # fmt: skip
            methods = [method, "HEAD"] if method == "GET" else [method]
            app.add_api_route(path, answer, methods=methods, response_model=None)
        app.add_exception_handler(BadRequest, self._refused)
        app.add_exception_handler(HTTPException, self._refused)
        app.add_middleware(Guard, key=key, hosts=hosts, limits=limits, is_alive=lambda: not self.worker.failed)
        self.app = app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.worker.loop = asyncio.get_running_loop()
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.stop)

    # ---- routes

    async def _page(self) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def _health(self) -> Response:
        alive = self.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine thread has stopped"}, 200 if alive else 503)

    async def _metrics(self) -> Response:
        return Response(prometheus.generate_latest(self.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self._model(self.name)]}

    async def _model(self, name: str) -> dict[str, Any]:
        if name != self.name:
            raise unknown_model(name, self.name)
        return {"id": name, "object": "model", "created": self.made, "owned_by": "peakgpt",
                "max_model_len": self.block_size}  # fmt: skip

    async def _tokenize(self, request: Request) -> Response:
        return await self._text_answer(request, self.requests.tokenize)

    async def _detokenize(self, request: Request) -> Response:
        return await self._text_answer(request, self.requests.detokenize)

    async def _text_answer(self, request: Request, answer: Callable[[bytes], dict[str, Any]]) -> Response:
        body = await read_body(request, self.limits)
        return WholeResponse(await self.requests.run(lambda: encode(answer(body)).encode()))

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    # ---- embeddings

    async def _embeddings(self, request: Request) -> Response:
        fields = await self.requests.run(self.requests.embedding, await read_body(request, self.limits))
        outputs = Outputs(self.worker, request, len(fields["input"]), self.limits.queue)
        try:
            sequences, answer = await self.requests.run(self.requests.embedded_texts, fields)
            self.metrics.tokens.labels("prompt").inc(answer.prompt_tokens)
            self.metrics.first.observe(await outputs.submit(sequences))
            async for number, output in outputs:
                answer.vectors[number] = output.embedding
        finally:
            outputs.end()
        content = await self.requests.run(answer.whole)
        self.metrics.answers.labels(200).inc()
        return WholeResponse(content)

    # ---- completions

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        body = await read_body(request, self.limits)
        completion = await self.requests.run(self.requests.completion, body, chat)
        outputs = Outputs(self.worker, request, completion.continuations, self.limits.queue)
        try:
            fields = completion.fields
            texts = [await self.chat.render_async(fields)] if chat else fields["prompt"]
            sequences, answer = await self.requests.run(self.requests.sequences, completion, texts)
            self.metrics.tokens.labels("prompt").inc(sum(map(len, answer.prompts)))
            self.metrics.first.observe(await outputs.submit(sequences))
            if not completion.stream:
                content = await self._whole(outputs, answer)
        except BaseException:
            outputs.end()
            raise
        self.metrics.answers.labels(200).inc()
        return EventStream(self._stream(outputs, answer), outputs) if completion.stream else WholeResponse(content)

    async def _whole(self, outputs: Outputs, answer: Answer) -> bytes:
        choices: dict[int, WholeChoice] = {}
        delayed = []

        def add(number: int, output: Output) -> None:
            choice = choices.setdefault(answer.index(number, output), WholeChoice(answer.completion.chat))
            choice.add(answer.part(number, output))

        async for number, output in outputs:
            # Only the first choice has the log-probabilities of the prompt. Delay other choices that come before it.
            early = answer.completion.echo and output.logprobs is not None and number not in answer.prompt_logprobs
            if output.index and early:
                delayed.append((number, output))
                continue
            for event in ((number, output), *_take_delayed(delayed, number)):
                await self._convert(answer, add, *event)
        for event in delayed:
            await self._convert(answer, add, *event)
        outputs.end()
        self.metrics.tokens.labels("text").inc(answer.completion_tokens)
        return await self.requests.run(answer.whole, [choices[index] for index in sorted(choices)])

    async def _convert(self, answer: Answer, convert: Callable[..., T], number: int, output: Output) -> T:
        """Convert an output; in a thread if it has the log-probabilities of a prompt."""
        if answer.is_large(number, output):
            return await self.requests.run(convert, number, output)
        return convert(number, output)

    async def _stream(self, outputs: Outputs, answer: Answer) -> AsyncIterator[bytes]:
        begun: set[int] = set()

        def event(number: int, output: Output) -> bytes:
            part = answer.part(number, output)
            if answer.completion.chat:
                index = part["index"]
                part = as_message(part, chunk=True, first=index not in begun)
                begun.add(index)
            return answer.event(part)

        try:
            async for number, output in outputs:
                yield await self._convert(answer, event, number, output)
            if answer.completion.include_usage:
                yield sse(answer.frame([], chunk=True, usage=True))
            yield b"data: [DONE]\n\n"
        except BadRequest as refusal:
            yield sse(refusal.body)
        finally:
            self.metrics.tokens.labels("text").inc(answer.completion_tokens)

    async def _refused(self, request: Request, error: BadRequest | fastapi.HTTPException) -> Response:
        if not isinstance(error, BadRequest):
            expected = ", ".join(f"{method} {route.path}" for route in self.app.routes
                                 for method in sorted(route.methods) if method != "HEAD")  # fmt: skip
            code = code_of(error.status_code)
            allowed = error.headers or {}  # Allow, with status 405
            got = f"{request.method[:16]} {request.url.path[:64]}"
            error = BadRequest(f"got {got}, expected one of {expected}", code=code)
            error.headers.update(allowed)
        self.metrics.answers.labels(error.status).inc()
        return JSONResponse(error.body, error.status, error.headers)


def _take_delayed(delayed: list[tuple[int, Any]], number: int) -> list[tuple[int, Any]]:
    """Remove and return the delayed outputs of one prompt."""
    taken = [event for event in delayed if event[0] == number]
    delayed[:] = [event for event in delayed if event[0] != number]
    return taken
