"""Our own gRPC connection against servers of grpcio, and its reading of frames that no server here sends."""

import asyncio
import contextlib
import gc
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent import futures
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith_client._address import address_from_url
from enginesmith_client.perf.load import _http2_frames as http2
from enginesmith_client.perf.load._grpc_connection import OK, Exchange, GrpcConnection, Status

Result = TypeVar("Result")
Acts = dict[str, Callable[[bytes, Any], Any]]
LARGE = bytes(range(256)) * 4096
"""A MiB: many frames, and more than a server takes without being asked to go on."""


@contextlib.contextmanager
def served(acts: Acts, *, options: tuple[tuple[str, int], ...] = ()) -> Iterator[tuple[str, Any]]:
    """A gRPC server whose methods take and give bytes; those whose names end in ``s`` give streams."""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            name = details.method.rpartition("/")[2]
            if name not in acts:
                return None
            kind = (
                grpc.unary_stream_rpc_method_handler
                if name.endswith("s")
                else grpc.unary_unary_rpc_method_handler
            )
            return kind(acts[name])

    server = grpc.server(futures.ThreadPoolExecutor(16), options=options)
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}", server
    finally:
        server.stop(None).wait(10)


def connected(
    url: str,
    act: Callable[[GrpcConnection], Awaitable[Result]],
    *,
    timeout_s: float = 20,
    headers: dict[str, str] | None = None,
) -> Result:
    async def main() -> Result:
        connection = GrpcConnection(address_from_url(url), timeout_s=timeout_s, headers=headers or {})
        try:
            return await act(connection)
        finally:
            await connection.close()

    return asyncio.run(main())


async def asked(connection: GrpcConnection, method: str, message: bytes = b"") -> tuple[Status, list[bytes]]:
    exchange = connection.call(f"/test/{method}", message)
    status = await exchange.over
    assert exchange.sent_ns <= exchange.ended_ns
    return status, [message for _, message in exchange.came]


def echo(message: bytes, _: Any) -> bytes:
    return message


@pytest.mark.parametrize("message", [b"", b"hello", LARGE], ids=["empty", "small", "large"])
def test_a_message_comes_back_as_it_went(message: bytes) -> None:
    with served({"echo": echo}) as (url, _):
        assert connected(url, lambda one: asked(one, "echo", message)) == (OK, [message])


def test_many_large_calls_at_once_share_what_the_server_takes() -> None:
    async def act(connection: GrpcConnection) -> list[tuple[Status, list[bytes]]]:
        return await asyncio.gather(*(asked(connection, "echo", bytes([one]) + LARGE) for one in range(8)))

    with served({"echo": echo}) as (url, _):
        assert connected(url, act) == [(OK, [bytes([one]) + LARGE]) for one in range(8)]


def test_a_server_that_takes_few_calls_at_once_gets_them_one_after_the_other() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def counted(message: bytes, _: Any) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.005)
        with lock:
            running -= 1
        return message

    async def act(connection: GrpcConnection) -> list[tuple[Status, list[bytes]]]:
        await asked(connection, "counted")
        return await asyncio.gather(*(asked(connection, "counted", bytes([one])) for one in range(20)))

    with served({"counted": counted}, options=(("grpc.max_concurrent_streams", 2),)) as (url, _):
        assert connected(url, act) == [(OK, [bytes([one])]) for one in range(20)]
    assert most <= 2


def test_the_messages_of_a_stream_come_in_their_order() -> None:
    def counts(message: bytes, _: Any) -> Iterator[bytes]:
        return (b"%d" % one for one in range(int(message)))

    with served({"counts": counts}) as (url, _):
        assert connected(url, lambda one: asked(one, "counts", b"500")) == (
            OK,
            [b"%d" % one for one in range(500)],
        )


def test_the_status_of_a_server_arrives_with_its_words() -> None:
    def refused(_: bytes, context: Any) -> bytes:
        return bytes(context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "voll: 100 % — später\n"))

    with served({"refused": refused}) as (url, _):
        status, _ = connected(url, lambda one: asked(one, "refused"))
        assert status == Status(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "voll: 100 % — später\n")
        status, _ = connected(url, lambda one: asked(one, "nothing"))
    assert status.code == grpc.StatusCode.UNIMPLEMENTED.value[0]


def test_the_server_sees_the_headers_and_the_deadline() -> None:
    seen: list[Any] = []

    def seeing(message: bytes, context: Any) -> bytes:
        seen.append((dict(context.invocation_metadata())["x-run"], context.time_remaining()))
        return message

    with served({"seeing": seeing}) as (url, _):
        connected(url, lambda one: asked(one, "seeing"), headers={"x-run": "7"}, timeout_s=30)
    assert seen[0][0] == "7"
    assert 0 < seen[0][1] <= 30


