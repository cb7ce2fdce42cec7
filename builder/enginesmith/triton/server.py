"""Runs one tritonserver: start, wait until every model is READY, explain what failed, stop.

Knows the program's command line, its log and its HTTP endpoint for health and the repository index; nothing of
models or engines. The server listens on 127.0.0.1 only, ends when the process that started it ends, and leaves
nothing in ``/dev/shm``.

A model that does not load is an error here, as it is for a plain tritonserver. The server is nevertheless run
with ``--exit-on-error=false``, because only a server that stays up can be asked *why* each model failed. Auto
completion of configurations is off: the configurations that enginesmith writes are complete, and completing
them would start every Python model twice.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from enginesmith.errors import EnginesmithError, ServerError
from enginesmith.triton.installation import ServerInstallation, find_server
from enginesmith.triton.ports import LOOPBACK, claim_ports
from enginesmith.triton.response_cache import cache_arguments, cache_bytes_for
from enginesmith.triton.server_log import LoadProgress, explain_reason, poll_failures, tail
from enginesmith.triton.shared_memory import new_prefix, remove_segments, remove_segments_of_the_dead

__all__ = ["ModelState", "Progress", "ServerInstallation", "TritonServer", "find_server", "serve_forever"]

Progress = Callable[[float | None, str], None]
"""Called with a fraction in [0, 1] (None: unknown) and a note for people."""

LOAD_TIMEOUT_S = 300.0
EXIT_TIMEOUT_S = 10
_BEGIN_TIMEOUT_S = 5
_POLL_INTERVAL_S = 0.05
_DYING_S = 1.0
# Ends the server when the thread that started it ends, also when that is by kill -9. prctl belongs between fork
# and exec, where Python code is unsafe in a process with threads; so a tiny program does it and becomes the server.
_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that wanted this server is gone")
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")
"""


@dataclass(frozen=True)
class ModelState:
    """One line of Triton's repository index."""

    name: str
    version: str | None
    """None for a model of which nothing was loaded."""
    state: str
    """READY, UNAVAILABLE, LOADING, UNLOADING; empty where Triton never tried to load it."""
    reason: str


