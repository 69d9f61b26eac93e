"""The HTTP application: OpenAI's endpoints over one engine.

The engine's thread tells of each token through the event loop of the server, so a slow reader delays nobody: what it
has not read yet waits in its own queue, which an answer's length bounds. A client that leaves cancels its requests,
whether it was streaming or not.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from halfbyte.errors import BusyError, HalfbyteError, RequestError, nearest
from halfbyte.infer.engine import Engine
from halfbyte.infer.requests import Event, Handle
from halfbyte.infer.sampling import Choice, SamplingParams
from halfbyte.infer.server import replies
from halfbyte.infer.server.metrics import Metrics
from halfbyte.infer.server.schemas import ChatRequest, CompletionRequest, ErrorReply

_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_WATCH = 0.5  # seconds between two looks whether a client that is waiting for a whole answer is still there


@dataclass(frozen=True)
class Limits:
    """What one client may take.

    Attributes:
        body: bytes of a request.
        tokens: of one answer.
        seconds: of one request, waiting included.
    """

    body: int = 1 << 20
    tokens: int = 4096
    seconds: float = 600.0


class _TooLongError(HalfbyteError):
    """A request that took longer than allowed."""


class _Answers:
    """The requests behind one HTTP request, and what is known of them so far."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self._metrics = metrics
        self._begun, self._deadline = time.monotonic(), time.monotonic() + limits.seconds
        self._limit = limits.seconds
        self.handles: list[Handle] = []
        self._written: list[int] = []

    def submit(self, engine: Engine, prompt: Any, params: SamplingParams, adapter: str | None) -> None:
        """Queue one more request."""
        index = len(self.handles)

        def listener(event: Event | BaseException) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self.handles.append(engine.submit(prompt, params, adapter=adapter, listener=listener))
        self._written.append(0)

    async def events(self, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[tuple[int, Event]]:
        """Events of all answers as they come, with the answer's number; ends early where the client has left."""
        left, looked = len(self.handles), time.monotonic()
        while left:
            event: Event | BaseException | None = None
            try:
                index, event = await asyncio.wait_for(self._events.get(), _WATCH)
            except TimeoutError:
                index = -1
            if time.monotonic() > looked + _WATCH:
                looked = time.monotonic()
                if await gone():
                    return
            if time.monotonic() > self._deadline:
                raise _TooLongError(f"the answer took longer than {self._limit:g} seconds.")
            if event is None:
                continue
            if isinstance(event, BaseException):
                raise event
            if not self._written[index] and event.choices:
                self._metrics.first_token.observe(time.monotonic() - self._begun)
            self._written[index] += len(event.choices)
            left -= event.finish is not None
            yield index, event

    def cancel(self) -> None:
        """Stop all answers; those that are done do not notice."""
        for handle in self.handles:
            handle.cancel()
        self._metrics.written(sum(self._written))

    def usage(self) -> dict[str, Any]:
        """Tokens read and written, a prompt with several answers counted once for each."""
        prompts = sum(handle.prompt_tokens for handle in self.handles)
        return replies.usage(prompts, sum(handle.cached_tokens for handle in self.handles), sum(self._written))


def make_app(engine: Engine, name: str, *, api_key: str | None = None, limits: Limits | None = None) -> FastAPI:
    """The application; it closes the engine when it is shut down.

    Args:
        engine: answers.
        name: of the model; its adapters go by their own names.
        api_key: what clients have to send as a bearer token; None: nothing.
        limits: what one client may take.
    """
    service = _Service(engine, name, limits or Limits(), Metrics(engine))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # "4XX" and not each status: FastAPI would otherwise promise its own 422, which nothing here answers with.
    refusals: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorReply, "description": "What is wrong with the request, or 429: come again."},
        504: {"model": ErrorReply, "description": "The answer took longer than allowed."},
    }
    app = FastAPI(title="halfbyte", lifespan=lifespan, docs_url=None, redoc_url=None, responses=refusals)
    app.add_middleware(_Gate, api_key=api_key, limits=service.limits, metrics=service.metrics)
    app.state.engine = engine
    _add_error_handlers(app)
    app.get("/health")(service.health)
    app.get("/metrics", response_class=PlainTextResponse)(service.exposition)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{model:path}")(service.model)
    app.post("/v1/completions")(service.completions)
    app.post("/v1/chat/completions")(service.chat_completions)
    return app


