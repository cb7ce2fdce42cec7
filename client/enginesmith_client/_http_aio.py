"""The HTTP transport for tasks, over aiohttp (the extra ``http-async``)."""

from __future__ import annotations

import asyncio
import io
import math
from collections import deque
from typing import TYPE_CHECKING, Any

from enginesmith_client._address import Address
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import Call, InvalidInput, TritonClientError, error_from_status
from enginesmith_client._event_loop import OwnLoop
from enginesmith_client._flow_aio import run_async
from enginesmith_client._http import call_of
from enginesmith_client._http_encoding import compressed, decompressed
from enginesmith_client._http_events import (
    EventReader,
    http_from_stream_request,
    raise_for_stream_status,
    reply_from_event,
)
from enginesmith_client._http_messages import HttpAnswer, HttpCall, http_from_operation, reply_from_http
from enginesmith_client._messages import InferReply, InferRequest
from enginesmith_client._operations import Infer, Operation
from enginesmith_client._process import OwnProcess
from enginesmith_client._settings import ConnectionSettings, Tls, ssl_context
from enginesmith_client._sharing import shared_memory_over

if TYPE_CHECKING:
    import aiohttp


class AsyncHttpTransport:
    """Speaks KServe v2 with Triton's extensions over HTTP/1.1."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        self._process = OwnProcess()
        self._loop = OwnLoop()
        self._wire = _Wire(address, settings)
        self._memory = shared_memory_over(self._wire, settings)

    async def perform(self, operation: Operation, deadline: Deadline) -> Any:
        """As ``AsyncTransport.perform``."""
        self._process.require()
        self._loop.require()
        if self._memory is not None and type(operation) is Infer:
            return await run_async(self._memory.infer(operation, deadline))
        return await self._wire.perform(operation, deadline)

    async def open(self, request: InferRequest, deadline: Deadline) -> AsyncHttpReplyStream:
        """As ``AsyncTransport.open``."""
        self._process.require()
        self._loop.require()
        return await self._wire.open(request, deadline)

    async def close(self) -> None:
        """As ``AsyncTransport.close``."""
        if not self._process.is_this:
            return
        if self._memory is not None:
            await run_async(self._memory.release())
        await self._wire.close()


class _Wire:
    """The connections, made in the event loop that first uses them."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        self._aiohttp = _imported_aiohttp()
        encrypted = address.encrypted or settings.tls is not None
        tls = settings.tls or Tls()
        self._ssl = ssl_context(tls) if encrypted else None
        self._server_name = tls.server_name
        self.name = f"http{'s' if encrypted else ''}://{address.authority}{address.base_path}"
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None
        self.closed = False

    async def perform(self, operation: Operation, deadline: Deadline) -> Any:
        call = call_of(self.name, operation, deadline)
        http_call = compressed(http_from_operation(operation), self._settings.compression)
        try:
            async with await self._ask(http_call, deadline) as response:
                answer = await _answer(response)
        except self.failures as error:
            raise self.failure(error, call) from error
        return reply_from_http(operation, decompressed(answer), call)

    async def open(self, request: InferRequest, deadline: Deadline) -> AsyncHttpReplyStream:
        call = call_of(self.name, Infer(request), deadline)
        http_call = http_from_stream_request(request)
        try:
            response = await self._ask(http_call, deadline)
            if response.status != 200:
                async with response:
                    raise_for_stream_status(await _answer(response), call)
        except self.failures as error:
            raise self.failure(error, call) from error
        return AsyncHttpReplyStream(response, request, call, wire=self)

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What aiohttp raises; RuntimeError says that the session was closed."""
        return (self._aiohttp.ClientError, asyncio.TimeoutError, OSError, RuntimeError)

    def failure(self, error: Exception, call: Call) -> TritonClientError:
        """What an exception of aiohttp means."""
        if self.closed:
            return error_from_status("cancelled", "the client was closed", call=call)
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
            return error_from_status("deadline", str(error), call=call)
        said = str(error) or type(error).__name__
        connected = not isinstance(error, self._aiohttp.ClientConnectorError)
        return error_from_status("broken" if connected else "unreachable", said, call=call)

    async def close(self) -> None:
        self.closed = True
        if self._session is not None:
            await self._session.close()

    async def _ask(self, http_call: HttpCall, deadline: Deadline) -> aiohttp.ClientResponse:
        """The answer as far as its headers; its body, too, is over when the deadline is."""
        import yarl

        return await self._connected().request(
            http_call.method,
            yarl.URL(self.name + http_call.path, encoded=True),
            # As a file, because aiohttp warns of large bodies that are bytes.
            data=io.BytesIO(http_call.body) if http_call.body else None,
            headers=dict(http_call.headers),
            timeout=self._aiohttp.ClientTimeout(deadline.remaining_s(), ceil_threshold=math.inf),
            allow_redirects=False,
            server_hostname=self._server_name,
        )

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = self._aiohttp.TCPConnector(limit=0, ssl=self._ssl if self._ssl else True)
            self._session = self._aiohttp.ClientSession(
                connector=connector,
                headers=dict(self._settings.headers),
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
                auto_decompress=False,
                cookie_jar=self._aiohttp.DummyCookieJar(),
            )
        return self._session


class AsyncHttpReplyStream:
    """The answers to one request."""

    def __init__(
        self, response: aiohttp.ClientResponse, request: InferRequest, call: Call, *, wire: _Wire
    ) -> None:
        self._response = response
        self._request = request
        self._call = call
        self._wire = wire
        self._reader = EventReader()
        self._events: deque[bytes] = deque()
        self._ended = False

    async def receive(self) -> InferReply | None:
        """As ``AsyncReplyStream.receive``."""
        if self._ended:
            return None
        try:
            event = await self._next_event()
            reply = None if event is None else reply_from_event(event, self._request, self._call)
        except self._wire.failures as error:
            if self._ended:
                return None
            await self.close()
            raise self._wire.failure(error, self._call) from error
        except BaseException:
            await self.close()
            raise
        if reply is None:
            self._ended = True
            self._response.release()
        return reply

    async def close(self) -> None:
        """As ``AsyncReplyStream.close``. Triton notices it when it next sends something."""
        if not self._ended:
            self._ended = True
            self._response.close()

    async def _next_event(self) -> bytes | None:
        while not self._events:
            data = await self._response.content.readany()
            if not data:
                if self._reader.in_an_event:
                    raise error_from_status("broken", "the answer ended within a piece", call=self._call)
                return None
            self._events += self._reader.feed(data)
        return self._events.popleft()


async def _answer(response: aiohttp.ClientResponse) -> HttpAnswer:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return HttpAnswer(response.status, headers, await response.read())


def _imported_aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError as error:
        raise InvalidInput(
            "an AsyncClient over HTTP needs aiohttp, which is not installed",
            hint="pip install 'enginesmith-client[http-async]', or use a grpc:// address",
        ) from error
    return aiohttp