class TritonServer:
    """A tritonserver on ``repository``; a context manager that starts it and stops it.

    Args:
        repository: the model repository.
        installation: which server to run. Default: ``find_server()``.
        http_port, grpc_port, metrics_port: 0 picks a free port.
        model_control: "none" loads all models, "explicit" those in ``load_models`` and what is asked for later.
        python_path: directories that the models may import from, first; with the wheel's server only the first one.
        cache_bytes: the size of the response cache; 0: none.
        log_path: where the server's output goes. Default: a temporary file, kept only when something failed.
        extra_args: further arguments of tritonserver.
    """

    def __init__(
        self,
        repository: Path,
        *,
        installation: ServerInstallation | None = None,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        model_control: Literal["none", "explicit"] = "none",
        load_models: Sequence[str] = (),
        python_path: Sequence[Path] = (),
        cache_bytes: int = 0,
        log_path: Path | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        self._repository = repository.absolute()
        self._installation = installation
        self._wanted_ports = {"HTTP": http_port, "gRPC": grpc_port, "metrics": metrics_port}
        self._ports: Mapping[str, int] = self._wanted_ports
        self._model_control = model_control
        self._load_models = tuple(load_models)
        self._python_path = tuple(python_path)
        self._cache_bytes = cache_bytes
        self._log_path = log_path
        self._keep_log = log_path is not None
        self._extra_args = tuple(extra_args)
        self._shared_memory_prefix = new_prefix()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._keep_log = True
        try:
            if isinstance(error, Exception) and not isinstance(error, EnginesmithError):
                self._blame_the_server(error)
        finally:
            self.stop()

    @property
    def http_url(self) -> str:
        """Host and port of the HTTP endpoint, as tritonclient takes it."""
        return f"{LOOPBACK}:{self._ports['HTTP']}"

    @property
    def grpc_url(self) -> str:
        """Host and port of the gRPC endpoint, as tritonclient takes it."""
        return f"{LOOPBACK}:{self._ports['gRPC']}"

    @property
    def metrics_url(self) -> str:
        """The address of the Prometheus metrics."""
        return f"http://{LOOPBACK}:{self._ports['metrics']}/metrics"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return self._running().pid

    @property
    def log_path(self) -> Path:
        """Where the server's output goes; known once it was started."""
        assert self._log_path is not None, "the server was not started"
        return self._log_path

    def start(self) -> None:
        """Start the process; returns before the models are loaded.

        Raises:
            ServerError: the repository does not exist, or a port is in use.
            ToolchainError: there is no tritonserver.
        """
        assert self._process is None, "the server was already started"
        if not self._repository.is_dir():
            raise ServerError(
                f"no model repository at {self._repository}",
                hint="publish a model into it first: enginesmith build --publish",
            )
        installation = self._installation or find_server()
        remove_segments_of_the_dead()
        self._ports = claim_ports(self._wanted_ports)
        if self._log_path is None:
            descriptor, name = tempfile.mkstemp(prefix="tritonserver-", suffix=".log")
            os.close(descriptor)
            self._log_path = Path(name)
        environment = installation.environment(os.environ, self._python_path)
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        command = [*launcher, str(installation.executable), *self._arguments(installation)]
        started = threading.Event()
        # The kernel ties the server's life to the thread that starts it, so that thread does nothing else.
        self._owner = threading.Thread(target=self._own, args=(command, environment, started), daemon=True)
        try:
            self._owner.start()
            started.wait()
        except BaseException:
            # Who is interrupted in `with` has not entered it and so does not leave it. The thread may not have begun.
            started.wait(_BEGIN_TIMEOUT_S)
            self.stop()
            raise
        self._running()

    def wait_ready(self, timeout_s: float = LOAD_TIMEOUT_S, on_progress: Progress | None = None) -> None:
        """Return when every model that should be loaded is READY.

        Raises:
            ServerError: a model failed to load, the server died, or ``timeout_s`` passed.
        """
        deadline = time.monotonic() + timeout_s
        progress = LoadProgress(self.log_path)
        last: tuple[float | None, str] | None = None
        while not self._is_live():
            self.require_alive("while it was loading models")
            now = (progress.update(), progress.note)
            if on_progress and now != last:
                on_progress(*now)
                last = now
            if time.monotonic() > deadline:
                self._keep_log = True
                waiting = ", ".join(progress.loading) or "nothing yet"
                raise ServerError(
                    f"tritonserver was not ready after {timeout_s:g} s; still loading: {waiting}\n{tail(self.log_path)}",
                    hint=f"the whole log: {self.log_path}",
                )
            time.sleep(_POLL_INTERVAL_S)
        self._require_models()
        if on_progress:
            on_progress(1.0, "ready")

    def model_states(self) -> tuple[ModelState, ...]:
        """What Triton's repository index says about every model and version it knows."""
        index = self._request("POST", "/v2/repository/index")
        return tuple(
            ModelState(entry["name"], entry.get("version"), entry.get("state", ""), entry.get("reason", ""))
            for entry in index
        )

    def server_version(self) -> str:
        """The version that the running server reports."""
        return str(self._request("GET", "/v2")["version"])

    def wait_exit(self) -> None:
        """Block until the server ends by itself, which is always an error.

        Raises:
            ServerError: with the exit status and the end of the log.
        """
        self._running()
        assert self._owner is not None, "a running server has an owner"
        # A signal that arrives just before an unlimited wait would not interrupt it.
        while self._owner.is_alive():
            self._owner.join(_POLL_INTERVAL_S * 10)
        self.require_alive("while it was serving")

    def stop(self) -> None:
        """End the server and everything it started. Does nothing when it is not running."""
        process = self._process
        if process is None:
            return
        try:
            process.terminate()
            process.wait(EXIT_TIMEOUT_S + 5)
        except subprocess.TimeoutExpired:
            self._keep_log = True
        finally:
            # The models' processes are in the server's group and may outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            remove_segments(self._shared_memory_prefix)
            self._process = None
            if not self._keep_log:
                self.log_path.unlink(missing_ok=True)
                self._log_path = None

    def _arguments(self, installation: ServerInstallation) -> Iterator[str]:
        yield f"--model-repository={self._repository}"
        for endpoint in ("HTTP", "gRPC", "metrics"):
            yield f"--{endpoint.lower()}-address={LOOPBACK}"
            yield f"--{endpoint.lower()}-port={self._ports[endpoint]}"
        yield f"--model-control-mode={self._model_control}"
        for model in self._load_models:
            yield f"--load-model={model}"
        yield "--exit-on-error=false"
        yield "--disable-auto-complete-config"
        yield f"--exit-timeout-secs={EXIT_TIMEOUT_S}"
        yield f"--backend-config=python,shm-region-prefix-name={self._shared_memory_prefix}"
        if installation.backend_directory:
            yield f"--backend-directory={installation.backend_directory}"
        yield from cache_arguments(self._cache_bytes, installation)
        yield from self._extra_args

    def _own(self, command: Sequence[str], environment: Mapping[str, str], started: threading.Event) -> None:
        with self.log_path.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    # The stub in the wheel nvidia-pytriton ignores PYTHONPATH and imports from where it is started.
                    cwd=self._python_path[0] if self._python_path else None,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    process_group=0,
                )
            finally:
                started.set()
        self._process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("tritonserver is not running")
        return self._process

    def _is_live(self) -> bool:
        try:
            self._request("GET", "/v2/health/live")
        except (OSError, http.client.HTTPException):
            return False
        except ServerError as error:
            # It answers only when it has loaded what it can; what it could not initialize stays so.
            self._keep_log = True
            raise ServerError(
                f"tritonserver could not be initialized\n{tail(self.log_path)}",
                hint=f"the whole log: {self.log_path}",
            ) from error
        return True

    def _request(self, method: str, path: str) -> Any:
        connection = http.client.HTTPConnection(LOOPBACK, self._ports["HTTP"], timeout=10)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise ServerError(
                f"tritonserver answered {response.status} to {method} {path}: {body.decode(errors='replace')[:500]}"
            )
        return json.loads(body) if body else None

    def _blame_the_server(self, error: Exception) -> None:
        """Whatever its user could not do with a server that is dead, that is the reason."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Its connections break a little before it is dead.
            process.wait(_DYING_S if isinstance(error, (OSError, http.client.HTTPException)) else 0)
        try:
            self.require_alive("while it was in use")
        except ServerError as death:
            raise death from error

    def require_alive(self, when: str) -> None:
        """Return when the server still runs; ``when`` is part of the error's sentence.

        Raises:
            ServerError: it ended, with the end of its log.
        """
        status = self._running().poll()
        if status is None:
            return
        self._keep_log = True
        how = (
            f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        )
        raise ServerError(
            f"tritonserver {how} {when}\n{tail(self.log_path)}", hint=f"the whole log: {self.log_path}"
        )

    def _require_models(self) -> None:
        polled = poll_failures(self.log_path)
        failed = [
            state
            for state in self.model_states()
            if state.state != "READY" and (self._model_control == "none" or state.name in self._load_models)
        ]
        if not failed:
            return
        self._keep_log = True
        explained = [
            f"  {state.name}{f' version {state.version}' if state.version else ''}: "
            f"{explain_reason(state.reason or polled.get(state.name, 'Triton gives no reason'))}"
            for state in failed
        ]
        raise ServerError(
            f"tritonserver could not load {len(failed)} of the models in {self._repository}\n"
            + "\n".join(explained),
            hint=f"the whole log: {self.log_path}",
        )


def serve_forever(
    repository: Path,
    *,
    server: str = "auto",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    cache_bytes: int | None = None,
    on_progress: Progress,
) -> None:
    """Serve ``repository`` until Ctrl-C or SIGTERM, then return. Call it from the main thread.

    ``cache_bytes`` is the size of the response cache; None: some, if a model asks for it.
    The URLs are the last note given to ``on_progress``. An interrupt before the models are READY is raised as
    KeyboardInterrupt.

    Raises:
        ServerError: the repository is empty, a port is in use, a model does not load, or the server dies.
    """
    if not any(repository.glob("*/config.pbtxt")):
        raise ServerError(
            f"there is no model in {repository}: no directory with a config.pbtxt",
            hint="enginesmith build SPEC --publish " + str(repository),
        )
    instance = TritonServer(
        repository,
        installation=find_server(server),
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        cache_bytes=cache_bytes_for(repository, cache_bytes),
    )
    with _sigterm_as_interrupt(), instance:
        instance.wait_ready(on_progress=on_progress)
        models = sorted({state.name for state in instance.model_states() if state.state == "READY"})
        with contextlib.suppress(KeyboardInterrupt):
            on_progress(
                1.0,
                f"serving {', '.join(models)}\n  gRPC     {instance.grpc_url}\n  HTTP     http://{instance.http_url}\n  metrics  {instance.metrics_url}",
            )
            instance.wait_exit()


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