class _Service:
    """The endpoints."""

    def __init__(self, engine: Engine, name: str, limits: Limits, metrics: Metrics) -> None:
        self.engine, self.name, self.limits, self.metrics = engine, name, limits, metrics
        self._created = int(time.time())

    async def health(self) -> dict[str, Any]:
        """GET /health: that it is there, and how busy."""
        return {"status": "ok", "running": self.engine.running, "waiting": self.engine.waiting}

    async def exposition(self) -> PlainTextResponse:
        """GET /metrics, for Prometheus."""
        return PlainTextResponse(self.metrics.text(), media_type=self.metrics.media_type)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models: the model, and each adapter as one."""
        return {"object": "list", "data": [self._described(model) for model in (self.name, *self.engine.adapters)]}

    async def model(self, model: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        self._adapter_of(model)
        return self._described(model)

    async def completions(self, request: Request, body: CompletionRequest) -> Any:
        """POST /v1/completions."""
        return await self._answer(request, body, body.prompts(), body.max_tokens or _COMPLETION_TOKENS, body.logprobs)

    async def chat_completions(self, request: Request, body: ChatRequest) -> Any:
        """POST /v1/chat/completions."""
        messages = [message.rendered() for message in body.messages]
        most = body.max_completion_tokens or body.max_tokens or self.limits.tokens
        return await self._answer(request, body, [messages], most, (body.top_logprobs or 0) if body.logprobs else None)

    def _adapter_of(self, model: str) -> str | None:
        if model == self.name:
            return None
        if model in self.engine.adapters:
            return model
        raise HTTPException(404, f"there is no model {model!r}; {nearest(model, [self.name, *self.engine.adapters])}")

    def _described(self, model: str) -> dict[str, Any]:
        own = {"id": model, "object": "model", "created": self._created, "owned_by": "halfbyte"}
        return own if model == self.name else {**own, "parent": self.name}

    async def _answer(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        prompts: list[Any],
        most: int,
        logprobs: int | None,
    ) -> Any:
        """Submit `body.n` requests for each prompt, and answer with their events or with all of them at once."""
        adapter, chat = self._adapter_of(body.model), isinstance(body, ChatRequest)
        answers = _Answers(self.limits, self.metrics)
        try:
            for prompt in prompts:
                # Tokenizing a long prompt takes a while, and others are being answered.
                ids = await asyncio.to_thread(self.engine.token_ids, prompt)
                for index in range(body.n or 1):
                    params = body.sampling(min(most, self.limits.tokens), logprobs, index)
                    answers.submit(self.engine, ids, params, adapter)
        except BaseException:
            answers.cancel()
            raise
        identity, tokenizer = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", self.engine.tokenizer
        shape = replies.Shape(chat, identity, int(time.time()), body.model, tokenizer, logprobs is not None)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            stream = _stream(answers, shape, request, with_usage)
            return _Streamed(stream, answers)
        texts: list[list[str]] = [[] for _ in answers.handles]
        tokens: list[list[Choice]] = [[] for _ in answers.handles]
        finishes = ["cancelled"] * len(answers.handles)
        try:
            async for index, event in answers.events(request.is_disconnected):
                texts[index].append(event.text)
                tokens[index] += event.choices
                finishes[index] = event.finish or finishes[index]
        finally:
            answers.cancel()
        whole = [("".join(text), row, finish) for text, row, finish in zip(texts, tokens, finishes, strict=True)]
        return JSONResponse(shape.whole(whole, answers.usage()))


class _Streamed(StreamingResponse):
    """Cancels its answers however it ends; a generator could not where the client leaves before its first event."""

    def __init__(self, stream: AsyncIterator[str], answers: _Answers) -> None:
        super().__init__(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def _stream(answers: _Answers, shape: replies.Shape, request: Request, usage: bool) -> AsyncIterator[str]:
    """Server-sent events. The status was sent before the first token, so an error here is an event too."""
    try:
        if shape.chat:
            for index in range(len(answers.handles)):
                yield _event(shape.first(index))
        async for index, event in answers.events(request.is_disconnected):
            if event.text or event.finish is not None or shape.logprobs:
                yield _event(shape.piece(index, event.text, event.choices, event.finish))
        if usage:
            yield _event(shape.last(answers.usage()))
        yield "data: [DONE]\n\n"
    except HalfbyteError as error:
        yield _event(replies.error(str(error), "server_error"))


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body" and not str(part).startswith("function-"))
        message = str(first["msg"]).removeprefix("Value error, ")
        return JSONResponse(replies.error(f"{where}: {message}" if where else message), 400)

    @app.exception_handler(RequestError)
    async def wrong(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(replies.error(str(error)), 400)

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        body = replies.error(str(error), "rate_limit_error", "rate_limit_exceeded")
        return JSONResponse(body, 429, headers={"Retry-After": "1"})

    @app.exception_handler(_TooLongError)
    async def late(_: Request, error: _TooLongError) -> JSONResponse:
        return JSONResponse(replies.error(str(error), "server_error", "timeout"), 504)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = "model_not_found" if error.status_code == 404 and "model" in str(error.detail) else None
        return JSONResponse(replies.error(str(error.detail), code=code), error.status_code, headers=error.headers)


class _Gate:
    """Before anything is parsed: the key, the size of the body, and the count of what came in and how it ended."""

    def __init__(self, app: Any, api_key: str | None, limits: Limits, metrics: Metrics) -> None:
        self._app, self._key, self._limits, self._metrics = app, api_key, limits, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        sent = headers.get(b"authorization", b"")
        status = 500

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if self._key is not None and scope["path"] != "/health" and not self._knows(sent):
                refusal = replies.error("the API key is missing or wrong.", code="invalid_api_key")
                await JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, counted)
                return
            # The whole body first: it is small, and what parses it takes any exception for bad JSON.
            body = await self._read(receive)
            if body is None:
                message = f"a request may have {self._limits.body} bytes."
                await JSONResponse(replies.error(message), 413)(scope, receive, counted)
                return
            first: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replayed() -> Any:
                return first.pop() if first else await receive()

            await self._app(scope, replayed, counted)
        finally:
            self._metrics.answered(scope["path"], status)

    def _knows(self, sent: bytes) -> bool:
        return hmac.compare_digest(sent, b"Bearer " + (self._key or "").encode())

    async def _read(self, receive: Any) -> bytes | None:
        """The body, or None where it is too large."""
        parts, taken = [], 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            taken += len(parts[-1])
            if taken > self._limits.body:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)
