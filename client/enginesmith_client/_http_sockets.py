"""Connections of HTTP/1.1 whose every wait ends with a call's deadline, and the pool that keeps them.

The standard library's ``http.client`` does the protocol; what it lacks is here: one limit for connecting, the handshake of
TLS and each read and write, however small the pieces are in which an answer arrives.
"""

from __future__ import annotations

import http.client
import queue
import selectors
import socket
import ssl
import threading
from typing import Any

from enginesmith_client._address import Address
from enginesmith_client._deadline import Deadline


class NotConnectedError(Exception):
    """No connection was made, so that nothing was sent."""


class _Limited:
    """Mixed into sockets: reads and writes are over when ``deadline`` is. The methods are those that http.client calls."""

    deadline: Deadline

    def recv_into(self, *arguments: Any) -> int:
        self._limit()
        return int(super().recv_into(*arguments))  # type: ignore[misc]

    def sendall(self, *arguments: Any) -> None:
        self._limit()
        super().sendall(*arguments)  # type: ignore[misc]

    def _limit(self) -> None:
        if self.deadline.expired:
            raise TimeoutError("the answer was still arriving")
        self.settimeout(self.deadline.remaining_s())  # type: ignore[attr-defined]


class _Socket(_Limited, socket.socket):
    pass


class _TlsSocket(_Limited, ssl.SSLSocket):
    pass


class Connection(http.client.HTTPConnection):
    """A connection to ``address``, encrypted if there is a context; connects when first used."""

    def __init__(self, address: Address, context: ssl.SSLContext | None, server_name: str | None) -> None:
        super().__init__(address.host, address.port)
        self._context = context
        self._server_name = server_name or address.host
        self.deadline = Deadline(0.0, 0.0)

    def connect(self) -> None:
        """Called by http.client. Raises NotConnectedError, or TimeoutError when the deadline is over first."""
        try:
            sock = _connected_socket(self.host, self.port, self.deadline)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self.sock = self._encrypted(sock) if self._context else sock
        except TimeoutError:
            raise
        except OSError as error:
            raise NotConnectedError(str(error) or type(error).__name__) from error

    def limit(self, deadline: Deadline) -> None:
        """Connect if that is still to be done; all that follows is over when ``deadline`` is."""
        self.deadline = deadline
        if self.sock is None:
            self.connect()
        sock = self.sock
        assert isinstance(sock, _Limited)
        sock.deadline = deadline

    def abort(self) -> None:
        """End the connection for whoever waits on it, in any thread."""
        sock = self.sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # It had ended already.

    @property
    def is_usable(self) -> bool:
        """Whether it is connected and the server has not ended it: an idle connection has nothing else to be read."""
        if self.sock is None:
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(self.sock, selectors.EVENT_READ)
            return not selector.select(timeout=0)

    def _encrypted(self, sock: _Socket) -> ssl.SSLSocket:
        assert self._context is not None
        try:
            encrypted = self._context.wrap_socket(
                sock, server_hostname=self._server_name, do_handshake_on_connect=False
            )
        except BaseException:
            sock.close()
            raise
        try:
            assert isinstance(encrypted, _TlsSocket)
            encrypted.deadline = self.deadline
            encrypted.settimeout(self.deadline.remaining_s())
            encrypted.do_handshake()
        except BaseException:
            encrypted.close()
            raise
        return encrypted


def limited(context: ssl.SSLContext) -> ssl.SSLContext:
    """The context, whose connections end with their deadlines."""
    context.sslsocket_class = _TlsSocket
    return context


def _connected_socket(host: str, port: int, deadline: Deadline) -> _Socket:
    """Connected to the first address of ``host`` that takes it."""
    last: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in _addresses(host, port, deadline):
        sock = _Socket(family, kind, protocol)
        try:
            sock.deadline = deadline
            sock.settimeout(deadline.remaining_s())
            sock.connect(address)
        except OSError as error:
            sock.close()
            last = error
            if deadline.expired:
                raise TimeoutError("the connection was still being made") from error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise last


def _addresses(host: str, port: int, deadline: Deadline) -> list[Any]:
    """As ``getaddrinfo`` gives them. It knows no deadline, so names are looked up in a thread that may be left behind."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        found: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except OSError as error:
            found.put(error)
        except UnicodeError as error:  # A label that is empty or too long.
            found.put(OSError(str(error)))

    threading.Thread(target=look_up, name=f"resolving {host}", daemon=True).start()
    try:
        addresses = found.get(timeout=deadline.remaining_s())
    except queue.Empty:
        raise TimeoutError(f"the name {host} was still being looked up") from None
    if isinstance(addresses, OSError):
        raise addresses
    return addresses


class ConnectionPool:
    """The connections of one transport: idle ones wait for their next request. Shared between threads."""

    def __init__(self, address: Address, context: ssl.SSLContext | None, server_name: str | None) -> None:
        self._address, self._context, self._server_name = address, context, server_name
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._lock = threading.Lock()
        self.closed = False

    def take(self) -> Connection:
        """A connection; an idle one only if the server has not closed it meanwhile.

        Looking first makes a retry needless: an inference that was perhaps begun is never sent twice.
        """
        while True:
            with self._lock:
                connection = (
                    self._idle.pop()
                    if self._idle
                    else Connection(self._address, self._context, self._server_name)
                )
                self._busy.add(connection)
            if connection.sock is None or connection.is_usable:
                return connection
            self.drop(connection)

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose answer was read to its end."""
        with self._lock:
            self._busy.discard(connection)
            if not self.closed and connection.sock is not None:
                self._idle.append(connection)
                return
        connection.close()

    def drop(self, connection: Connection) -> None:
        """Close a connection that cannot be used again."""
        with self._lock:
            self._busy.discard(connection)
        connection.close()

    def close(self) -> None:
        """Close the idle connections; whoever waits on another one sees it end."""
        with self._lock:
            self.closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for connection in idle:
            connection.close()
        for connection in busy:
            connection.abort()
