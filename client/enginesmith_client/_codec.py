"""Tensors as Triton sends them (a datatype, a shape and little-endian bytes) and as numpy holds them.

Pure: knows no transport and no model. Both transports carry the same bytes (``raw_input_contents`` in gRPC,
binary tensor data in HTTP), so one codec serves both.

BF16 has no numpy type. It is given back as float32, which holds every bfloat16 exactly, and taken as
float32 (rounded to nearest even) or as an array of ``ml_dtypes.bfloat16`` (bit for bit). FP8 has no datatype in
Triton: models take and give it as UINT8, so arrays of ``ml_dtypes`` FP8 are sent as the bytes that they are, and an
output is turned back with ``array.view(ml_dtypes.float8_e4m3fn)``.

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from enginesmith_client._errors import InvalidInput, ServerError

Array = NDArray[Any]

NUMPY_TYPES: dict[str, str] = {
    "BOOL": "|b1",
    "UINT8": "|u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "|i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
"""The numpy type of each datatype that numpy has; BYTES and BF16 are treated apart."""

FP8_TYPES = frozenset({"float8_e4m3fn", "float8_e5m2"})
"""The types of ``ml_dtypes`` that go as they are into UINT8 inputs: Triton has no datatype for FP8."""

_DTYPES = {datatype: np.dtype(code) for datatype, code in {**NUMPY_TYPES, "BF16": "<u2"}.items()}
_DATATYPES = {np.dtype(code): datatype for datatype, code in NUMPY_TYPES.items()}
_TEXT_KINDS = "OSUT"
"""numpy's kinds of object, bytes and text arrays."""


@functools.lru_cache(maxsize=256)
def datatype_from_dtype(dtype: np.dtype[Any]) -> str | None:
    """The Triton datatype that carries arrays of ``dtype``, or None when there is none."""
    if dtype.kind in _TEXT_KINDS:
        return "BYTES"
    if dtype.name == "bfloat16":
        return "BF16"
    return _DATATYPES.get(dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype)


@functools.lru_cache(maxsize=256)
def accepts(datatype: str, dtype: np.dtype[Any]) -> bool:
    """Whether arrays of ``dtype`` may be sent as ``datatype``."""
    return (
        datatype_from_dtype(dtype) == datatype
        or (datatype == "BF16" and dtype == np.float32)
        or (datatype == "UINT8" and dtype.name in FP8_TYPES)
    )


def bytes_from_array(array: Array, datatype: str) -> bytes:
    """The wire form of ``array``, in row-major order.

    Raises:
        InvalidInput: the dtype does not fit, or an element of a BYTES tensor is not bytes or valid text.
    """
    if not accepts(datatype, array.dtype):
        raise InvalidInput(f"an array of {array.dtype} cannot be sent as {datatype}")
    if datatype == "BYTES":
        return _pack_elements(array)
    if datatype == "BF16":
        bits = _bfloat16_bits(array) if array.dtype == np.float32 else array.view(np.uint16)
        return bits.astype("<u2", copy=False).tobytes()
    if datatype == "UINT8":
        return array.tobytes()
    return array.astype(_DTYPES[datatype], copy=False).tobytes()


def array_from_bytes(data: bytes, datatype: str, shape: Sequence[int]) -> Array:
    """The array of ``shape`` in ``data``; numbers are a read-only view of it, BYTES an object array of bytes.

    Raises:
        ServerError: the data does not have the size that the datatype and shape call for.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        elements = np.empty(count, dtype=np.object_)
        elements[:] = _unpack_elements(data, count)
        return elements.reshape(shape)
    dtype = _DTYPES.get(datatype)
    if dtype is None:
        raise ServerError(f"the answer holds a tensor of unknown datatype {datatype!r}")
    expected_bytes = count * dtype.itemsize
    if len(data) != expected_bytes:
        raise ServerError(
            f"a {datatype} tensor of shape {list(shape)} came with {len(data)} bytes instead of {expected_bytes}"
        )
    array: Array = np.frombuffer(data, dtype).reshape(shape)
    if datatype == "BF16":
        return (array.astype("<u4") << np.uint32(16)).view("<f4")
    return array


def text_bytes(text: str, *, what: str) -> bytes:
    """``text`` as UTF-8; raises InvalidInput, naming ``what``, for text that UTF-8 cannot express (lone surrogates)."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{what} cannot be sent: character {error.start} is {text[error.start]!a}, which is not valid Unicode text",
            hint="decode the source with the right encoding, or with errors='replace'",
        ) from error


def _pack_elements(array: Array) -> bytes:
    """Every element after its length as a 4-byte little-endian integer."""
    parts: list[bytes] = []
    for position, element in enumerate(array.reshape(-1).tolist()):
        if isinstance(element, str):
            element = text_bytes(element, what=f"element {position} of a BYTES tensor")
        elif not isinstance(element, bytes):
            raise InvalidInput(
                f"element {position} of a BYTES tensor is {type(element).__name__}; allowed: bytes and str"
            )
        parts += (struct.pack("<I", len(element)), element)
    return b"".join(parts)


def _unpack_elements(data: bytes, count: int) -> list[bytes]:
    elements: list[bytes] = []
    offset = 0
    while offset + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, offset)
        elements.append(data[offset + 4 : offset + 4 + length])
        offset += 4 + length
    if offset != len(data) or len(elements) != count:
        raise ServerError(
            f"a BYTES tensor of {count} elements came with {len(elements)} elements in {len(data)} bytes"
        )
    return elements


def _bfloat16_bits(array: Array) -> Array:
    """The upper halves of float32 values, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN's low mantissa bits away and leave infinity: set the quiet bit instead.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(array), quiet, rounded).astype("<u2")
