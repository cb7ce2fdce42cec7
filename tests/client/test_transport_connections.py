"""What a connection is made with, over every transport: TLS, headers, compression, parameters, shared memory."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_models import MODELS, RunningServer
from transports import KINDS, Driver, forwarding

from enginesmith.triton.server import TritonServer
from enginesmith_client import Client, ConnectError, InvalidInput, ServerError, _shared_memory
from enginesmith_client._address import address_from_url
from enginesmith_client._codec import array_from_bytes
from enginesmith_client._messages import InferReply
from enginesmith_client._operations import (
    Infer,
    LoadModel,
    ModelReady,
    ReadConfig,
    ReadIndex,
    ReadStatistics,
    ServerReady,
    UnloadModel,
    UnregisterMemory,
)
from enginesmith_client._settings import ConnectionSettings, Tls


@dataclass(frozen=True)
class SecureServer:
    """A server with TLS on both ports, that hands on the headers of requests."""

    certificate: Path
    key: Path
    urls: dict[str, str]


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=triton.test", "-addext", "subjectAltName=DNS:triton.test"],
        check=True, capture_output=True,
    )  # fmt: skip
    repository = directory / "repository"
    for model in ("told", "echo"):
        (repository / model / "1").mkdir(parents=True)
        for file in ("config.pbtxt", "1/model.py"):
            (repository / model / file).write_bytes((MODELS / model / file).read_bytes())
    arguments = [
        "--grpc-use-ssl=true", f"--grpc-server-cert={certificate}", f"--grpc-server-key={key}",
        "--grpc-header-forward-pattern=x-.*", "--http-header-forward-pattern=x-.*",
    ]  # fmt: skip
    with TritonServer(repository, extra_args=arguments) as running:
        running.wait_ready()
        # Triton has no HTTPS of its own; a proxy before it does that.
        with forwarding(running.http_url, (certificate, key)) as proxy:
            yield SecureServer(
                certificate, key, {"grpc": f"grpcs://{running.grpc_url}", "http": f"https://{proxy.url}"}
            )


def told(driver: Driver, **options: Any) -> dict[str, Any]:
    request = driver.request("told", {"question": np.array(["?"], np.object_)}, **options)
    (output,) = driver.perform(Infer(request)).outputs
    answer: dict[str, Any] = json.loads(array_from_bytes(output.data, "BYTES", (1,)).item())
    return answer


def echoed(driver: Driver, array: Any) -> Any:
    request = driver.request("echo", {"in_FP32": array}, outputs=["out_FP32"])
    reply: InferReply = driver.perform(Infer(request))
    (output,) = reply.outputs
    return array_from_bytes(output.data, output.datatype, output.shape)


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
def test_an_encrypted_connection_verifies_the_server_and_carries_headers(
    kind: str, secure: SecureServer
) -> None:
    url = secure.urls[kind.split("-")[0]]
    tls = Tls(ca_file=str(secure.certificate), server_name="triton.test")
    with Driver(kind, url, tls=tls, headers={"X-Tenant": "a b;c", "x-other": "1"}) as driver:
        assert told(driver)["parameters"] == {"x-tenant": "a b;c", "x-other": "1"}
        np.testing.assert_array_equal(echoed(driver, np.ones((1, 300_000), np.float32)), 1)
    for wrong in (Tls(ca_file=str(secure.certificate)), Tls(server_name="triton.test")):
        with (
            Driver(kind, url, tls=wrong) as driver,
            pytest.raises(ConnectError, match=r"(?i)certificate|handshake|verification"),
        ):
            driver.perform(ServerReady(), timeout_s=10)


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_connection_to_an_encrypted_port_is_a_connect_error(kind: str, secure: SecureServer) -> None:
    plain = secure.urls[kind.split("-")[0]].replace("grpcs", "grpc").replace("https", "http")
    with Driver(kind, plain) as driver, pytest.raises(ConnectError):
        driver.perform(ServerReady(), timeout_s=10)


@pytest.mark.parametrize("kind", KINDS)
def test_certificates_that_cannot_be_used_are_named(kind: str, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    for file in (rubbish, tmp_path / "missing.pem"):
        with pytest.raises(InvalidInput, match=f"cannot use {file} as ca_file"):
            Driver(kind, "localhost:1", tls=Tls(ca_file=str(file)))
    with pytest.raises(InvalidInput, match="as client certificate"):
        Driver(kind, "localhost:1", tls=Tls(cert_file=str(rubbish), key_file=str(rubbish)))
    with pytest.raises(InvalidInput, match="needs both cert_file and key_file"):
        Tls(cert_file="a.pem")


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"x": "a\r\nHost: other"}, "cannot be sent"),
        ({"x": "a\nb"}, "cannot be sent"),
        ({"x": "a\0"}, "cannot be sent"),
        ({"x": " a"}, "cannot be sent"),
        ({"x": "schön"}, "cannot be sent"),
        ({"x": 5}, "cannot be sent"),
        ({"a b": "c"}, "is not valid"),
        ({"": "c"}, "is not valid"),
        ({":path": "/"}, "is not valid"),
        ({"x\r\ny": "c"}, "is not valid"),
        ({"Content-Length": "0"}, "belongs to the transport"),
        ({"grpc-timeout": "1S"}, "belongs to the transport"),
        ({"key-bin": "c"}, "belongs to the transport"),
        ({"X-A": "1", "x-a": "2"}, "given twice"),
    ],
)
def test_headers_that_would_change_the_message_are_refused(headers: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ConnectionSettings(headers=headers)


@pytest.mark.parametrize(
    "settings",
    [{"compression": "brotli"}, {"connections": 0}, {"connections": True}, {"shared_memory_bytes": 0}],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"allowed|at least 1"):
        ConnectionSettings(**settings)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("grpcs://host", "grpcs://host:8001"),
        ("https://host/base/", "https://host:443/base"),
        ("http://host", "http://host:8000"),
        ("host:8000", "http://host:8000"),
        ("host", "grpc://host:8001"),
        ("grpc://[::1]:7", "grpc://[::1]:7"),
    ],
)
def test_addresses_have_triton_s_ports_and_say_how_they_are_spoken_to(url: str, name: str) -> None:
    assert str(address_from_url(url)) == name


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compression", ["none", "gzip", "deflate"])
def test_compression_makes_messages_small_and_changes_nothing(
    kind: str, compression: str, server: RunningServer
) -> None:
    zeros = np.zeros((1, 500_000), np.float32)
    with (
        forwarding(server.url(kind.split("-")[0]).split("//")[1]) as between,
        Driver(kind, between.url, compression=compression) as driver,
    ):
        np.testing.assert_array_equal(echoed(driver, zeros), zeros)
        assert (between.sent_bytes > 1_900_000) == (compression == "none")
        # Triton compresses answers over gRPC only when it was started so.
        assert (between.received_bytes > 1_900_000) == (compression == "none" or driver.protocol == "grpc")


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_reach_the_model(kind: str, secure: SecureServer) -> None:
    tls = Tls(ca_file=str(secure.certificate), server_name="triton.test")
    with Driver(kind, secure.urls[kind.split("-")[0]], tls=tls) as driver:
        sequence = {"sequence_id": 2**40, "sequence_start": True, "sequence_end": False}
        parameters = {**sequence, "timeout": 5_000_000, "priority": 0, "note": "x", "flag": True, "number": 7}
        answer = told(driver, request_id="r1", parameters=parameters)
    assert answer == {
        "id": "r1",
        "correlation_id": 2**40,
        "start": True,
        "end": False,
        "timeout_us": 5_000_000,
        "parameters": {"note": "x", "flag": True, "number": 7},
    }


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
def test_models_are_loaded_with_another_configuration_and_unloaded(kind: str, server: RunningServer) -> None:
    name = f"told-{kind}"
    config = {
        "backend": "python",
        "input": [{"name": "question", "data_type": "TYPE_STRING", "dims": [1]}],
        "output": [{"name": "request", "data_type": "TYPE_STRING", "dims": [1]}],
        "max_batch_size": 0,
        "parameters": {"given": {"string_value": kind}},
    }
    program = (MODELS / "told" / "1" / "model.py").read_bytes()
    with Driver(kind, server.url(kind.split("-")[0])) as driver:
        driver.perform(LoadModel(name, config, {"1/model.py": program}))
        assert driver.perform(ModelReady(name))
        served = driver.perform(ReadConfig(name))
        assert served["parameters"]["given"] == {"string_value": kind}
        assert told_by(driver, name)["id"] == "r"
        assert "echo" in {entry["name"] for entry in driver.perform(ReadIndex())["models"]}
        assert driver.perform(ReadStatistics(name))["model_stats"][0]["name"] == name
        driver.perform(UnloadModel(name))
        with pytest.raises(ServerError, match="failed to load"):
            driver.perform(LoadModel(name, {"max_batch_size": "many"}, {"1/model.py": program}))


def told_by(driver: Driver, model: str) -> dict[str, Any]:
    request = driver.request(model, {"question": np.array(["?"], np.object_)}, request_id="r")
    (output,) = driver.perform(Infer(request)).outputs
    answer: dict[str, Any] = json.loads(array_from_bytes(output.data, "BYTES", (1,)).item())
    return answer


def own_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"enginesmith-client-{os.getpid()}-")}


@pytest.fixture
def no_memory_left() -> Iterator[None]:
    yield
    assert own_memory() == set()


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_memory_left")
def test_large_tensors_go_through_shared_memory(kind: str, server: RunningServer) -> None:
    target = server.url(kind.split("-")[0]).split("//")[1]
    with (
        forwarding(target) as between,
        Driver(kind, between.url, shared_memory_bytes=100_000) as driver,
        Driver("http", server.url("http")) as other,
    ):
        for number in (1, 2):
            sent = np.full((2, 500_000), number, np.float32)
            np.testing.assert_array_equal(echoed(driver, sent), sent)
        assert between.sent_bytes < 100_000
        # The output has a variable dimension, so it comes as usual.
        assert between.received_bytes > 8_000_000
        (name,) = own_memory()
        # As a server that was started anew has forgotten it.
        other.perform(UnregisterMemory(name))
        np.testing.assert_array_equal(echoed(driver, sent), sent)
        assert own_memory() == {name}


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_memory_left")
def test_outputs_of_a_known_size_come_through_shared_memory(kind: str, server: RunningServer) -> None:
    inputs = {"a": np.full((3, 2), 5, np.float32), "b": np.full((3, 2), 3, np.float32)}
    tensor = {"data_type": "TYPE_FP32", "dims": [2]}
    config = {
        "backend": "python",
        "max_batch_size": 4,
        "input": [{"name": name, **tensor} for name in "ab"],
        "output": [{"name": name, **tensor} for name in ("sum", "difference")],
    }
    program = (MODELS / "pair" / "1" / "model.py").read_bytes()
    with Driver(kind, server.url(kind.split("-")[0]), shared_memory_bytes=8) as driver:
        driver.perform(LoadModel("fixed-pair", config, {"1/model.py": program}))
        reply = driver.perform(Infer(driver.request("fixed-pair", inputs)))
        values = {one.name: array_from_bytes(one.data, one.datatype, one.shape) for one in reply.outputs}
        assert {name: value.tolist() for name, value in values.items()} == {
            "sum": [[8.0, 8.0]] * 3,
            "difference": [[2.0, 2.0]] * 3,
        }
        assert len(own_memory()) == 4
        with pytest.raises(InvalidInput):
            driver.perform(Infer(driver.request("echo", {"in_FP32": np.zeros((9, 5), np.float32)})))


@pytest.mark.server
@pytest.mark.usefixtures("no_memory_left")
def test_threads_do_not_share_a_piece_of_memory_at_the_same_time(server: RunningServer) -> None:
    with (
        Driver("grpc", server.url("grpc"), shared_memory_bytes=1000) as driver,
        ThreadPoolExecutor(8) as pool,
    ):

        def ask(number: int) -> bool:
            array = np.full((1, 5000), number, np.float32)
            return bool((echoed(driver, array) == array).all())

        driver.request("echo", {})
        assert all(pool.map(ask, range(64)))


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_memory_left")
def test_a_server_that_cannot_map_gets_tensors_as_usual_and_it_is_said_once(
    kind: str, server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Elsewhere(_shared_memory.Block):
        """Registered by a name that the server's machine does not have, as on another machine."""

        def __init__(self, size_bytes: int) -> None:
            super().__init__(size_bytes)
            self.name += "-elsewhere"

    monkeypatch.setattr(_shared_memory, "Block", Elsewhere)
    with (
        caplog.at_level(logging.WARNING, "enginesmith_client"),
        Driver(kind, server.url(kind.split("-")[0]), shared_memory_bytes=1000) as driver,
    ):
        for _ in range(2):
            np.testing.assert_array_equal(echoed(driver, np.ones((1, 5000), np.float32)), 1)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "shared memory is not used from now on, large tensors are sent as others are"
    ]


