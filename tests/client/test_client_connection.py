"""What the client makes of servers that are missing, silent, slow or that die."""

import http.server
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from served_models import MODELS

from enginesmith.triton.ports import claim_ports
from enginesmith.triton.server import TritonServer
from enginesmith_client import Client, ConnectError, DeadlineExceeded, ServerError

PROTOCOLS = ("grpc", "http")


@contextmanager
def listener(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """``host:port`` of a TCP server that gives every connection to ``answer``, one after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_is_not_there_is_named_with_its_address(protocol: str) -> None:
    port = claim_ports({"free": 0})["free"]
    with Client(f"{protocol}://127.0.0.1:{port}") as client:
        for ask in (
            client.models,
            client.is_ready,
            lambda: client.generate("m", "hi"),
            lambda: client.wait_ready(timeout_s=0.3),
        ):
            with pytest.raises(
                ConnectError, match=f"cannot reach a Triton server at {protocol}://127.0.0.1:{port}"
            ):
                ask()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_never_answers_cannot_hold_a_call(protocol: str) -> None:
    # The system accepts connections for a listening socket; nobody ever reads from them.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{protocol}://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout_s=0.3) as client, pytest.raises(DeadlineExceeded):
            client.models()


def test_an_answer_that_never_ends_cannot_hold_a_call() -> None:
    def flow(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        try:
            while True:
                connection.sendall(b" ")
        except OSError:
            return

    with (
        listener(flow) as url,
        Client(f"http://{url}", timeout_s=0.3) as client,
        pytest.raises(DeadlineExceeded),
    ):
        client.models()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ConnectError),
        (b"\x00\x00\x12\x04", ConnectError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]", ConnectError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", ServerError),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", ServerError),
    ],
)
def test_what_is_no_answer_of_a_triton_server_is_an_error(answer: bytes, error: type[Exception]) -> None:
    def reply(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(answer)

    with listener(reply) as url, Client(f"http://{url}") as client, pytest.raises(error):
        client.models()


def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    class OneAnswer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")
            # Ends the connection without having announced it, as a server does that drops idle ones.
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            return

    closed = threading.Semaphore(0)

    class Server(http.server.ThreadingHTTPServer):
        def shutdown_request(self, request: socket.socket) -> None:
            super().shutdown_request(request)
            closed.release()

    with Server(("127.0.0.1", 0), OneAnswer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with Client(f"127.0.0.1:{server.server_port}", protocol="http") as client:
                for _ in range(3):
                    assert client.models() == []
                    assert closed.acquire(timeout=30)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.server
def test_clients_wait_for_a_server_and_notice_its_death(tmp_path: Path) -> None:
    shutil.copytree(MODELS / "gated", tmp_path / "repository" / "gated")
    ports = claim_ports({"http": 0, "grpc": 0})
    clients = [Client(f"{protocol}://127.0.0.1:{ports[protocol]}") for protocol in PROTOCOLS]

    def ask(client: Client) -> None:
        client.infer("gated", {"gate": np.array([[str(tmp_path / "gate")]], np.object_)})

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.wait_ready, "gated", timeout_s=60) for client in clients]
        with TritonServer(
            tmp_path / "repository", http_port=ports["http"], grpc_port=ports["grpc"]
        ) as server:
            for call in waiting:
                call.result()
            asking = [pool.submit(ask, client) for client in clients]
            while not (tmp_path / "gate.entered").exists():
                time.sleep(0.005)
            os.kill(server.pid, signal.SIGKILL)
            for call in asking:
                assert isinstance(call.exception(), ConnectError)
    for client in clients:
        client.close()
