"""Content encodings of HTTP, as far as Triton has them: for bodies of ``/infer``, both ways. Pure.

Triton's ``deflate`` is the zlib format, as RFC 9110, 8.4.1.2 has it. ``Inference-Header-Content-Length`` counts bytes of
the body before it is compressed.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from dataclasses import replace

from enginesmith_client._errors import ServerError
from enginesmith_client._http_messages import HttpAnswer, HttpCall
from enginesmith_client._settings import Compression

_LEVEL = 1
"""The fastest: a model waits for the data."""
_EITHER_FORMAT = 47
"""``wbits`` of zlib: the largest window, and the format found out from the data."""


def compressed(http_call: HttpCall, compression: Compression) -> HttpCall:
    """The call with its body compressed and a compressed answer asked for."""
    if compression == "none" or not http_call.path.endswith("/infer"):
        return http_call
    pack = gzip.compress if compression == "gzip" else zlib.compress
    return replace(
        http_call,
        body=pack(http_call.body, _LEVEL),
        headers={**http_call.headers, "Content-Encoding": compression, "Accept-Encoding": compression},
    )


def decompressed(answer: HttpAnswer) -> HttpAnswer:
    """The answer with its body as it was before the server compressed it.

    Raises:
        ServerError: the body is not what its Content-Encoding says.
    """
    encoding = answer.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return answer
    if encoding not in ("gzip", "deflate"):
        raise ServerError(f"the answer has the content encoding {encoding!r}, which was not asked for")
    try:
        return replace(
            answer, body=zlib.decompress(answer.body, _EITHER_FORMAT), headers=_plain(answer.headers)
        )
    except zlib.error as error:
        raise ServerError(f"the answer cannot be decompressed as {encoding}: {error}") from error


def _plain(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name != "content-encoding"}