def test_a_call_that_takes_too_long_ends_and_the_server_is_told() -> None:
    told, release = threading.Event(), threading.Event()

    def waiting(message: bytes, context: Any) -> bytes:
        context.add_callback(told.set)
        release.wait(20)
        return message

    async def act(connection: GrpcConnection) -> tuple[Status, Status]:
        late, _ = await asked(connection, "waiting")
        in_time, _ = await asked(connection, "echo")
        return late, in_time

    with served({"waiting": waiting, "echo": echo}) as (url, _):
        late, in_time = connected(url, act, timeout_s=0.2)
        assert told.wait(20)
        release.set()
    assert (late.code, in_time) == (grpc.StatusCode.DEADLINE_EXCEEDED.value[0], OK)


def test_a_call_that_is_cancelled_is_cancelled_on_the_server() -> None:
    begun, told = threading.Event(), threading.Event()

    def waiting(message: bytes, context: Any) -> bytes:
        context.add_callback(told.set)
        begun.set()
        assert told.wait(20)
        return message

    async def act(connection: GrpcConnection) -> tuple[Status, list[bytes]]:
        exchange: Exchange = connection.call("/test/waiting", b"")
        await asyncio.to_thread(begun.wait, 20)
        exchange.cancel()
        assert await asyncio.to_thread(told.wait, 20)
        return await asked(connection, "echo", b"on")

    with served({"waiting": waiting, "echo": echo}) as (url, _):
        assert connected(url, act) == (OK, [b"on"])


def test_a_server_that_went_away_fails_what_is_under_way_and_is_found_again() -> None:
    begun = threading.Event()

    def waiting(_: bytes, context: Any) -> bytes:
        begun.set()
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(20)
        return b""

    async def act(connection: GrpcConnection, server: Any, port: int) -> tuple[Status, Status, Status]:
        exchange = connection.call("/test/waiting", b"")
        await asyncio.to_thread(begun.wait, 20)
        await asyncio.to_thread(server.stop(None).wait, 20)
        broken = await exchange.over
        refused, _ = await asked(connection, "echo")
        again = grpc.server(futures.ThreadPoolExecutor(2))
        again.add_generic_rpc_handlers((_Echo(),))
        assert again.add_insecure_port(f"127.0.0.1:{port}") == port
        again.start()
        found, _ = await asked(connection, "echo")
        await asyncio.to_thread(again.stop(None).wait, 20)
        return broken, refused, found

    with served({"waiting": waiting}) as (url, server):
        port = address_from_url(url).port
        broken, refused, found = connected(url, lambda one: act(one, server, port))
    assert broken != OK
    assert (refused.code, refused.unsent) == (None, True)
    assert found == OK


class _Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, _: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(echo)


def test_a_server_that_speaks_something_else_is_an_answer_and_not_a_hang() -> None:
    async def main() -> Status:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" + bytes(64))
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        connection = GrpcConnection(address_from_url(f"grpc://127.0.0.1:{port}"), timeout_s=20, headers={})
        try:
            return (await asked(connection, "echo"))[0]
        finally:
            await connection.close()
            server.close()
            await server.wait_closed()

    status = asyncio.run(main())
    assert status.code is None


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def against(
    serve: Serve, act: Callable[[GrpcConnection], Coroutine[Any, Any, Result]], *, timeout_s: float = 20
) -> Result:
    """What ``act`` comes to with a server that is written frame by frame; its connections are gone afterwards."""

    async def main() -> Result:
        writers: list[asyncio.StreamWriter] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await serve(reader, writer)

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        connection = GrpcConnection(
            address_from_url(f"grpc://127.0.0.1:{port}"), timeout_s=timeout_s, headers={}
        )
        try:
            return await asyncio.wait_for(act(connection), 20)
        finally:
            await connection.close()
            for writer in writers:
                writer.transport.abort()
            server.close()
            await server.wait_closed()

    return asyncio.run(main())


async def next_frame(reader: asyncio.StreamReader, *kinds: int) -> http2.Frame:
    """The next frame of one of ``kinds``; others are passed over."""
    while True:
        head = await reader.readexactly(http2.FRAME_HEAD_BYTES)
        payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
        if head[3] in kinds:
            return head[3], head[4], int.from_bytes(head[5:], "big"), payload


