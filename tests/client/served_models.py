"""The models that the client tests are served, and a handle on the server that serves them."""

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
MODELS = Path(__file__).parent / "models"
LOADED = (
    "bls", "changing", "echo", "gated", "llm", "llmapi", "moods-text", "pair", "plain_llm", "raises", "relevance-text",
    "sentences", "sentences-text", "stateful", "streaming",
)  # fmt: skip
"""What the server loads at its start; ``broken`` is there too and cannot be loaded."""


def await_content(file: Path, content: str, *, timeout_s: float = 20) -> None:
    """Return when ``file`` holds ``content``, which a model in another process writes."""
    deadline_s = time.monotonic() + timeout_s
    while not file.exists() or file.read_text() != content:
        assert time.monotonic() < deadline_s, f"{file.name} never became {content!r}"
        time.sleep(0.002)


def settled(read: Callable[[], T]) -> T:
    """What ``read`` says once it says the same twice: Triton counts a request when its answer is on its way already."""
    seen = read()
    while True:
        time.sleep(0.1)
        before, seen = seen, read()
        if seen == before:
            return seen


@dataclass(frozen=True)
class RunningServer:
    """The server of the session and the repository that it serves."""

    grpc_url: str
    http_url: str
    repository: Path

    def url(self, protocol: str) -> str:
        return f"{protocol}://{self.grpc_url if protocol == 'grpc' else self.http_url}"

    def load(self, model: str) -> bool:
        """Load a model again; returns whether Triton could."""
        return self._post(f"/v2/repository/models/{model}/load")[0] == 200

    def unload(self, model: str) -> None:
        """Unload a model; returns when it is gone. Triton answers before that."""
        assert self._post(f"/v2/repository/models/{model}/unload")[0] == 200
        while any(entry["name"] == model and entry.get("state") == "UNLOADING" for entry in self._index()):
            time.sleep(0.01)

    def _index(self) -> list[dict[str, str]]:
        return list(json.loads(self._post("/v2/repository/index")[1]))

    def _post(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.http_url, timeout=30)
        try:
            connection.request("POST", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()
