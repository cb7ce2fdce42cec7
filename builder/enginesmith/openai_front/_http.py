"""What every request of the front goes through: its id, its key, its body, and the end of its caller.

Knows ASGI and nothing of models.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextvars import ContextVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from enginesmith.openai_front._errors import ApiError, unauthorized
from enginesmith.openai_front._responses import Document, event, json_bytes
from enginesmith.openai_front._together import ended

_LOG = logging.getLogger("enginesmith.openai")
REQUEST_ID: ContextVar[str] = ContextVar("request_id")
"""Of the request that the current task works for."""
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class RequestIds:
    """Gives each request an id, the caller's own if it sent ``x-request-id``, and sends it back in that header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else f"req_{uuid.uuid4().hex}"
        REQUEST_ID.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        await self._app(scope, receive, send_with_id)


def check_key(request: Request, keys: Sequence[str]) -> None:
    """Return if the caller may call; without ``keys`` everybody may.

    Raises:
        ApiError: 401, the key is missing or not one of ``keys``.
    """
    if not keys:
        return
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    given = sent.strip().encode() if scheme.lower() == "bearer" else b""
    # Every key is compared, so that the time tells nothing about which one is close.
    if not sum(hmac.compare_digest(given, key.encode()) for key in keys):
        raise unauthorized(sent=bool(given))


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The body of the request.

    Raises:
        ApiError: 413, it is longer than ``max_bytes``; 408, it did not arrive in ``timeout_s``.
    """
    too_long = ApiError(
        413, f"The body is longer than {max_bytes} bytes, which is the limit here.", code="request_too_large"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_long
    except TimeoutError as error:
        raise ApiError(
            408, f"The body did not arrive within {timeout_s:g} s.", code="request_timeout"
        ) from error
    return bytes(body)


async def while_called(receive: Receive, work: Awaitable[None]) -> None:
    """Do ``work`` until it is done or the caller has gone; then it is cancelled. The body must have been read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            await tasks[0]
    finally:
        await ended(tasks)


async def send_document(
    scope: Scope, receive: Receive, send: Send, document: Document, *, error: ApiError | None = None
) -> None:
    """Send a JSON document with status 200, or the one of ``error``."""
    status, headers = (error.status, dict(error.headers)) if error else (200, {})
    response = Response(json_bytes(document), status, headers, media_type="application/json")
    await response(scope, receive, send)


async def send_events(send: Send, events: AsyncIterator[bytes], *, first: bytes, timeout_s: float) -> None:
    """Send server-sent events, ``first`` and then the others; an ``ApiError`` of theirs is the last one.

    A caller that does not take an event within ``timeout_s`` is given up: the answer ends without its end.
    """
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        # Reverse proxies that keep an answer until it is whole would make one piece of it.
        (b"x-accel-buffering", b"no"),
    ]

    async def send_body(body: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(timeout_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})

    try:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send_body(first)
        try:
            async for one in events:
                await send_body(one)
        except ApiError as error:
            await send_body(event(error.body))
        await send_body(b"", more=False)
    except TimeoutError:
        _LOG.warning("%s: no event was taken for %g s; the caller is given up", REQUEST_ID.get(), timeout_s)
