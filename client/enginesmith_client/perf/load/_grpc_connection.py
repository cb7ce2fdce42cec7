"""Calls of gRPC over one connection, for whoever measures: as little work for a call as Python can do.

grpc.aio takes several times the CPU for a call that this module does (see benchmarks/results/generator.json), which on a
machine that the server shares decides what can be held. It does what measuring needs and no more: one request message a call, no
compression, no retries, no name resolution beyond the system's.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from enginesmith_client._address import Address
from enginesmith_client._settings import Tls, ssl_context
from enginesmith_client.perf.load import _http2_frames as http2
from enginesmith_client.perf.load._http2_frames import FramingError

_NS = 1_000_000_000
_REPLENISH_BYTES = 2**30
_GRPC_DEADLINE_EXCEEDED = 4
_REFUSAL_PAUSE_S = 0.002
_MAX_REFUSALS = 10
_CLOSE_S = 1.0
"""How long what was written may take to leave when a connection is closed: a server that stands still takes nothing."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ended."""

    code: int | None
    """gRPC's number; None: the connection was not there, or broke."""
    words: str = ""
    unsent: bool = False
    """Whether it is certain that the server did not get the request."""


OK = Status(0)


class Exchange:
    """One call: what is sent, and what came of it so far. Times are absolute nanoseconds of the monotonic clock."""

    __slots__ = (
        "came",
        "connection",
        "data",
        "ended_ns",
        "left",
        "message",
        "over",
        "path",
        "refusals",
        "sent_ns",
        "stream",
        "window_bytes",
    )

    def __init__(self, path: bytes, data: bytes, over: asyncio.Future[Status]) -> None:
        self.path = path
        """The header block of its method."""
        self.message = memoryview(data)
        self.left = self.message
        """What is still to be sent."""
        self.over = over
        self.refusals = 0
        self.stream = 0
        self.connection: _Connection | None = None
        self.window_bytes = 0
        self.sent_ns = 0
        self.ended_ns = 0
        self.came: list[tuple[int, bytes]] = []
        """The messages and when they came."""
        self.data = bytearray()
        """Of a message that is not whole yet."""

    def end(self, status: Status, now_ns: int) -> None:
        """It is over. Only the first status counts."""
        self.message = self.left = memoryview(b"")
        self.data = bytearray()
        if not self.over.done():
            self.ended_ns = now_ns
            self.over.set_result(status)

    def cancel(self) -> None:
        """Tell the server that nobody waits for the rest, if there is a rest."""
        if self.connection is not None:
            self.connection.forget(self)


