"""One real tritonserver for all tests of the perf harness, with the small Python models of ``models/``."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import pytest
from perf_models import LOADED, MODELS, PerfServer

from enginesmith.triton.server import TritonServer

Start = Callable[..., AbstractContextManager[TritonServer]]


@pytest.fixture(scope="session")
def perf_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PerfServer]:
    """Serves ``tiny``, ``steady20``, ``stalling`` and ``tokens``. Nobody may unload them or stop it."""
    # A copy, because the Python backend writes __pycache__ beside every model.py.
    repository = tmp_path_factory.mktemp("perf") / "repository"
    shutil.copytree(MODELS, repository)
    with TritonServer(repository, model_control="explicit", load_models=LOADED) as running:
        running.wait_ready()
        yield PerfServer(running.grpc_url, running.metrics_url, running.pid, repository)


@pytest.fixture
def own_server(tmp_path: Path) -> Start:
    """Starts a server of the test's own, which it may kill: ``with own_server("tiny") as server``.

    ``clients_load=True`` lets clients load and unload models.
    """

    @contextmanager
    def start(*models: str, clients_load: bool = False) -> Iterator[TritonServer]:
        repository = tmp_path / "repository"
        for model in models:
            shutil.copytree(MODELS / model, repository / model)
        control: Literal["none", "explicit"] = "explicit" if clients_load else "none"
        with TritonServer(
            repository, model_control=control, load_models=models if clients_load else ()
        ) as running:
            running.wait_ready()
            yield running

    return start
