"""The parts of the served LLM API model that need neither Triton nor TensorRT-LLM."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from enginesmith.triton.llmapi.rehearse import place_stand_in
from enginesmith.triton.llmapi.scenarios import Journal
from enginesmith.triton.models.llmapi.llm_settings import choose_gpus, leave_mpi_job, read_settings
from enginesmith.triton.models.llmapi.llm_stream import TextStream

TWO_INSTANCES = {
    "parameters": {"gpu_device_ids": {"string_value": "0,1;2,3"}},
    "instance_group": [{"count": 2, "kind": "KIND_CPU"}],
}


def streamed(pieces: list[str], stops: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    """What a client sees of a text that grows by ``pieces``, and the stop string that ended it."""
    stream, seen, text = TextStream(stops), [], ""
    for piece in pieces:
        text += piece
        kept, found = stream.cut(text)
        if found is not None:
            return [*seen, stream.last_piece(kept)], found
        seen.append(stream.piece(kept))
    return [*seen, stream.last_piece(text)], None


@given(
    st.lists(st.text("ab\ufffd", max_size=3), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
)
@example(["ba", "a"], ["a", "baa"])
def test_the_pieces_joined_are_the_text_up_to_the_stop_string_that_is_complete_first(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    seen, found = streamed(pieces, tuple(stops))
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    _, place, stop = min(ends, default=(0, len(text), None))
    assert "".join(seen) == text[:place]
    assert found == stop


def test_half_a_character_waits_for_its_other_half() -> None:
    stream = TextStream(())
    assert [stream.piece(text) for text in ("a", "a\ufffd", "a\ufffd\ufffd", "a東")] == ["a", "", "", "東"]


def test_a_replacement_character_at_the_end_is_sent_at_the_end() -> None:
    stream = TextStream(())
    assert stream.piece("a\ufffd") == "a"
    assert stream.last_piece("a\ufffd") == "\ufffd"


def test_the_beginning_of_a_stop_string_is_not_sent() -> None:
    assert streamed(["x\n", "\n", "y"], ("\n\n",)) == (["x", ""], "\n\n")
    assert streamed(["x\n", "y"], ("\n\n",)) == (["x", "\ny", ""], None)


def write_settings(directory: Path, text: str) -> Path:
    (directory / "model.yaml").write_text(text)
    return directory


def test_a_relative_model_beside_the_settings_becomes_a_path(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    settings = read_settings(write_settings(tmp_path, "model: checkpoint\nmax_seq_len: 64\n"), {})
    assert settings.llm_arguments == {"model": str(tmp_path / "checkpoint"), "max_seq_len": 64}
    assert settings.max_sequence_length == 64


def test_a_model_that_is_no_directory_here_is_passed_on(tmp_path: Path) -> None:
    settings = read_settings(write_settings(tmp_path, "model: organisation/name\n"), {})
    assert settings.llm_arguments == {"model": "organisation/name"}


def test_the_triton_half_does_not_reach_the_llm(tmp_path: Path) -> None:
    text = "model: m\nmax_batch_size: 4\ntriton_config: {cancellation_check_period_ms: 20, max_queue_size: 3, max_prompt_length: 9}\n"
    settings = read_settings(write_settings(tmp_path, text), {})
    assert settings.llm_arguments == {"model": "m", "max_batch_size": 4}
    assert settings.cancellation_check_period_s == 0.02
    assert settings.max_prompt_length == 9
    assert settings.max_requests == 7


def test_another_file_of_settings_can_be_named(tmp_path: Path) -> None:
    version = tmp_path / "1"
    version.mkdir()
    write_settings(version, "model: first\n")
    other = tmp_path / "other.yaml"
    other.write_text("model: second\n")
    settings = read_settings(version, {"LLM_CONFIG_PATH": str(other)})
    assert settings.llm_arguments == {"model": "second"}


@pytest.mark.parametrize("text", ["", "[1]", "model:\n", "a: [", "backend: pytorch\n"])
def test_broken_settings_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(RuntimeError, match=r"model\.yaml"):
        read_settings(write_settings(tmp_path, text), {})


def test_every_instance_sees_its_own_gpus_only() -> None:
    for instance, expected in (("tensorrt_llm_0_0", "0,1"), ("tensorrt_llm_0_1", "2,3")):
        environment: dict[str, str] = {}
        choose_gpus(TWO_INSTANCES, instance, environment)
        assert environment == {"CUDA_VISIBLE_DEVICES": expected, "TRTLLM_VISIBLE_DEVICES": expected}


def test_one_instance_without_ids_keeps_what_it_sees() -> None:
    environment: dict[str, str] = {}
    choose_gpus({"instance_group": [{"count": 1}]}, "m_0_0", environment)
    assert environment == {}


@pytest.mark.parametrize("ids", ["", "0,1", "0;1;2"])
def test_instances_that_would_share_gpus_are_refused(ids: str) -> None:
    config = {**TWO_INSTANCES, "parameters": {"gpu_device_ids": {"string_value": ids}}}
    with pytest.raises(RuntimeError, match="gpu_device_ids"):
        choose_gpus(config, "m_0_0", {})


def test_the_mpi_job_is_left_and_its_configuration_kept() -> None:
    kept = {"OMPI_MCA_btl": "tcp", "PMIX_MCA_gds": "hash", "PATH": "/bin"}
    left = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0", "PMI_SIZE": "1"}
    environment = {**kept, **left}
    leave_mpi_job(environment)
    assert environment == kept


def test_one_of_several_ranks_is_refused() -> None:
    with pytest.raises(RuntimeError, match="started as 2 MPI ranks"):
        leave_mpi_job({"OMPI_COMM_WORLD_SIZE": "2"})


class Sender:
    """Triton's response sender, slow, which notes when it is used in a way that ends tritonserver."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.final = threading.Event()
        self.quiet = threading.Event()
        self.quiet.set()
        self.asked_too_late = False

    def send(self, _response: object, flags: int = 0) -> None:
        if flags:
            self.final.set()
        time.sleep(0.003)

    def is_cancelled(self) -> bool:
        self.quiet.clear()
        self.asked.set()
        time.sleep(0.005)
        self.asked_too_late |= self.final.is_set()
        self.quiet.set()
        return False