class GrpcConnection:
    """Calls to one server, over one connection that is made when it is needed, and again when it broke.

    Belongs to the event loop in which it is used. ``timeout_s`` is of every call.
    """

    def __init__(
        self,
        address: Address,
        *,
        timeout_s: float,
        headers: Mapping[str, str],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._address = address
        self._timeout_ns = round(timeout_s * _NS)
        self._headers = headers
        self._clock = clock
        self._paths: dict[str, bytes] = {}
        self._connection: _Connection | None = None
        self._left: list[_Connection] = []
        """Earlier ones on which no call begins any more, and some may still go on."""
        self._connecting: asyncio.Task[None] | None = None
        self._waiting: deque[Exchange] = deque()
        self._expiring: deque[tuple[int, Exchange]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def connect(self, *, timeout_s: float) -> bool:
        """Whether the server could be reached in time."""
        self._connect()
        assert self._connecting is not None
        await asyncio.wait({self._connecting}, timeout=timeout_s)
        return self._connection is not None and self._connection.usable

    def call(self, method: str, message: bytes) -> Exchange:
        """Begin a call with one request message. What becomes of it is in ``Exchange.over``."""
        loop = asyncio.get_running_loop()
        exchange = Exchange(self._path(method), http2.framed(message), loop.create_future())
        now_ns = self._clock()
        exchange.sent_ns = now_ns
        if self._closed:
            exchange.end(Status(1, "the connection was closed"), now_ns)
            return exchange
        self._expire_later(now_ns + self._timeout_ns, exchange)
        connection = self._connection
        if connection is not None and connection.usable:
            connection.send(exchange)
        else:
            self._waiting.append(exchange)
            self._connect()
        return exchange

    async def close(self) -> None:
        """End the connection; calls that are not over are cancelled."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        for connection in (*self._left, *((self._connection,) if self._connection else ())):
            await connection.close()
        while self._waiting:
            self._waiting.popleft().end(Status(1, "the connection was closed"), self._clock())

    def _path(self, method: str) -> bytes:
        block = self._paths.get(method)
        if block is None:
            own = (
                (":method", "POST"),
                (":scheme", "https" if self._address.encrypted else "http"),
                (":path", method),
                (":authority", self._address.authority),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("user-agent", "enginesmith-client"),
                # The same for all calls, so that their headers are the same bytes; eight digits at most.
                ("grpc-timeout", f"{max(1, self._timeout_ns // 1_000_000)}m"),
            )
            block = self._paths[method] = http2.header_block((*own, *self._headers.items()))
        return block

    def _connect(self) -> None:
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.ensure_future(self._make_connection())

    async def _make_connection(self) -> None:
        if self._connection is not None and self._connection.usable:
            return
        address = self._address
        context = None
        if address.encrypted:
            context = ssl_context(Tls())
            context.set_alpn_protocols(["h2"])
        loop = asyncio.get_running_loop()
        try:
            _, made = await loop.create_connection(
                lambda: _Connection(self._clock), address.host, address.port, ssl=context
            )
        except OSError as error:
            self._refuse(str(error))
            return
        self._left = [one for one in (*self._left, self._connection) if one is not None and not one.lost]
        self._connection = made
        while self._waiting:
            exchange = self._waiting.popleft()
            # Connecting may have taken longer than the call was to be waited for.
            if not exchange.over.done():
                made.send(exchange)

    def _refuse(self, words: str) -> None:
        now_ns = self._clock()
        while self._waiting:
            self._waiting.popleft().end(Status(None, words, unsent=True), now_ns)

    def _expire_later(self, at_ns: int, exchange: Exchange) -> None:
        # The time-out is the same for all, so they expire in the order in which they were sent: one timer is enough.
        # Those that are over leave a few at a time: all at once, the many of a whole time-out would hold up the next ones.
        while self._expiring and self._expiring[0][1].over.done():
            self._expiring.popleft()
        self._expiring.append((at_ns, exchange))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_ns / _NS, self._expire)

    def _expire(self) -> None:
        now_ns = self._clock()
        while self._expiring and (self._expiring[0][0] <= now_ns or self._expiring[0][1].over.done()):
            exchange = self._expiring.popleft()[1]
            if not exchange.over.done():
                exchange.cancel()
                exchange.end(Status(_GRPC_DEADLINE_EXCEEDED, "Deadline Exceeded"), now_ns)
        self._timer = None
        if self._expiring:
            left_s = max(0, self._expiring[0][0] - now_ns) / _NS
            self._timer = asyncio.get_running_loop().call_later(left_s, self._expire)


class _Connection(asyncio.Protocol):
    """The two ends of one TCP connection."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._lost = asyncio.get_running_loop().create_future()
        self._leaving = ""
        """Why no more calls may begin here."""
        self._came = bytearray()
        self._blocks = http2.HeaderBlocks()
        self._block: tuple[int, int, bytes] | None = None
        """Stream, flags and the beginning of headers that go on in the next frame."""
        self._exchanges: dict[int, Exchange] = {}
        self._next_stream = 1
        self._most_streams = http2.MAX_WINDOW_BYTES
        self._window_bytes = http2.DEFAULT_WINDOW_BYTES
        self._stream_window_bytes = http2.DEFAULT_WINDOW_BYTES
        self._frame_bytes = http2.DEFAULT_FRAME_BYTES
        self._taken_bytes = 0
        self._held: deque[Exchange] = deque()
        """Calls that wait for room: a stream, or bytes that the server takes."""

    @property
    def usable(self) -> bool:
        """Whether calls can begin here."""
        return self._transport is not None and not self._leaving

    @property
    def lost(self) -> bool:
        """Whether it is over, and nothing goes on here."""
        return self._lost.done()

    async def close(self) -> None:
        """End it, and all that is under way."""
        self._leaving = self._leaving or "the connection was closed"
        self._end_unbegun(Status(1, "the connection was closed"), self._clock())
        for exchange in list(self._exchanges.values()):
            self.forget(exchange)
            exchange.end(Status(1, "the connection was closed"), self._clock())
        if self._transport is not None:
            self._transport.close()
            await asyncio.wait({self._lost}, timeout=_CLOSE_S)
        if self._transport is not None:
            self._transport.abort()
            await self._lost

    def send(self, exchange: Exchange) -> None:
        """Begin the call, now or when there is room."""
        exchange.connection = self
        if self._held or len(self._exchanges) >= self._most_streams:
            self._held.append(exchange)
            return
        self._begin(exchange)

    def forget(self, exchange: Exchange) -> None:
        """Nobody waits for the call any more."""
        exchange.connection = None
        if exchange.left and exchange in self._held:
            self._held.remove(exchange)
        if self._exchanges.pop(exchange.stream, None) is not None:
            self._write(http2.reset(exchange.stream))
            self._send_held()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As ``asyncio.Protocol``."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._write(http2.greeting())

    def connection_lost(self, exc: Exception | None) -> None:
        """As ``asyncio.Protocol``: whatever is under way is over."""
        self._transport = None
        words = self._leaving or (str(exc) if exc else "the server closed the connection")
        now_ns = self._clock()
        for exchange in (*self._exchanges.values(), *self._held):
            exchange.connection = None
            exchange.end(Status(None, words, unsent=not exchange.stream), now_ns)
        self._exchanges.clear()
        self._held.clear()
        if not self._lost.done():
            self._lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        """As ``asyncio.Protocol``."""
        now_ns = self._clock()
        self._came += data
        try:
            for kind, flags, stream, payload in http2.take_frames(self._came):
                self._take(kind, flags, stream, payload, now_ns)
        except FramingError as error:
            self._leaving = f"the server does not speak gRPC over HTTP/2: {error}"
            if self._transport is not None:
                self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _begin(self, exchange: Exchange) -> None:
        exchange.stream = self._next_stream
        self._next_stream += 2
        exchange.window_bytes = self._stream_window_bytes
        self._exchanges[exchange.stream] = exchange
        exchange.sent_ns = self._clock()
        headers = http2.frame(http2.HEADERS, http2.END_HEADERS, exchange.stream, exchange.path)
        self._write(headers + self._more(exchange))
        if exchange.left:
            self._held.append(exchange)

    def _more(self, exchange: Exchange) -> bytes:
        """The frames of as much of the request as the server takes now."""
        frames = []
        while exchange.left:
            size = min(len(exchange.left), self._frame_bytes, self._window_bytes, exchange.window_bytes)
            if size <= 0:
                break
            part, exchange.left = exchange.left[:size], exchange.left[size:]
            self._window_bytes -= size
            exchange.window_bytes -= size
            flags = 0 if exchange.left else http2.END_STREAM
            frames.append(http2.frame(http2.DATA, flags, exchange.stream, bytes(part)))
        return b"".join(frames)

    def _send_held(self) -> None:
        """What waited for room, in its order. One that still has none does not hold up those that do."""
        for _ in range(len(self._held)):
            exchange = self._held.popleft()
            if exchange.stream:
                self._write(self._more(exchange))
                if exchange.left:
                    self._held.append(exchange)
            elif len(self._exchanges) < self._most_streams:
                self._begin(exchange)
            else:
                self._held.append(exchange)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes, now_ns: int) -> None:
        if kind == http2.DATA:
            self._take_data(flags, stream, payload, now_ns)
        elif kind in (http2.HEADERS, http2.CONTINUATION):
            self._take_headers(kind, flags, stream, payload, now_ns)
        elif kind == http2.WINDOW_UPDATE:
            self._take_window(stream, http2.number_of(payload))
        elif kind == http2.SETTINGS and not flags & http2.ACK:
            self._take_settings(payload)
        elif kind == http2.PING and not flags & http2.ACK:
            self._write(http2.frame(http2.PING, http2.ACK, 0, payload))
        elif kind == http2.RST_STREAM:
            self._take_reset(stream, http2.number_of(payload), now_ns)
        elif kind == http2.GOAWAY:
            self._take_goaway(payload, now_ns)

    def _take_data(self, flags: int, stream: int, payload: bytes, now_ns: int) -> None:
        self._taken_bytes += len(payload)
        if self._taken_bytes >= _REPLENISH_BYTES:
            self._write(http2.window_update(0, self._taken_bytes))
            self._taken_bytes = 0
        exchange = self._exchanges.get(stream)
        if exchange is None:
            return
        exchange.data += http2.unpadded(http2.DATA, flags, payload)
        for message in http2.take_messages(exchange.data):
            exchange.came.append((now_ns, message))
        if flags & http2.END_STREAM:
            self._ended(stream, Status(None, "the server ended the stream without a status"), now_ns)

    def _take_headers(self, kind: int, flags: int, stream: int, payload: bytes, now_ns: int) -> None:
        if kind == http2.HEADERS:
            begun = (stream, flags, http2.unpadded(kind, flags, payload))
        elif self._block is not None and self._block[0] == stream:
            begun = (stream, self._block[1], self._block[2] + payload)
        else:
            raise FramingError("headers go on that did not begin")
        self._block = None if flags & http2.END_HEADERS else begun
        # The headers before the messages say nothing that is needed.
        if self._block is None and begun[1] & http2.END_STREAM:
            code, words = http2.status_of(self._blocks.read(begun[2]))
            self._ended(stream, OK if code == 0 else Status(code, words), now_ns)

    def _take_window(self, stream: int, more_bytes: int) -> None:
        if stream == 0:
            self._window_bytes += more_bytes
        elif stream in self._exchanges:
            self._exchanges[stream].window_bytes += more_bytes
        if self._held:
            self._send_held()

    def _take_settings(self, payload: bytes) -> None:
        for name, value in http2.settings_of(payload):
            if name == http2.INITIAL_WINDOW_SIZE:
                for exchange in self._exchanges.values():
                    exchange.window_bytes += value - self._stream_window_bytes
                self._stream_window_bytes = value
            elif name == http2.MAX_CONCURRENT_STREAMS:
                self._most_streams = value
            elif name == http2.MAX_FRAME_SIZE:
                self._frame_bytes = value
        self._write(http2.frame(http2.SETTINGS, http2.ACK, 0))
        self._send_held()

    def _take_reset(self, stream: int, error: int, now_ns: int) -> None:
        refused = error == http2.REFUSED_STREAM
        exchange = self._exchanges.get(stream)
        again = refused and not self._leaving
        if again and exchange is not None and exchange.refusals < _MAX_REFUSALS:
            # The server did not look at it (RFC 9113, 8.7): it counts streams as open that are over here already.
            del self._exchanges[stream]
            if exchange in self._held:
                self._held.remove(exchange)
            exchange.refusals += 1
            exchange.stream, exchange.left = 0, exchange.message
            self._held.appendleft(exchange)
            asyncio.get_running_loop().call_later(_REFUSAL_PAUSE_S, self._send_held)
            return
        self._ended(
            stream,
            Status(None, f"the server reset the stream (HTTP/2 error {error})", unsent=refused),
            now_ns,
        )

    def _take_goaway(self, payload: bytes, now_ns: int) -> None:
        self._leaving = "the server is going away"
        last = http2.number_of(payload)
        status = Status(None, self._leaving, unsent=True)
        self._end_unbegun(status, now_ns)
        for exchange in [one for one in self._exchanges.values() if one.stream > last]:
            self._ended(exchange.stream, status, now_ns)

    def _end_unbegun(self, status: Status, now_ns: int) -> None:
        """Before the others end, which would give these room to begin."""
        for exchange in [one for one in self._held if not one.stream]:
            self._held.remove(exchange)
            exchange.connection = None
            exchange.end(status, now_ns)

    def _ended(self, stream: int, status: Status, now_ns: int) -> None:
        exchange = self._exchanges.pop(stream, None)
        if exchange is None:
            return
        exchange.connection = None
        if exchange.left and status.code is not None:
            # An answer before the whole request was sent: the rest is not wanted.
            self._write(http2.reset(stream))
        exchange.end(status, now_ns)
        if self._held:
            self._send_held()
