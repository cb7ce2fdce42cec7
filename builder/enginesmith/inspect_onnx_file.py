"""An ONNX file without the bytes of its weights: gigabytes are skipped, not read.

Walks the protobuf wire format of ModelProto, GraphProto and TensorProto (onnx/onnx.proto) over a mapped file and leaves
out what holds the values of initializers; the rest is parsed by the onnx package as usual.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginesmith.errors import SourceError

_GRAPH, _INITIALIZER = 7, 5
_VALUES = frozenset({4, 5, 6, 7, 9, 10, 11})
"""Fields of TensorProto that hold values: float_data, int32_data, string_data, int64_data, raw_data, double_data, uint64_data."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class OnnxHeaders:
    """A model whose initializers have names, types and shapes, but no values."""

    model: Any
    """onnx.ModelProto."""
    file_bytes: int


def read_onnx_headers(path: Path) -> OnnxHeaders:
    """The model at ``path`` without the values of its initializers.

    Raises:
        SourceError: it cannot be read, or is no ONNX model, or is cut off.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size == 0:
                raise SourceError(f"{path} is empty", hint="export or fetch it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                stripped = _without_values(mapped, size)
        model = onnx.ModelProto.FromString(stripped)
        _require_text(model)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except (_WireError, DecodeError) as error:
        raise SourceError(
            f"{path} is no ONNX model, or is damaged: {error}", hint="export or fetch it again"
        ) from error
    if not model.graph.node:
        raise SourceError(f"{path} is no ONNX model: it has no operators", hint="export or fetch it again")
    return OnnxHeaders(model, size)


class _WireError(ValueError):
    """The bytes are not protobuf."""


@dataclass(frozen=True)
class _Field:
    """One field: ``start`` to ``end`` with its tag, its content from ``content``."""

    number: int
    wire_type: int
    start: int
    content: int
    end: int


def _require_text(message: Any) -> None:
    """Return if every text in ``message`` is one: protobuf gives bytes for what is not UTF-8 in these old messages."""
    for field, content in message.ListFields():
        for value in (
            content if isinstance(content, Iterable) and not isinstance(content, (str, bytes)) else (content,)
        ):
            if hasattr(value, "ListFields"):
                _require_text(value)
            elif field.type == field.TYPE_STRING and isinstance(value, bytes):
                raise _WireError(f"{field.full_name} is not UTF-8: {value[:40]!r}")


def _without_values(buffer: mmap.mmap, size: int) -> bytes:
    pieces = bytearray()
    for field in _fields(buffer, 0, size):
        if (field.number, field.wire_type) != (_GRAPH, _BYTES):
            pieces += buffer[field.start : field.end]
            continue
        graph = bytearray()
        for inner in _fields(buffer, field.content, field.end):
            if (inner.number, inner.wire_type) != (_INITIALIZER, _BYTES):
                graph += buffer[inner.start : inner.end]
                continue
            tensor = bytearray()
            for value in _fields(buffer, inner.content, inner.end):
                if value.number not in _VALUES:
                    tensor += buffer[value.start : value.end]
            graph += _as_field(_INITIALIZER, tensor)
        pieces += _as_field(_GRAPH, graph)
    return bytes(pieces)


def _fields(buffer: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    at = start
    while at < end:
        tag, content = _varint(buffer, at, end)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            stop = _varint(buffer, content, end)[1]
        elif wire_type == _BYTES:
            length, content = _varint(buffer, content, end)
            stop = content + length
        elif wire_type in (_FIXED64, _FIXED32):
            stop = content + (8 if wire_type == _FIXED64 else 4)
        else:
            raise _WireError(f"wire type {wire_type} at byte {at}")
        if stop > end or number == 0:
            raise _WireError(f"field {number} at byte {at} ends at {stop}, its message at {end}")
        yield _Field(number, wire_type, at, content, stop)
        at = stop


def _varint(buffer: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """The number at ``at`` and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _WireError(f"a number at byte {at} does not end")


def _as_field(number: int, content: bytearray) -> bytes:
    return _varint_bytes(number << 3 | _BYTES) + _varint_bytes(len(content)) + content


def _varint_bytes(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