PROGRAM = """
import os, signal, sys, warnings
import numpy as np
from enginesmith_client import Client, InvalidInput
url, how = sys.argv[1:]
client = Client(url, shared_memory_bytes=1000, timeout_s=20)
client.infer("echo", {"in_FP32": np.ones((1, 5000), np.float32)}, outputs=["out_FP32"])
"""


def run_program(rest: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + textwrap.dedent(rest), *arguments],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.server
@pytest.mark.parametrize("ending", ["return", "exception", "kill"])
def test_nothing_stays_in_shared_memory_when_a_process_ends(server: RunningServer, ending: str) -> None:
    done = run_program(
        """
        print(os.getpid(), flush=True)
        if how == "exception": raise SystemExit(3)
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        """,
        server.url("grpc"),
        ending,
    )
    pid = done.stdout.strip()
    assert pid
    # The pipes are inherited by whatever cleans up, so it is through when run_program returns.
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"enginesmith-client-{pid}-")], (
        done.stderr
    )


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_made_before_a_fork_says_so_in_the_child(server: RunningServer, protocol: str) -> None:
    done = run_program(
        """
        child = os.fork()
        if child == 0:
            try:
                client.models()
            except InvalidInput as error:
                print(error, flush=True)
            client.close()
            with Client(url, timeout_s=20) as fresh:
                print(fresh.is_ready("echo"), flush=True)
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        print("child", os.waitstatus_to_exitcode(status))
        again = client.infer("echo", {"in_FP32": np.ones((1, 5000), np.float32)}, outputs=["out_FP32"])
        print("parent", again["out_FP32"].sum())
        client.close()
        """,
        server.url(protocol),
        "fork",
    )
    assert "cannot be used in its child" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-3:] == ["True", "child 0", "parent 5000.0"], done.stdout + done.stderr


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_fifty_clients_leave_no_thread_and_no_socket(server: RunningServer, protocol: str) -> None:
    def use() -> None:
        with Client(server.url(protocol), timeout_s=20, connections=2) as client:
            client.infer("echo", {"in_FP32": np.ones((1, 5), np.float32)}, outputs=["out_FP32"])

    def sockets() -> int:
        links = []
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            except FileNotFoundError:
                continue
        return sum(link.startswith("socket:") for link in links)

    use()
    threads, open_sockets = threading.active_count(), sockets()
    for _ in range(50):
        use()
    # gRPC closes a channel's socket in a thread of its own; making one more channel lets it run.
    for _ in range(100):
        if sockets() <= open_sockets:
            break
        use()
    assert sockets() <= open_sockets
    assert threading.active_count() <= threads