class Request:
    """A request as the Python backend hands it over."""

    def __init__(self, **inputs: Any) -> None:
        self.inputs = {name: np.array([value]) for name, value in inputs.items()}
        self.sender = Sender()

    def get_response_sender(self) -> Sender:
        return self.sender

    def request_id(self) -> str:
        return ""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Journal]]:
    """The served model, loaded without a server: the Python backend's module is played, and TensorRT-LLM echoes."""
    python, journal = place_stand_in(tmp_path, None)
    backend = types.ModuleType("triton_python_backend_utils")
    played: dict[str, Any] = {
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": 1,
        "TritonModelException": RuntimeError,
        "Tensor": lambda name, array: (name, array),
        "InferenceResponse": lambda tensors=(), error=None: (tensors, error),
        "TritonError": type("TritonError", (), {"INVALID_ARG": 3, "CANCELLED": 10, "INTERNAL": 1, "UNAVAILABLE": 4}),
        "using_decoupled_model_transaction_policy": lambda _config: True,
        "get_input_tensor_by_name": lambda request, name: _tensor(request, name),
    }  # fmt: skip
    for name, value in played.items():
        setattr(backend, name, value)
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.syspath_prepend(str(python))
    code = importlib.import_module("enginesmith.triton.models.llmapi").__path__[0]
    monkeypatch.syspath_prepend(code)
    _write_version(tmp_path / "1")
    model = importlib.import_module("model").TritonPythonModel()
    arguments = {"model_config": "{}", "model_repository": str(tmp_path), "model_version": "1"}
    model.initialize({**arguments, "model_instance_name": "tensorrt_llm_0_0"})
    try:
        yield model, journal
    finally:
        model.finalize()
        mine = ("model", "llm_engine", "llm_requests", "llm_settings", "llm_stream")
        for name in set(sys.modules) - before:
            if name in mine or name.split(".")[0] == "tensorrt_llm":
                del sys.modules[name]


def _tensor(request: Request, name: str) -> Any:
    array = request.inputs.get(name)
    return None if array is None else types.SimpleNamespace(as_numpy=lambda: array)


def _write_version(version: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    checkpoint = version / "checkpoint"
    checkpoint.mkdir(parents=True)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "config.json").write_text("{}")
    settings = {"model": "checkpoint", "backend": "pytorch", "max_seq_len": 64}
    (version / "model.yaml").write_text(
        json.dumps({**settings, "triton_config": {"cancellation_check_period_ms": 1, "decoupled": True}})
    )


def test_a_sender_is_never_asked_once_its_final_response_is_sent(
    served: tuple[Any, Journal],
) -> None:
    """Asking it then, or while it is sent, is a segmentation fault of tritonserver (seen on 2.51)."""
    model, journal = served
    for _ in range(12):
        request = Request(text_input=b"a b a b")
        with journal.held():
            model.execute([request])
            assert request.sender.asked.wait(30)
        assert request.sender.final.wait(30)
        request.sender.quiet.wait(30)
        assert not request.sender.asked_too_late
