"""One real tritonserver for all client tests, with the small Python models of ``models/``."""

import shutil
from collections.abc import Iterator

import pytest
from served_models import LOADED, MODELS, RunningServer

from enginesmith.triton.server import TritonServer
from enginesmith_client import Client


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    # A copy, because the Python backend writes __pycache__ beside every model.py.
    repository = tmp_path_factory.mktemp("client") / "repository"
    shutil.copytree(MODELS, repository)
    with TritonServer(repository, model_control="explicit", load_models=LOADED) as running:
        running.wait_ready()
        yield RunningServer(running.grpc_url, running.http_url, repository)


@pytest.fixture(scope="session", params=["grpc", "http"])
def client(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[Client]:
    with Client(server.url(request.param), timeout_s=30) as connected:
        yield connected
