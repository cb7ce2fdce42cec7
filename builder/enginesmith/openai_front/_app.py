"""The ASGI application: which path is answered by what, and how failures become errors of OpenAI's API."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from enginesmith.openai_front._catalog import Catalog
from enginesmith.openai_front._errors import (
    ApiError,
    api_error_from_client,
    api_error_from_validation,
    too_busy,
    unavailable,
)
from enginesmith.openai_front._generation import (
    Question,
    question_from_chat,
    question_from_completion,
)
from enginesmith.openai_front._http import (
    REQUEST_ID,
    RequestIds,
    check_key,
    read_body,
    send_document,
    send_events,
    while_called,
)
from enginesmith.openai_front._requests import ChatRequest, CompletionRequest, EmbeddingRequest
from enginesmith.openai_front._responses import Document, embeddings
from enginesmith.openai_front.settings import FrontSettings
from enginesmith_client import AsyncClient, ChatTemplate, ModelNotReady, TritonClientError

_LOG = logging.getLogger("enginesmith.openai")
_READY_TIMEOUT_S = 5.0

Events: TypeAlias = AsyncGenerator[bytes, None]
Answer: TypeAlias = "Document | Events"
Body = TypeVar("Body", bound=BaseModel)


def application(
    client: AsyncClient, settings: FrontSettings, *, templates: Mapping[str, ChatTemplate]
) -> ASGIApp:
    """The front of what ``client`` is connected to; ``templates`` by the name that Triton serves."""
    front = Front(client, settings, templates)

    def post(path: str, body: type[Body], answer: Callable[[Body], Awaitable[Answer]]) -> Route:
        async def ask(_request: Request, content: bytes) -> Answer:
            return await answer(_validated(body, content))

        return Route(path, Endpoint(settings, ask, is_open=False), methods=["POST"])

    def get(
        path: str, answer: Callable[[Request, bytes], Awaitable[Answer]], *, is_open: bool = False
    ) -> Route:
        return Route(path, Endpoint(settings, answer, is_open=is_open), methods=["GET"])

    routes = [
        get("/health", front.health, is_open=True),
        get("/ready", front.ready, is_open=True),
        get("/v1/models", front.models),
        get("/v1/models/{name:path}", front.model),
        post("/v1/completions", CompletionRequest, front.complete),
        post("/v1/chat/completions", ChatRequest, front.chat),
        post("/v1/embeddings", EmbeddingRequest, front.embed),
    ]
    handlers: dict[Any, Any] = {HTTPException: _no_such_path, Exception: _unexpected}
    return RequestIds(Starlette(routes=routes, exception_handlers=handlers))


class Front:
    """Answers requests that are read and checked."""

    def __init__(
        self, client: AsyncClient, settings: FrontSettings, templates: Mapping[str, ChatTemplate]
    ) -> None:
        self._client = client
        self._settings = settings
        self._templates = templates
        self._catalog = Catalog(client, settings.aliases)
        self._room = _Room(settings.max_generations)

    async def health(self, _request: Request, _content: bytes) -> Document:
        """That this process answers."""
        return {"status": "ok"}

    async def ready(self, _request: Request, _content: bytes) -> Document:
        """That Triton takes requests.

        Raises:
            ApiError: 503, it does not.
        """
        async with self._explained():
            if not await self._client.is_ready(timeout_s=_READY_TIMEOUT_S):
                raise unavailable("The model server is not ready.", code="server_not_ready")
        return {"status": "ready"}

    async def models(self, _request: Request, _content: bytes) -> Document:
        """The models that generate or embed."""
        async with self._explained():
            return {"object": "list", "data": await self._catalog.cards()}

    async def model(self, request: Request, _content: bytes) -> Document:
        """One of them."""
        async with self._explained():
            return await self._catalog.card(request.path_params["name"])

    async def complete(self, body: CompletionRequest) -> Answer:
        """The texts that continue the prompts."""
        model = self._catalog.served_name(body.model)
        question = question_from_completion(body, self._client, model=model, request_id=REQUEST_ID.get())
        return self._streamed(question) if body.stream else await self._answered(question)

    async def chat(self, body: ChatRequest) -> Answer:
        """The next message of the conversation."""
        model = self._catalog.served_name(body.model)
        question = question_from_chat(
            body,
            self._client,
            model=model,
            template=self._templates.get(model),
            default_max_tokens=self._settings.default_max_tokens,
            request_id=REQUEST_ID.get(),
        )
        return self._streamed(question) if body.stream else await self._answered(question)

    async def embed(self, body: EmbeddingRequest) -> Document:
        """A vector for each text."""
        async with self._explained(body.model):
            with self._room.taken(1):
                vectors = await self._client.embed(self._catalog.served_name(body.model), body.input)
        return embeddings(vectors, model=body.model, as_base64=body.encoding_format == "base64")

    async def _answered(self, question: Question) -> Document:
        async with self._explained(question.request.model):
            with self._room.taken(len(question.asks)):
                return await question.answer()

    async def _streamed(self, question: Question) -> Events:
        async with self._explained(question.request.model):
            with self._room.taken(len(question.asks)):
                async with aclosing(question.events()) as events:
                    async for one in events:
                        yield one

    @asynccontextmanager
    async def _explained(self, model: str | None = None) -> AsyncIterator[None]:
        """Errors of the client inside become errors of the API; what the operator must know of them is logged."""
        try:
            yield
        except ModelNotReady as error:
            if model is None:
                raise api_error_from_client(error) from error
            raise await self._catalog.error_for_missing(model, error) from error
        except TritonClientError as error:
            api_error = api_error_from_client(error)
            if api_error.status >= 500:
                _LOG.error("%s: %d %s: %s", REQUEST_ID.get(), api_error.status, type(error).__name__, error)
            # Callers know this front and nothing of what is behind it.
            for address in self._client.url.split(", "):
                api_error.message = api_error.message.replace(address, "the model server")
            raise api_error from error


class Endpoint:
    """An ASGI application that answers one path. A caller that goes away ends the work for it."""

    def __init__(
        self, settings: FrontSettings, answer: Callable[[Request, bytes], Awaitable[Answer]], *, is_open: bool
    ) -> None:
        self._settings = settings
        self._answer = answer
        self._is_open = is_open
        """Whether callers need no key."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        limits = self._settings
        try:
            if not self._is_open:
                check_key(request, limits.api_keys)
            content = await read_body(
                request, max_bytes=limits.max_request_bytes, timeout_s=limits.read_timeout_s
            )
        except ApiError as error:
            await send_document(scope, receive, send, error.body, error=error)
        except ClientDisconnect:
            return
        else:
            await while_called(receive, self._respond(request, content, send))

    async def _respond(self, request: Request, content: bytes, send: Send) -> None:
        scope, receive = request.scope, request.receive
        try:
            answer = await self._answer(request, content)
            if isinstance(answer, dict):
                await send_document(scope, receive, send, answer)
                return
            async with aclosing(answer):
                # What fails before the first event has a status of its own.
                first = await anext(answer)
                await send_events(send, answer, first=first, timeout_s=self._settings.read_timeout_s)
        except ApiError as error:
            await send_document(scope, receive, send, error.body, error=error)


class _Room:
    """Places for answers that are generated at once."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._taken = 0

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold ``count`` places.

        Raises:
            ApiError: 429, they are not free now; 400, there are fewer in all.
        """
        if count > self._places:
            raise ApiError(
                400,
                f"The request asks for {count} answers; at most {self._places} are given at once.",
                param="n",
            )
        if self._taken + count > self._places:
            raise too_busy(f"{self._taken} answers are being generated, and {self._places} is the limit.")
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count


def _validated(kind: type[Body], content: bytes) -> Body:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise api_error_from_validation(error) from error


async def _no_such_path(request: Request, error: HTTPException) -> Response:
    """For paths and methods that are not served."""
    what = f"Unknown request URL: {request.method} {request.url.path}."
    body = ApiError(error.status_code, what, code="unknown_url").body
    return JSONResponse(body, error.status_code, error.headers)


async def _unexpected(_request: Request, _error: Exception) -> Response:
    """For our own mistakes: Starlette raises the error again after this, and it is logged with its traceback."""
    return JSONResponse(
        ApiError(500, "The front failed; its log has the rest.", type="server_error").body, 500
    )
