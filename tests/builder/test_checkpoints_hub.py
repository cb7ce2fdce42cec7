"""The hub source: huggingface_hub's real code against a local server that speaks the hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import tiny_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {
    "organisation/gated": (403, "GatedRepo"),
    "organisation/absent": (401, "RepoNotFound"),
    "organisation/forbidden": (403, ""),
    "organisation/broken": (500, ""),
}


class Hub(ThreadingHTTPServer):
    """Serves ``files`` as every repository at ``COMMIT``; remembers which were downloaded."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.downloaded: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    """The routes that ``list_repo_files`` and ``snapshot_download`` use."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository in REFUSALS:
            return self.refuse(*REFUSALS[repository])
        if COMMIT not in parts:
            return self.refuse(404, "RevisionNotFound")
        if parts[0] == "api":
            return self.answer(
                json.dumps([entry(name, data) for name, data in self.server.files.items()]).encode()
            )
        name = "/".join(parts[4:])
        if name not in self.server.files:
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.server.downloaded.append(name)
        return self.answer(self.server.files[name])

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "says the hub")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Stay quiet."""


def entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "checkpoint", shards=2)


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with Hub(
        files | {"README.md": b"a model", "consolidated.safetensors": b"twice", "onnx/model.onnx": b"x"}
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def download(
    repository: str, tmp_path: Path, *, endpoint: str, revision: str = COMMIT, **environment: str
) -> dict[str, Any]:
    """What ``download_from_hub`` gives or raises, in a process of its own: huggingface_hub reads its settings once."""
    script = (
        "import json, sys\n"
        "from enginesmith.checkpoints.hub import download_from_hub\n"
        "from enginesmith.errors import EnginesmithError\n"
        "try:\n"
        "    location, path = download_from_hub(sys.argv[1], sys.argv[2], member=None)\n"
        "    print(json.dumps({'kind': location.kind, 'path': str(path)}))\n"
        "except EnginesmithError as error:\n"
        "    print(json.dumps({'error': type(error).__name__, 'message': error.message, 'hint': error.hint}))\n"
    )
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-c", script, repository, revision]
    finished = subprocess.run(command, capture_output=True, text=True, env=inherited | settings, check=False)
    assert finished.returncode == 0, finished.stderr
    return dict(json.loads(finished.stdout))


def test_only_the_models_own_files_are_downloaded_and_the_cache_works_offline(
    hub: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    found = download("organisation/model", tmp_path, endpoint=hub.url)
    assert found["kind"] == "directory"
    expected = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert {path.name: path.read_bytes() for path in Path(found["path"]).iterdir()} == expected
    assert sorted(hub.downloaded) == sorted(expected)
    offline = download("organisation/model", tmp_path, endpoint=hub.url, HF_HUB_OFFLINE="1")
    unreachable = download("organisation/model", tmp_path, endpoint="http://127.0.0.1:9")
    assert offline == unreachable == found
    assert sorted(hub.downloaded) == sorted(expected)


@pytest.mark.parametrize(
    ("repository", "kind", "message", "hint"),
    [
        ("organisation/gated", "SourceError", "is gated", "hf auth login"),
        ("organisation/absent", "SourceError", "knows no repository organisation/absent", "check source.hub"),
        (
            "organisation/forbidden",
            "SourceError",
            "refuses access to organisation/forbidden (HTTP 403)",
            "HF_TOKEN",
        ),
        ("organisation/broken", "OperatorError", "answered HTTP 500", "try again later"),
        ("not a name", "SourceError", "is not the name of a hub repository", "organisation/name"),
    ],
)
def test_refusal_says_who_has_to_do_what(
    repository: str, kind: str, message: str, hint: str, hub: Hub, tmp_path: Path
) -> None:
    seen = download(repository, tmp_path, endpoint=hub.url)
    assert seen["error"] == kind
    assert message in seen["message"]
    assert hint in seen["hint"]


def test_unknown_commit_is_named(hub: Hub, tmp_path: Path) -> None:
    seen = download("organisation/model", tmp_path, endpoint=hub.url, revision="f" * 40)
    assert seen["error"] == "SourceError"
    assert seen["message"] == f"organisation/model has no commit {'f' * 40}"


def test_no_network_and_no_cache_is_explained(hub: Hub, tmp_path: Path) -> None:
    unreachable = download("organisation/model", tmp_path, endpoint="http://127.0.0.1:9")
    assert unreachable["error"] == "OperatorError"
    assert "the hub cannot be reached for organisation/model" in unreachable["message"]
    offline = download("organisation/model", tmp_path, endpoint=hub.url, HF_HUB_OFFLINE="1")
    assert offline["error"] == "OperatorError"
    assert "HF_HUB_OFFLINE forbids" in offline["message"]


def test_repository_of_pickled_weights_only_says_how_to_convert_them(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    seen = download("organisation/model", tmp_path, endpoint=hub.url)
    assert "organisation/model on the hub holds no model" in seen["message"]
    assert "save_pretrained" in seen["hint"]
    assert hub.downloaded == []
