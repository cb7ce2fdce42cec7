"""A real tritonserver: found, started, explained when it fails, and gone without a trace."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from echo_models import ENDS_THE_PROCESS, MISSING_IMPORT, loads_after, write_model

from enginesmith.errors import ServerError, ToolchainError
from enginesmith.spec_part import DynamicBatching
from enginesmith.triton.installation import ServerInstallation
from enginesmith.triton.server import TritonServer, find_server, serve_forever

server = pytest.mark.server
DTYPES = {
    "max_tokens": ("INT32", np.int32),
    "stop_words": ("BYTES", np.object_),
    "text_input": ("BYTES", np.object_),
}


def ask(
    client: triton.InferenceServerClient, inputs: dict[str, list[object]], **parameters: object
) -> dict[str, object]:
    tensors = []
    for name, values in inputs.items():
        datatype, dtype = DTYPES[name]
        array = np.array(values, dtype=dtype).reshape(1, len(values))
        tensors.append(triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array))
    result = client.infer("echo", tensors, parameters=parameters or None)
    return json.loads(result.as_numpy("text_output")[0, 0])


def shared_memory_of_this_process() -> set[Path]:
    return set(Path("/dev/shm").glob(f"enginesmith-{os.getpid()}-*"))


@pytest.fixture
def shared_memory_left() -> Callable[[], set[Path]]:
    """What is there now and was not before the test; other servers of the session may be running."""
    before = shared_memory_of_this_process()
    return lambda: shared_memory_of_this_process() - before


@server
@pytest.mark.parametrize("moment", ["thread", "process"])
def test_an_interrupt_while_the_server_starts_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    popen, start = subprocess.Popen, threading.Thread.start

    def open_process(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        begun.append(popen(*arguments, **options))
        if moment == "process":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return begun[0]

    def start_thread(thread: threading.Thread) -> None:
        start(thread)
        if moment == "thread":
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", open_process)
    monkeypatch.setattr(threading.Thread, "start", start_thread)
    with pytest.raises(KeyboardInterrupt), TritonServer(tmp_path):
        pytest.fail("it was interrupted before")
    (process,) = begun
    assert process.returncode is not None


@server
def test_what_servers_of_killed_processes_left_in_shared_memory_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    left, used, strange = (
        Path(f"/dev/shm/enginesmith-{name}") for name in (f"{ended.pid}-a-b", f"{os.getpid()}-a-b", "x-y-z")
    )
    try:
        for segment in (left, used, strange):
            segment.touch()
        with TritonServer(tmp_path):
            assert [segment.exists() for segment in (left, used, strange)] == [False, True, True]
    finally:
        for segment in (left, used, strange):
            segment.unlink(missing_ok=True)


def test_a_path_that_is_no_executable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tritonserver").write_text("")
    with pytest.raises(ToolchainError, match="not executable"):
        find_server(str(tmp_path / "tritonserver"))
    with pytest.raises(ToolchainError, match="missing"):
        find_server(str(tmp_path / "nowhere"))
    with pytest.raises(ToolchainError, match="a directory"):
        find_server(str(tmp_path))


def test_a_server_on_path_is_preferred_over_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = tmp_path / "tritonserver"
    executable.write_text("#!/bin/sh\n")
    executable.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert find_server() == ServerInstallation(executable, "stock")


def test_the_backends_of_the_wheel_are_assembled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: find_server().backend_directory, range(4)))
    (directory,) = found
    assert directory is not None
    assert os.access(directory / "python" / "triton_python_backend_stub", os.X_OK)
    assert list((tmp_path / "enginesmith").iterdir()) == [directory]


def test_numpy_2_is_refused_for_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "numpy-2.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 2.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ToolchainError, match=r"needs numpy<2, installed is 2\.1\.0"):
        find_server()


def test_a_missing_repository_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no model repository"):
        TritonServer(tmp_path / "nowhere").start()


def test_a_port_in_use_is_refused_with_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            ServerError, match=rf"gRPC port {port} on 127.0.0.1 is in use by process {os.getpid()}"
        ):
            TritonServer(tmp_path, grpc_port=port).start()


def test_a_program_that_dies_at_once_is_reported_with_its_status_and_words(tmp_path: Path) -> None:
    program = tmp_path / "tritonserver"
    program.write_text("#!/bin/sh\necho the disk is on fire\nexit 3\n")
    program.chmod(0o755)
    with (
        TritonServer(
            tmp_path, installation=ServerInstallation(program, "stock"), log_path=tmp_path / "log"
        ) as instance,
        pytest.raises(ServerError, match=r"(?s)exited with status 3 .*the disk is on fire"),
    ):
        instance.wait_ready(timeout_s=60)


@server
def test_a_cache_that_does_not_fit_into_memory_is_said(tmp_path: Path) -> None:
    write_model(tmp_path / "models", "echo")
    with (
        TritonServer(tmp_path / "models", cache_bytes=1 << 60, log_path=tmp_path / "log") as instance,
        pytest.raises(ServerError, match=r"(?s)could not be initialized\n.*[Cc]ache"),
    ):
        instance.wait_ready(timeout_s=60)


def test_serving_an_empty_repository_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"(?s)no model in .*hint: enginesmith build"):
        serve_forever(tmp_path, on_progress=lambda fraction, note: None)


@server
def test_requests_share_a_batch_when_they_name_the_same_inputs(
    tmp_path: Path, shared_memory_left: Callable[[], set[Path]]
) -> None:
    """What the clients rely on: ragged stop words and request parameters do not split a batch, optional inputs do."""
    write_model(
        tmp_path, "echo", batching=DynamicBatching(preferred_batch_sizes=(4,), max_queue_delay_us=2_000_000)
    )
    word: dict[str, list[object]] = {"text_input": [b"hi"]}
    with TritonServer(tmp_path) as instance:
        progress: list[tuple[float | None, str]] = []
        instance.wait_ready(on_progress=lambda fraction, note: progress.append((fraction, note)))
        assert progress[-1] == (1.0, "ready")
        assert [(state.name, state.state) for state in instance.model_states()] == [("echo", "READY")]
        with triton.InferenceServerClient(instance.grpc_url) as client, ThreadPoolExecutor(4) as pool:
            stops: list[list[object]] = [[b"a"], [b"a", b"b"], [], [b"c"]]
            ragged = pool.map(lambda stop: ask(client, word | {"stop_words": stop}), stops)
            assert [answer["batch"] for answer in ragged] == [4, 4, 4, 4]
            plain = pool.map(lambda number: ask(client, word, max_tokens=number), range(4))
            assert [(answer["batch"], answer["parameters"]) for answer in plain] == [
                (4, {"max_tokens": i}) for i in range(4)
            ]
            mixed = pool.map(lambda more: ask(client, word | more), [{}, {"max_tokens": [1]}])
            assert [answer["batch"] for answer in mixed] == [1, 1]
        log = instance.log_path
    assert not log.exists()
    assert not shared_memory_left()


@server
def test_models_that_do_not_load_are_explained_with_tritons_reason(
    tmp_path: Path, shared_memory_left: Callable[[], set[Path]]
) -> None:
    repository = tmp_path / "repository"
    write_model(repository, "echo")
    write_model(repository, "imports", MISSING_IMPORT)
    write_model(repository, "crashes", ENDS_THE_PROCESS)
    (write_model(repository, "misspelled") / "config.pbtxt").write_text('nam: "x"\n')
    with (
        pytest.raises(ServerError) as caught,
        TritonServer(repository, log_path=tmp_path / "log") as instance,
    ):
        instance.wait_ready()
    message = str(caught.value)
    assert "could not load 3 of the models" in message
    assert (
        "imports version 1: Internal: ModuleNotFoundError: No module named 'a_module_that_nobody_has'"
        in message
    )
    assert "imports/1/model.py(1): <module>" in message
    assert "crashes version 1: Internal: Stub process" in message
    assert "misspelled: failed to read text proto" in message
    assert 'no field named "nam"' in message
    assert str(tmp_path / "log") in message
    assert not shared_memory_left()


@server
def test_a_server_killed_while_loading_is_reported_with_the_signal(
    tmp_path: Path, shared_memory_left: Callable[[], set[Path]]
) -> None:
    gate = tmp_path / "gate"
    write_model(tmp_path / "repository", "echo", loads_after(gate))
    with TritonServer(tmp_path / "repository") as instance:

        def kill(fraction: float | None, note: str) -> None:
            if "loading echo" in note:
                os.kill(instance.pid, signal.SIGKILL)

        with pytest.raises(ServerError, match="was killed by SIGKILL while it was loading"):
            instance.wait_ready(timeout_s=60, on_progress=kill)
    assert not shared_memory_left()


@server
def test_the_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    write_model(tmp_path, "echo")
    program = f"""
from pathlib import Path
from enginesmith.triton.server import TritonServer
instance = TritonServer(Path({str(tmp_path)!r}))
instance.start()
instance.wait_ready()
print(instance.pid, flush=True)
input()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
        family = [orphan, *orphan.children(recursive=True)]
        parent.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


@server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_where_it_serves_and_ends_cleanly_on_a_signal(
    tmp_path: Path, number: signal.Signals
) -> None:
    write_model(tmp_path, "echo")
    program = f"""
from pathlib import Path
from enginesmith.triton.server import serve_forever
serve_forever(Path({str(tmp_path)!r}), http_port=0, grpc_port=0, metrics_port=0, on_progress=lambda f, note: print(note, flush=True))
print("ended")
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "metrics" in line:
                process.send_signal(number)
        assert process.wait(60) == 0
    assert "serving echo\n" in lines
    assert lines[-1] == "ended\n"