def settings(**values: int) -> bytes:
    """The first frame of a server, with settings by the names of ``_http2_frames``."""
    pairs = ((getattr(http2, name), value) for name, value in values.items())
    return http2.frame(http2.SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def answered(stream: int) -> bytes:
    """An empty message, and that all is well."""
    block = http2.header_block([("grpc-status", "0")])
    return http2.frame(http2.DATA, 0, stream, http2.framed(b"")) + http2.frame(
        http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, block
    )


def test_a_server_that_goes_away_gets_no_call_any_more_and_the_next_ones_find_another_connection() -> None:
    begun: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun.append(0)
        await reader.readexactly(24)
        writer.write(settings(MAX_CONCURRENT_STREAMS=2))
        if len(begun) == 1:
            writer.write(answered((await next_frame(reader, http2.HEADERS))[2]))
            streams = [(await next_frame(reader, http2.HEADERS))[2] for _ in range(2)]
            # It has looked at the first of two, and a third waits for room.
            writer.write(http2.frame(http2.GOAWAY, 0, 0, struct.pack(">II", streams[0], 0)))
            begun[0] = (await next_frame(reader, http2.HEADERS))[2]
        while True:
            writer.write(answered((await next_frame(reader, http2.HEADERS))[2]))

    async def act(connection: GrpcConnection) -> list[Status]:
        await asked(connection, "echo")
        first, *others = [connection.call("/test/echo", b"") for _ in range(3)]
        unsent = [await one.over for one in others]
        later = await connection.call("/test/echo", b"").over
        # Still under way on a connection that nothing else begins on.
        assert not first.over.done()
        return [*unsent, later]

    assert against(serve, act) == [Status(None, "the server is going away", unsent=True)] * 2 + [OK]
    assert begun == [0, 0]


def test_a_server_that_takes_nothing_does_not_keep_a_connection_from_closing() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24)
        most = http2.MAX_WINDOW_BYTES - http2.DEFAULT_WINDOW_BYTES
        writer.write(settings(INITIAL_WINDOW_SIZE=http2.MAX_WINDOW_BYTES) + http2.window_update(0, most))
        await next_frame(reader, http2.HEADERS)

    async def act(connection: GrpcConnection) -> Status:
        connection.call("/test/echo", LARGE * 32)
        await asyncio.sleep(0)
        status: Status = await connection.call("/test/echo", b"").over
        return status

    assert against(serve, act, timeout_s=0.3).code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


def test_what_is_cancelled_half_way_is_not_sent_on() -> None:
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24)
        writer.write(settings(INITIAL_WINDOW_SIZE=1000))
        _, _, cancelled, _ = await next_frame(reader, http2.RST_STREAM)
        writer.write(http2.window_update(cancelled, 1000))
        _, _, stream, _ = await next_frame(reader, http2.HEADERS, http2.DATA)
        seen.extend((cancelled, stream))
        writer.write(answered(stream))

    async def act(connection: GrpcConnection) -> Status:
        exchange = connection.call("/test/echo", LARGE)
        while exchange.connection is None:
            await asyncio.sleep(0)
        exchange.cancel()
        return (await asked(connection, "echo"))[0]

    assert against(serve, act) == OK
    assert seen == [1, 3]


def test_calls_that_are_over_are_forgotten_before_their_time_is() -> None:
    async def act(connection: GrpcConnection) -> int:
        for _ in range(100):
            await asked(connection, "echo")
        return sum(type(one) is Exchange for one in gc.get_objects())

    with served({"echo": echo}) as (url, _):
        assert connected(url, act) < 10


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 255), st.integers(0, 2**31 - 1), st.binary(max_size=40))
    ),
    st.data(),
)
def test_frames_are_taken_whole_however_they_are_cut(frames: list[http2.Frame], data: st.DataObject) -> None:
    sent = b"".join(http2.frame(*one) for one in frames)
    buffer, taken = bytearray(), []
    while sent:
        size = data.draw(st.integers(1, len(sent)))
        buffer += sent[:size]
        sent = sent[size:]
        taken += list(http2.take_frames(buffer))
    assert taken == frames
    assert not buffer


@given(st.lists(st.binary(max_size=40)), st.integers(1, 20))
def test_messages_are_taken_whole_however_they_are_cut(messages: list[bytes], size: int) -> None:
    sent, buffer, taken = b"".join(http2.framed(one) for one in messages), bytearray(), []
    for start in range(0, len(sent), size):
        buffer += sent[start : start + size]
        taken += list(http2.take_messages(buffer))
    assert taken == messages


def test_padding_and_priority_are_no_part_of_a_payload() -> None:
    assert http2.unpadded(http2.DATA, http2.PADDED, b"\x02abc\0\0") == b"abc"
    assert http2.unpadded(http2.HEADERS, http2.PRIORITY, b"12345abc") == b"abc"
    with pytest.raises(http2.FramingError, match="padding"):
        http2.unpadded(http2.DATA, http2.PADDED, b"\x09abc")


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z-]{0,10}", fullmatch=True),
        st.text(st.characters(min_codepoint=33, max_codepoint=126)),
        max_size=5,
    )
)
def test_headers_mean_the_same_on_every_stream(headers: dict[str, str]) -> None:
    block = http2.header_block(headers.items())
    blocks = http2.HeaderBlocks()
    assert [blocks.read(block), blocks.read(block)] == [headers, headers]
    assert http2.HeaderBlocks().read(block) == headers


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: list(http2.take_messages(bytearray(b"\x01\0\0\0\x01x"))), "compressed"),
        (lambda: list(http2.settings_of(b"12345")), "multiple"),
        (lambda: http2.number_of(b"12"), "number"),
        (lambda: http2.HeaderBlocks().read(b"\xff\xff"), "headers"),
    ],
    ids=["compressed", "settings", "number", "headers"],
)  # fmt: skip
def test_bytes_that_are_not_http2_are_an_error(broken: Callable[[], object], message: str) -> None:
    with pytest.raises(http2.FramingError, match=message):
        broken()


def test_an_answer_without_a_status_is_not_one_of_grpc() -> None:
    assert http2.status_of({":status": "404"}) == (2, "no gRPC status came, but HTTP status 404")
