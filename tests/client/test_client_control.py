"""Loading, unloading, sequences and deadlines of a real tritonserver, over both protocols."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_models import MODELS, RunningServer, await_content

from enginesmith.triton.server import TritonServer
from enginesmith_client import (
    Client,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    Sequence_,
)

pytestmark = pytest.mark.server
ONE = {"x": np.array([1], np.int32)}


def test_a_model_is_gone_after_unload_and_back_after_load(client: Client) -> None:
    client.load("changing")
    assert client.infer("changing", ONE)["y"].tolist() == [1]
    client.unload("changing")
    with pytest.raises(ModelNotReady, match=r"not ready: changing version 1 \(UNAVAILABLE: unloaded\)"):
        client.infer("changing", ONE)
    client.unload("changing")
    client.load("changing")
    client.wait_ready("changing", timeout_s=5)
    assert client.infer("changing", ONE)["y"].tolist() == [1]


def test_a_model_is_loaded_with_another_configuration(client: Client) -> None:
    config = dict(client.config("changing"))
    try:
        client.load("changing", config={**config, "parameters": {"mood": {"string_value": "good"}}})
        assert client.config("changing")["parameters"]["mood"]["string_value"] == "good"
    finally:
        client.load("changing", config=config)


def test_a_model_is_sent_with_its_files(client: Client) -> None:
    config = {**client.config("changing"), "name": "sent"}
    source = (MODELS / "changing" / "1" / "model.py").read_bytes()
    client.load("sent", config=config, files={"1/model.py": source})
    try:
        assert client.infer("sent", ONE)["y"].tolist() == [1]
    finally:
        client.unload("sent")


def test_a_model_that_cannot_be_loaded_is_told_with_the_servers_reason(
    client: Client, server: RunningServer
) -> None:
    with pytest.raises(ModelNotReady, match="no such model, or its configuration cannot be read"):
        client.load("nowhere")
    try:
        with pytest.raises(ModelNotReady, match="the weights are missing"):
            client.load("broken")
    finally:
        weights = server.repository / "broken" / "1" / "weights"
        weights.touch()
        client.load("broken")
        weights.unlink()
        client.unload("broken")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": {"1/model.py": b""}}, "came without config"),
        ({"config": {}, "files": {"1/model.py": "text"}}, "must map paths"),
    ],
)
def test_an_override_that_cannot_be_sent_is_refused(
    client: Client, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        client.load("changing", **arguments)


def test_a_server_that_does_not_let_clients_load_says_how_it_would(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    with TritonServer(tmp_path / "repository") as running:
        running.wait_ready()
        for url in (f"grpc://{running.grpc_url}", f"http://{running.http_url}"):
            with Client(url) as client:
                for call in (client.load, client.unload):
                    with pytest.raises(InvalidInput, match=r"not allowed.*\n.*--model-control-mode=explicit"):
                        call("echo")


def test_a_load_that_never_ends_is_over_at_its_deadline_and_says_why(tmp_path: Path) -> None:
    """A version directory without its model file hangs tritonserver 2.51; the model cannot be loaded again."""
    model = tmp_path / "repository" / "hollow"
    (model / "1").mkdir(parents=True)
    config = (MODELS / "changing" / "config.pbtxt").read_text(encoding="utf-8")
    (model / "config.pbtxt").write_text(config, encoding="utf-8")
    with (
        TritonServer(tmp_path / "repository", model_control="explicit") as running,
        Client(f"grpc://{running.grpc_url}") as client,
    ):
        client.wait_ready(timeout_s=20)
        with pytest.raises(DeadlineExceeded) as caught:
            client.load("hollow", timeout_s=0.5)
        os.kill(running.pid, signal.SIGKILL)  # It would wait for the model before it ends.
    assert caught.value.hint is not None
    assert "hollow version 1 (LOADING)" in caught.value.hint
    assert "without its model file" in caught.value.hint


@pytest.mark.parametrize("ids", [(1, 2), ("a", "b")])
def test_requests_of_one_sequence_share_their_state(client: Client, ids: tuple[Any, Any]) -> None:
    def add(sequence: Any, number: int, **ends: bool) -> int:
        inputs = {"x": np.array([[number]], np.int32)}
        return int(client.infer("stateful", inputs, sequence=Sequence_(sequence, **ends))["total"].item())

    assert add(ids[0], 1, start=True) == 1
    assert add(ids[0], 10) == 11
    assert add(ids[0], 100, end=True) == 111
    assert add(ids[1], 5, start=True, end=True) == 5


def test_a_request_without_a_sequence_is_refused_by_a_model_that_keeps_state(client: Client) -> None:
    with pytest.raises(InvalidInput, match="must specify a non-zero or non-empty correlation ID"):
        client.infer("stateful", {"x": np.array([[1]], np.int32)})


def test_a_request_that_nobody_waits_for_any_more_is_never_computed(client: Client, tmp_path: Path) -> None:
    """The queue of the model has a default timeout, which the one of the request shortens."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))

    def ask(gate: Path, timeout_s: float = 30) -> None:
        client.infer("gated", {"gate": np.array([[str(gate)]], np.object_)}, timeout_s=timeout_s)

    holder = threading.Thread(target=ask, args=(first,))
    holder.start()
    await_content(first.with_suffix(".entered"), "")
    with pytest.raises(DeadlineExceeded):
        ask(second, timeout_s=0.3)
    holder.join(0.3)  # The server's clock began a little later than ours, and nothing shows that it is over.
    second.touch()
    first.touch()
    holder.join(30)
    third.touch()
    ask(third)  # The queue is first in, first out: what was in it before has been looked at.
    assert not second.with_suffix(".entered").exists()


def test_priorities_are_taken_by_models_with_and_without_levels(client: Client) -> None:
    inputs = {name: np.zeros((1, 2), np.float32) for name in "ab"}
    for priority in (0, 1, 7):
        assert client.infer("pair", inputs, priority=priority)["sum"].tolist() == [[0.0, 0.0]]
