"""How a connection is made: what ``Client`` takes beside the address, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Compression = Literal["none", "gzip", "deflate"]


@dataclass(frozen=True)
class Tls:
    """An encrypted connection. Without ``ca_file`` the system's certificate authorities are trusted."""

    ca_file: str | None = None
    """PEM file of the authorities that may have signed the server's certificate."""
    cert_file: str | None = None
    """PEM file of this client's certificate, for servers that ask for one; needs ``key_file``."""
    key_file: str | None = None
    server_name: str | None = None
    """The name that the server's certificate must bear, where it is not the host of the address."""


@dataclass(frozen=True)
class ConnectionSettings:
    """Everything about connections that is not the address."""

    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every request: gRPC metadata, or HTTP headers."""
    tls: Tls | None = None
    compression: Compression = "none"
    connections: int = 1
    """gRPC connections per server; streams and calls go to the least busy one. HTTP opens as many as calls run at once."""
    shared_memory_bytes: int | None = None
    """Tensors of this size and more travel through system shared memory where the server is on this machine."""
