"""A tritonserver with small models, and fronts over it as their users run them: processes of the command line."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from enginesmith.triton.server import TritonServer

MODELS = Path(__file__).parent / "openai_models"
ENCODERS = Path(__file__).parents[1] / "client" / "models"
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Front:
    """A front that runs."""

    url: str
    """With /v1."""
    process: subprocess.Popen[str]

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers (names in lower case) and document of the answer to a request as it is."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            return response.status, fields, json.loads(response.read())
        finally:
            connection.close()

    def ask(self, path: str, **fields: Any) -> tuple[int, dict[str, str], Any]:
        """The same for a JSON object."""
        return self.send("POST", path, json.dumps(fields).encode())


@contextmanager
def serving_models(directory: Path) -> Iterator[str]:
    """The gRPC URL of a server with ``speaker``, ``prompts-only``, ``sentences`` and ``sentences-text``."""
    shutil.copytree(MODELS, directory)
    for name in ("sentences", "sentences-text"):
        shutil.copytree(ENCODERS / name, directory / name)
    with TritonServer(directory) as server:
        server.wait_ready()
        yield f"grpc://{server.grpc_url}"


@contextmanager
def front_over(triton_url: str, *arguments: str) -> Iterator[Front]:
    """``enginesmith openai`` on a free port; ended at the end, if it has not ended before."""
    command = [sys.executable, "-m", "enginesmith.cli", "openai", "--triton", triton_url, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--json", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield Front(json.loads(line)["url"], process)
    finally:
        process.kill()
        process.communicate()


def wait_for_text(path: Path, text: str) -> None:
    """Return when the file holds ``text``; another process writes it."""
    until_s = time.monotonic() + PATIENCE_S
    while not (path.exists() and path.read_text() == text):
        assert time.monotonic() < until_s, f"{path.name} does not hold {text!r}"
        time.sleep(0.002)
