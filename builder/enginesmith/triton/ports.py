"""TCP ports on the loopback interface: free ones, and who holds one that is not."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Mapping

import psutil

from enginesmith.errors import ServerError

LOOPBACK = "127.0.0.1"


def claim_ports(wanted: Mapping[str, int]) -> dict[str, int]:
    """A port per name: the wanted one, or a free one where 0 is wanted.

    The ports are free at this moment; nothing holds them until the caller binds them.

    Raises:
        ServerError: a wanted port is in use or not allowed; the message names the port and its owner.
    """
    chosen: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        # Fixed ports first, and all held until the end, so that no free one collides with them.
        for name, port in sorted(wanted.items(), key=lambda item: item[1] == 0):
            probe = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
                probe.listen()
            except OSError as error:
                raise _refusal(name, port, error) from error
            chosen[name] = probe.getsockname()[1]
    return {name: chosen[name] for name in wanted}


def _refusal(name: str, port: int, error: OSError) -> ServerError:
    if error.errno == errno.EADDRINUSE:
        return ServerError(
            f"the {name} port {port} on {LOOPBACK} is in use by {_owner(port)}",
            hint=f"stop that process, or choose another {name} port",
        )
    return ServerError(
        f"the {name} port {port} on {LOOPBACK} cannot be used: {error.strerror}",
        hint="choose a port from 1024 to 65535",
    )


def _owner(port: int) -> str:
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if (
                connection.laddr
                and connection.laddr.port == port
                and connection.status == psutil.CONN_LISTEN
                and connection.pid
            ):
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return "another process (its owner cannot be seen by this user)"
