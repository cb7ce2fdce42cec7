"""Where a server is: parsing of the URLs that ``Client`` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

from enginesmith_client._errors import InvalidInput

Protocol = Literal["grpc", "http"]
DEFAULT_PORTS: dict[str, int] = {"grpc": 8001, "http": 8000, "grpcs": 8001, "https": 443}
"""Triton's own ports; 443 for HTTPS, which Triton leaves to the proxy before it."""
_SCHEMES: dict[str, Protocol] = {"grpc": "grpc", "grpcs": "grpc", "http": "http", "https": "http"}
_ALLOWED = (
    "allowed: grpc://host:port, http://host:port/path, with TLS grpcs:// and https://, "
    "or host:port (gRPC unless the port is 8000)"
)


@dataclass(frozen=True)
class Address:
    """A server and the protocol to speak with it."""

    protocol: Protocol
    host: str
    port: int
    base_path: str = ""
    """Prefix of every HTTP path, without a trailing slash."""
    encrypted: bool = False
    """Whether the connection is made with TLS."""

    @property
    def authority(self) -> str:
        """``host:port`` as gRPC and the HTTP Host header write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.protocol}{'s' if self.encrypted else ''}://{self.authority}{self.base_path}"


def address_from_url(url: str, protocol: Protocol | None = None) -> Address:
    """The address that ``url`` names.

    Raises:
        InvalidInput: the URL has no host, an unknown scheme or a bad port, or contradicts ``protocol``.
    """
    if protocol is not None and protocol not in get_args(Protocol):
        raise InvalidInput(f"unknown protocol {protocol!r}", hint="allowed: 'grpc', 'http'")
    if not isinstance(url, str):
        raise InvalidInput(f"a server address is a str; seen: {url!r}", hint=_ALLOWED)
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
    default = DEFAULT_PORTS[parts.scheme or spoken]
    return Address(spoken, host, port or default, base_path, encrypted=parts.scheme.endswith("s"))


def _protocol(url: str, *, scheme: str, port: int | None, asked: Protocol | None) -> Protocol:
    if not scheme:
        return asked or ("http" if port == DEFAULT_PORTS["http"] else "grpc")
    if scheme not in _SCHEMES:
        raise InvalidInput(f"the scheme of {url!r} is not supported: {scheme}", hint=_ALLOWED)
    spoken = _SCHEMES[scheme]
    if asked not in (None, spoken):
        raise InvalidInput(
            f"the address {url!r} contradicts protocol={asked!r}", hint="leave one of the two out"
        )
    return spoken
