"""How a connection is made: what ``Client`` takes beside the address, as values that check themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from enginesmith_client._errors import InvalidInput

if TYPE_CHECKING:
    import ssl

Compression = Literal["none", "gzip", "deflate"]

_HEADER_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?|")
_OWN_HEADERS = frozenset(
    {
        "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host",
        "inference-header-content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade",
        "triton_grpc_error", "user-agent",
    }
)  # fmt: skip
"""What the transports write themselves; a second value would change where a message ends or how it is read."""


@dataclass(frozen=True)
class Tls:
    """An encrypted connection. Without ``ca_file`` the system's certificate authorities are trusted.

    The server's certificate is always verified: gRPC for Python has no way around it. For a self-signed certificate,
    give that certificate as ``ca_file``.
    """

    ca_file: str | None = None
    """PEM file of the authorities that may have signed the server's certificate."""
    cert_file: str | None = None
    """PEM file of this client's certificate, for servers that ask for one; needs ``key_file``."""
    key_file: str | None = None
    server_name: str | None = None
    """The name that the server's certificate must bear, where it is not the host of the address."""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidInput("a client certificate needs both cert_file and key_file; only one was given")


@dataclass(frozen=True)
class ConnectionSettings:
    """Everything about connections that is not the address."""

    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every request: gRPC metadata, or HTTP headers. Names are made lower-case."""
    tls: Tls | None = None
    compression: Compression = "none"
    connections: int = 1
    """gRPC connections per server; streams and calls go to the least busy one. HTTP opens as many as calls run at once."""
    shared_memory_bytes: int | None = None
    """Tensors of this size and more travel through system shared memory where the server is on this machine."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "headers", _checked_headers(self.headers))
        if self.compression not in get_args(Compression):
            raise InvalidInput(
                f"unknown compression {self.compression!r}", hint="allowed: 'none', 'gzip', 'deflate'"
            )
        for name, value in (
            ("connections", self.connections),
            ("shared_memory_bytes", self.shared_memory_bytes),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidInput(f"{name} must be a whole number of at least 1; seen: {value!r}")


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    checked: dict[str, str] = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise InvalidInput(
                f"the header name {name!r} is not valid",
                hint="allowed: ASCII letters, digits, '-', '_' and '.'",
            )
        lower = name.lower()
        if lower in _OWN_HEADERS or lower.startswith("grpc-") or lower.endswith("-bin"):
            raise InvalidInput(f"the header {name!r} belongs to the transport and cannot be set")
        if lower in checked:
            raise InvalidInput(f"the header {name!r} is given twice: case does not tell headers apart")
        # A line break here would let whoever chose the value write headers and requests of their own.
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise InvalidInput(
                f"the value of header {name!r} cannot be sent: {value!r}",
                hint="allowed: printable ASCII, with no space at either end",
            )
        checked[lower] = value
    return checked


def ssl_context(tls: Tls) -> ssl.SSLContext:
    """The context that verifies as ``tls`` says.

    Raises:
        InvalidInput: a file cannot be read or does not hold what it should.
    """
    import ssl

    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(
            f"cannot use {tls.ca_file} as ca_file: {error}", hint="it must hold PEM certificates"
        ) from error
    if tls.cert_file is not None:
        try:
            context.load_cert_chain(tls.cert_file, tls.key_file, password=_no_password)
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"cannot use {tls.cert_file} and {tls.key_file} as client certificate: {error}",
                hint="they must hold a PEM certificate and the unencrypted PEM key that belongs to it",
            ) from error
    return context


def _no_password() -> str:
    # Without this, OpenSSL would ask on the terminal.
    raise ValueError("the key is encrypted")
