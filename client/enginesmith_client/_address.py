"""Where a server is: parsing of the URLs that ``Client`` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

from enginesmith_client._errors import InvalidInput

Protocol = Literal["grpc", "http"]
DEFAULT_PORTS: dict[Protocol, int] = {"grpc": 8001, "http": 8000}
_ALLOWED = "allowed: grpc://host:port, http://host:port/path, or host:port (gRPC unless the port is 8000)"


@dataclass(frozen=True)
class Address:
    """A server and the protocol to speak with it."""

    protocol: Protocol
    host: str
    port: int
    base_path: str = ""
    """Prefix of every HTTP path, without a trailing slash."""

    @property
    def authority(self) -> str:
        """``host:port`` as gRPC and the HTTP Host header write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.protocol}://{self.authority}{self.base_path}"


def address_from_url(url: str, protocol: Protocol | None = None) -> Address:
    """The address that ``url`` names.

    Raises:
        InvalidInput: the URL has no host, an unknown scheme or a bad port, or contradicts ``protocol``.
    """
    if protocol is not None and protocol not in get_args(Protocol):
        raise InvalidInput(f"unknown protocol {protocol!r}", hint="allowed: 'grpc', 'http'")
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidInput(f"cannot read the server address {url!r}: {error}", hint=_ALLOWED) from error
    if not host or parts.username is not None or parts.query or parts.fragment:
        raise InvalidInput(
            f"cannot read the server address {url!r}: it must name a host and nothing but a host, port and path",
            hint=_ALLOWED,
        )
    spoken = _protocol(url, scheme=parts.scheme, port=port, asked=protocol)
    base_path = parts.path.rstrip("/")
    if base_path and spoken == "grpc":
        raise InvalidInput(f"the gRPC address {url!r} has a path: {base_path}", hint=_ALLOWED)
    return Address(spoken, host, port or DEFAULT_PORTS[spoken], base_path)


def _protocol(url: str, *, scheme: str, port: int | None, asked: Protocol | None) -> Protocol:
    if not scheme:
        return asked or ("http" if port == DEFAULT_PORTS["http"] else "grpc")
    for protocol in get_args(Protocol):
        if scheme == protocol:
            if asked not in (None, protocol):
                raise InvalidInput(
                    f"the address {url!r} contradicts protocol={asked!r}", hint="leave one of the two out"
                )
            return "grpc" if protocol == "grpc" else "http"
    raise InvalidInput(f"the scheme of {url!r} is not supported: {scheme}", hint=_ALLOWED)
