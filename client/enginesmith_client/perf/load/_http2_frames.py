"""The frames of HTTP/2 and the messages of gRPC in them, as bytes. Pure.

Sources: RFC 9113 (frames), RFC 7541 (header compression, by the library hpack), and gRPC's "gRPC over HTTP2".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeAlias
from urllib.parse import unquote

import hpack
from hpack.exceptions import HPACKError

DATA: Final = 0
HEADERS: Final = 1
RST_STREAM: Final = 3
SETTINGS: Final = 4
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5

DEFAULT_WINDOW_BYTES: Final = 65_535
DEFAULT_FRAME_BYTES: Final = 16_384
MAX_WINDOW_BYTES: Final = 2**31 - 1
REFUSED_STREAM: Final = 7
CANCEL: Final = 8
FRAME_HEAD_BYTES: Final = 9
MESSAGE_HEAD_BYTES: Final = 5

Frame: TypeAlias = tuple[int, int, int, bytes]
"""Kind, flags, stream, payload."""
Headers: TypeAlias = Mapping[str, str]

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD: Final = struct.Struct(">IBI")
_WORD: Final = struct.Struct(">I")
_SETTING: Final = struct.Struct(">HI")


class FramingError(Exception):
    """What came is not HTTP/2, or not gRPC in it."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return _HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


def greeting() -> bytes:
    """What a client sends first: it takes as much as comes, and wants headers that need no memory of earlier ones."""
    wanted = ((HEADER_TABLE_SIZE, 0), (INITIAL_WINDOW_SIZE, MAX_WINDOW_BYTES))
    settings = b"".join(_SETTING.pack(*one) for one in wanted)
    return (
        _PREFACE + frame(SETTINGS, 0, 0, settings) + window_update(0, MAX_WINDOW_BYTES - DEFAULT_WINDOW_BYTES)
    )


def window_update(stream: int, more_bytes: int) -> bytes:
    """The other side may send so many bytes more."""
    return frame(WINDOW_UPDATE, 0, stream, _WORD.pack(more_bytes))


def reset(stream: int) -> bytes:
    """Nobody waits for this stream any more."""
    return frame(RST_STREAM, 0, stream, _WORD.pack(CANCEL))


def number_of(payload: bytes) -> int:
    """The 31-bit number that a payload begins with.

    Raises:
        FramingError: it is shorter.
    """
    if len(payload) < _WORD.size:
        raise FramingError(f"a frame ends after {len(payload)} bytes of a number")
    return int(_WORD.unpack_from(payload)[0]) & MAX_WINDOW_BYTES


def settings_of(payload: bytes) -> Iterator[tuple[int, int]]:
    """The settings in a frame.

    Raises:
        FramingError: it does not hold whole ones.
    """
    if len(payload) % _SETTING.size:
        raise FramingError(f"a SETTINGS frame has {len(payload)} bytes, no multiple of {_SETTING.size}")
    return _SETTING.iter_unpack(payload)


def take_frames(buffer: bytearray) -> Iterator[Frame]:
    """The whole frames that ``buffer`` begins with, which are removed from it when all were taken."""
    at, have = 0, len(buffer)
    try:
        while have - at >= FRAME_HEAD_BYTES:
            head, flags, stream = _HEAD.unpack_from(buffer, at)
            end = at + FRAME_HEAD_BYTES + (head >> 8)
            if end > have:
                return
            payload = bytes(buffer[at + FRAME_HEAD_BYTES : end])
            at = end
            yield head & 0xFF, flags, stream & MAX_WINDOW_BYTES, payload
    finally:
        del buffer[:at]


def unpadded(kind: int, flags: int, payload: bytes) -> bytes:
    """The payload of a DATA or HEADERS frame without padding and priority.

    Raises:
        FramingError: it has more padding than bytes.
    """
    start, padding = (1, payload[0]) if flags & PADDED and payload else (0, 0)
    if kind == HEADERS and flags & PRIORITY:
        start += 5
    if start + padding > len(payload):
        raise FramingError(f"a frame of {len(payload)} bytes says that {padding} of them are padding")
    return payload[start : len(payload) - padding]


def header_block(headers: Iterable[tuple[str, str]]) -> bytes:
    """Headers such that the block means the same on every stream: nothing in it goes into the table of the other side."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    # The first block says that the table is empty, which need not be said again.
    encoder.encode([])
    return bytes(encoder.encode([hpack.NeverIndexedHeaderTuple(*one) for one in headers]))


class HeaderBlocks:
    """Reads blocks of the other side, which keeps no table; equal blocks are read once."""

    _KEPT = 64

    def __init__(self) -> None:
        self._decoder = hpack.Decoder()
        self._decoder.max_allowed_table_size = 0
        # The other side need not say that its table is empty: its first settings came before its first block.
        self._decoder.header_table_size = 0
        self._seen: dict[bytes, Headers] = {}

    def read(self, block: bytes) -> Headers:
        """The headers in ``block``.

        Raises:
            FramingError: it cannot be read.
        """
        known = self._seen.get(block)
        if known is not None:
            return known
        try:
            headers = {_text(name): _text(value) for name, value in self._decoder.decode(block, raw=True)}
        except HPACKError as error:
            raise FramingError(f"headers cannot be read: {error}") from error
        if len(self._seen) < self._KEPT:
            self._seen[block] = headers
        return headers


def _text(value: bytes | str) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def framed(message: bytes) -> bytes:
    """A message as gRPC puts it into DATA frames: not compressed, its length before it."""
    return b"\0" + _WORD.pack(len(message)) + message


def take_messages(buffer: bytearray) -> Iterator[bytes]:
    """The whole gRPC messages that ``buffer`` begins with, which are removed from it.

    Raises:
        FramingError: one is compressed, which was not asked for.
    """
    while len(buffer) >= MESSAGE_HEAD_BYTES:
        end = MESSAGE_HEAD_BYTES + _WORD.unpack_from(buffer, 1)[0]
        if len(buffer) < end:
            return
        if buffer[0]:
            raise FramingError("a message is compressed, which was not asked for")
        message = bytes(buffer[MESSAGE_HEAD_BYTES:end])
        del buffer[:end]
        yield message


def status_of(trailers: Headers) -> tuple[int, str]:
    """The number and the words of gRPC's status; 2, UNKNOWN, where the other side is no gRPC server."""
    code = trailers.get("grpc-status", "")
    if not code.isdecimal():
        return 2, f"no gRPC status came, but HTTP status {trailers.get(':status', 'unknown')}"
    return int(code), unquote(trailers.get("grpc-message", ""))
