"""The HTTP server: its routes, and how a request becomes a response."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastapi
import prometheus_client as prometheus
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.inference.engine import Engine
from peakgpt.serve.answers import Answer, as_message, merge
from peakgpt.serve.chat import ChatTemplate
from peakgpt.serve.guard import Guard, read_body
from peakgpt.serve.limits import LIMITS, Limits
from peakgpt.serve.schema import DETOKENIZE, TOKENIZE, BadRequest, CompletionRequest, check, check_request, parse
from peakgpt.serve.stream import EventStream, Outputs, sse
from peakgpt.serve.worker import Job, Worker

PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


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

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, name: str, key: str | None = None,
                 hosts: tuple[str, ...] | None = None, chat: ChatTemplate | None = None,
                 limits: Limits = LIMITS):  # fmt: skip
        """
        Args:
            engine: made with the same tokenizer. Only the server may use it from now on.
            name: model name in requests and responses.
            key, hosts: see Guard.
            chat: the chat template. None: /v1/chat/completions answers 400.
        """
        self.tokenizer, self.name, self.chat, self.limits = tokenizer, name, chat, limits
        self.worker, self.metrics, self.made = Worker(engine), Metrics(), int(time.time())
        self.metrics.load.set_function(lambda: self.worker.load)
        self.metrics.free.set_function(lambda: engine.pool.free_blocks)
        self.block_size, self.vocab_size = engine.config.block_size, engine.config.vocab_size
        # Upper bound of the prompt in characters: as if every token were the longest of the vocabulary.
        self.max_prompt_chars = self.block_size * max(map(len, tokenizer.library.get_vocab()))
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        for path, method, answer in (
            ("/", "GET", self._page), ("/health", "GET", self._health), ("/metrics", "GET", self._metrics),
            ("/v1/models", "GET", self._models), ("/v1/completions", "POST", self._completions),
            ("/v1/chat/completions", "POST", self._chat), ("/tokenize", "POST", self._tokenize),
            ("/detokenize", "POST", self._detokenize),
        ):  # fmt: skip
            app.add_api_route(path, answer, methods=[method], response_model=None)
        app.add_exception_handler(BadRequest, self._refused)
        app.add_exception_handler(HTTPException, self._refused)
        app.add_middleware(Guard, key=key, hosts=hosts, limits=limits)
        self.app = app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.worker.loop = asyncio.get_running_loop()
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.stop)

    # ---- routes

    async def _page(self) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": POLICY})

    async def _health(self) -> Response:
        alive = self.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine thread has stopped"}, 200 if alive else 503)

    async def _metrics(self) -> Response:
        return Response(prometheus.generate_latest(self.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    async def _models(self) -> dict[str, Any]:
        model = {"id": self.name, "object": "model", "created": self.made, "owned_by": "peakgpt",
                 "max_model_len": self.block_size}  # fmt: skip
        return {"object": "list", "data": [model]}

    async def _tokenize(self, request: Request) -> dict[str, Any]:
        fields = check(await self._read(request), TOKENIZE, self.limits)
        ids = await asyncio.to_thread(self._encode, self._required(fields, "prompt"), chat=False)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.block_size}

    async def _detokenize(self, request: Request) -> dict[str, Any]:
        fields = check(await self._read(request), DETOKENIZE, self.limits)
        tokens = self._required(fields, "tokens")
        if len(tokens) != 1 or isinstance(tokens[0], str):
            raise BadRequest(f"tokens: got {tokens!r:.80}, expected one list of token ids", param="tokens")
        self._check_ids(tokens[0], "tokens")
        return {"prompt": self.tokenizer.decode(tokens[0])}

    async def _completions(self, request: Request) -> Response:
        completion = check_request(await self._read(request), chat=False, limits=self.limits)
        return await self._answer(request, completion, completion.fields["prompt"])

    async def _chat(self, request: Request) -> Response:
        data = await self._read(request)
        if self.chat is None:
            raise BadRequest("messages: got a model without chat template, expected a prompt to /v1/completions")
        completion = check_request(data, chat=True, limits=self.limits)
        return await self._answer(request, completion, [await self.chat.render_async(completion.fields["messages"])])

    # ---- completions

    async def _answer(
        self, request: Request, completion: CompletionRequest, prompts: list[str | list[int]]
    ) -> Response:
        if (model := completion.fields.get("model", self.name)) != self.name:
            raise BadRequest(f"model: got {model[:64]!r}, expected {self.name!r}", param="model", status=404,
                             code="model_not_found")  # fmt: skip
        job, answer = await asyncio.to_thread(self._job, completion, prompts)
        if self.worker.load + job.continuations > self.limits.queue:
            raise BadRequest(f"the queue of {self.limits.queue} is full", status=429, code="queue_full")
        self.metrics.tokens.labels("prompt").inc(sum(map(len, answer.prompts)))
        outputs = Outputs(job, self.worker, request)
        try:
            # Wait for the first output, so that a request which the engine rejects gets an error status.
            self.metrics.first.observe(await outputs.begin())
            content = self._stream(outputs, answer) if completion.stream else await self._whole(outputs, answer)
        except BaseException:
            outputs.end()
            raise
        self.metrics.answers.labels(200).inc()
        return EventStream(content, outputs) if completion.stream else JSONResponse(content)

    def _job(self, completion: CompletionRequest, prompts: list[str | list[int]]) -> tuple[Job, Answer]:
        for text in filter(lambda p: isinstance(p, str) and len(p) > self.max_prompt_chars, prompts):
            # Reject a long prompt before spending time on its encoding.
            raise BadRequest(f"prompt: got {len(text)} characters, expected up to {self.max_prompt_chars}",
                             param="prompt", code="context_length_exceeded")  # fmt: skip
        chat, end = completion.chat, [self.tokenizer.end_id]
        ids = [p if isinstance(p, list) else self._encode(p, chat=chat) or end for p in prompts]
        requests = []
        for prompt in ids:
            self._check_ids(prompt, "prompt")
            max_new_tokens = self.block_size - len(prompt)
            if max_new_tokens < 0 or len(prompt) > self.limits.prompt_tokens:
                raise BadRequest(f"prompt: got {len(prompt)} tokens, expected up to {self.block_size}", param="prompt",
                                 code="context_length_exceeded")  # fmt: skip
            try:
                requests.append((prompt, completion.params(self.tokenizer.end_id, max_new_tokens)))
            except ValueError as error:
                raise BadRequest(str(error)) from None
        texts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts] if completion.echo else []
        return Job(requests), Answer(completion, self.name, self.tokenizer, ids, texts)

    async def _whole(self, outputs: Outputs, answer: Answer) -> dict[str, Any]:
        parts: dict[int, list[dict]] = {}
        delayed = []
        async for number, output in outputs:
            # Only the first choice has the log-probabilities of the prompt. Delay other choices that come before it.
            early = answer.completion.echo and output.logprobs is not None and number not in answer.prompt_logprobs
            if output.index and early:
                delayed.append((number, output))
                continue
            for event in ((number, output), *_take_delayed(delayed, number)):
                part = answer.part(*event)
                parts.setdefault(part["index"], []).append(part)
        for event in delayed:
            part = answer.part(*event)
            parts.setdefault(part["index"], []).append(part)
        outputs.end()
        self.metrics.tokens.labels("text").inc(answer.completion_tokens)
        choices = [merge(parts[index]) for index in sorted(parts)]
        if answer.completion.chat:
            choices = [as_message(choice, chunk=False) for choice in choices]
        return answer.frame(choices, chunk=False, usage=True)

    async def _stream(self, outputs: Outputs, answer: Answer) -> AsyncIterator[bytes]:
        begun: set[int] = set()
        try:
            async for number, output in outputs:
                part = answer.part(number, output)
                if answer.completion.chat:
                    index = part["index"]
                    part = as_message(part, chunk=True, first=index not in begun)
                    begun.add(index)
                yield answer.event(part)
            if answer.completion.include_usage:
                yield sse(answer.frame([], chunk=True, usage=True))
            yield b"data: [DONE]\n\n"
        except BadRequest as refusal:
            yield sse(refusal.body)
        finally:
            self.metrics.tokens.labels("text").inc(answer.completion_tokens)

    # ---- helpers for all routes

    async def _read(self, request: Request) -> dict[str, Any]:
        # In a thread: parsing a megabyte of brackets takes half a second and must not block other streams.
        return await asyncio.to_thread(parse, await read_body(request, self.limits), self.limits)

    def _required(self, fields: dict[str, Any], name: str) -> Any:
        if name not in fields:
            raise BadRequest(f"{name}: got none, expected one", param=name)
        return fields[name]

    def _encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Encode a prompt. A chat template has written the special tokens already."""
        try:
            return self.tokenizer.encode(prompt, add_special_tokens=not chat)
        except ValueError as error:  # such as a regular expression of the tokenizer that takes too long
            raise BadRequest(f"prompt: {error}", param="prompt") from None

    def _check_ids(self, ids: list[int], param: str) -> None:
        if not 0 <= min(ids) <= max(ids) < min(self.vocab_size, self.tokenizer.vocab_size):
            raise BadRequest(f"{param}: got ids from {min(ids)} to {max(ids)}, expected 0 to {self.vocab_size - 1}",
                             param=param)  # fmt: skip

    async def _refused(self, request: Request, error: BadRequest | fastapi.HTTPException) -> Response:
        if not isinstance(error, BadRequest):
            expected = ", ".join(f"{method} {route.path}" for route in self.app.routes for method in route.methods)
            error = BadRequest(f"got {request.method} {request.url.path[:64]}, expected one of {expected}",
                               status=error.status_code)  # fmt: skip
        self.metrics.answers.labels(error.status).inc()
        headers = {"retry-after": "1"} if error.status == 429 else {}
        return JSONResponse(error.body, error.status, headers)


def _take_delayed(delayed: list[tuple[int, Any]], number: int) -> list[tuple[int, Any]]:
    """Remove and return the delayed outputs of one prompt."""
    taken = [event for event in delayed if event[0] == number]
    delayed[:] = [event for event in delayed if event[0] != number]
    return taken
