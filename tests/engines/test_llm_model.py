"""The served model's entry point: every request gets its own answer or its own error.

Triton's own module exists only inside its Python backend, so its few classes are stood in for here; the
rehearsal tests run the same file in a real tritonserver.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import tiny_checkpoint
from engine_cases import edit_tensors, lowered

SERVING = {
    "max_batch_size": 2,
    "max_sequence_length": 64,
    "max_prompt_length": 40,
    "default_max_tokens": 6,
    "threads": 1,
}


@dataclass(frozen=True)
class Tensor:
    """``pb_utils.Tensor``."""

    label: str
    array: Any

    def name(self) -> str:
        return self.label

    def as_numpy(self) -> Any:
        return self.array


@dataclass(frozen=True)
class TritonError:
    """``pb_utils.TritonError``."""

    text: str
    code: int

    INTERNAL = 1
    INVALID_ARG = 2


@dataclass(frozen=True)
class InferenceResponse:
    """``pb_utils.InferenceResponse``."""

    tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def column(self, name: str) -> list[Any]:
        (found,) = (tensor.array for tensor in self.tensors if tensor.label == name)
        return [row[0].decode() if isinstance(row[0], bytes) else int(row[0]) for row in found]


def request(texts: list[bytes], **inputs: Any) -> SimpleNamespace:
    """A request with one row per text; other inputs are the same in every row."""
    tensors = [Tensor("text_input", np.array([[text] for text in texts], np.object_))]
    for name, value in inputs.items():
        values = value if isinstance(value, list) else [value]
        dtype = np.object_ if isinstance(values[0], bytes) else None
        tensors.append(Tensor(name, np.array([values] * len(texts), dtype)))
    return SimpleNamespace(inputs=lambda: tensors)


@pytest.fixture(scope="module")
def backend() -> Iterator[ModuleType]:
    """``model.py``, imported as the Python backend imports it: from its folder, beside Triton's module."""
    stand_in = ModuleType("triton_python_backend_utils")
    for kind in (Tensor, TritonError, InferenceResponse):
        setattr(stand_in, kind.__name__, kind)
    folder = str(importlib.resources.files("enginesmith.triton.models") / "llm_onnxruntime")
    names = ("triton_python_backend_utils", "llm_runtime", "llm_text", "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(sys.modules, names[0], stand_in)
        for name in names[1:]:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("model")
        for name in names[1:]:
            sys.modules.pop(name, None)


def serve(backend: ModuleType, checkpoint: Path, repository: Path) -> Any:
    """A loaded model, its engine lowered from ``checkpoint`` into version directory 1 of ``repository``."""
    version = lowered(checkpoint, repository / "1")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (version / name).write_bytes((checkpoint / name).read_bytes())
    (version / "serving.json").write_text(json.dumps(SERVING))
    model = backend.TritonPythonModel()
    model.initialize({"model_repository": str(repository), "model_version": "1"})
    return model


@pytest.fixture(scope="module")
def served(backend: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    repository = tmp_path_factory.mktemp("repository")
    return serve(backend, tiny_checkpoint(repository / "checkpoint"), repository)


def test_rows_and_requests_are_answered_in_order(served: Any) -> None:
    texts = [b"one", b"a rather longer text", b"x", b"yet another", b"five"]
    apart = [served.execute([request([text])])[0] for text in texts]

    together = served.execute([request(texts[:3]), request(texts[3:])])

    for name in ("text_output", "num_input_tokens", "num_output_tokens", "finish_reason"):
        answers = [answer for response in together for answer in response.column(name)]
        assert answers == [response.column(name)[0] for response in apart]
    assert [len(response.column("text_output")) for response in together] == [3, 2]


def test_parameters_left_out_have_the_packages_defaults(served: Any) -> None:
    response = served.execute([request([b"text"])])[0]
    assert response.column("num_output_tokens")[0] <= SERVING["default_max_tokens"]
    assert served.execute([request([b"text"], max_tokens=2)])[0].column("num_output_tokens") == [2]


def test_chat_template_is_applied_on_request(served: Any) -> None:
    plain, chat = served.execute([request([b"Hi"]), request([b"Hi"], apply_chat_template=True)])
    assert chat.column("num_input_tokens")[0] > plain.column("num_input_tokens")[0]


@pytest.mark.parametrize(
    ("text", "inputs", "message"),
    [
        (b"", {}, "text_input is empty"),
        (b"\xff\xfe", {}, "text_input is not valid UTF-8: invalid start byte at byte 0"),
        (b"word " * 100, {}, "tokens; this model accepts at most 40"),
        (b"Hi", {"temperature": -1.0}, "temperature is -1.0; allowed: from 0"),
        (b"Hi", {"max_tokens": 0}, "max_tokens is 0; allowed: at least 1"),
        (b"Hi", {"seed": -3}, "seed is -3; allowed: at least 0"),
        (b"Hi", {"stop_words": [b"\xff"]}, "stop_words is not valid UTF-8"),
    ],
)
def test_bad_request_gets_its_own_error_and_the_others_their_answers(
    text: bytes, inputs: dict[str, Any], message: str, served: Any
) -> None:
    alone = served.execute([request([b"good"])])[0]

    bad, good = served.execute([request([text], **inputs), request([b"good"])])

    assert bad.error.code == TritonError.INVALID_ARG
    assert message in bad.error.text
    assert good.column("text_output") == alone.column("text_output")


def test_stop_words_end_the_answer_before_themselves(served: Any) -> None:
    free = served.execute([request([b"text"], max_tokens=30)])[0].column("text_output")[0]
    stop = free[4:7]

    response = served.execute(
        [request([b"text"], max_tokens=30, stop_words=[b"", b"never there", stop.encode()])]
    )[0]

    assert response.column("text_output") == [free[: free.index(stop)]]
    assert response.column("finish_reason") == ["stop"]
    assert response.column("num_output_tokens")[0] < 30


def test_earliest_of_several_stop_words_cuts(backend: ModuleType, served: Any) -> None:
    stops = backend.StopStrings(served._text, ["def", "c", "absent"])
    assert stops.cut("abcdef") == "ab"
    assert stops.cut("nothing to find") == "nothing to find"


def test_engine_that_produces_nan_fails_its_requests_and_keeps_none_of_them(
    backend: ModuleType, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")

    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][0] = float("nan")

    edit_tensors(checkpoint, spoil)
    broken = serve(backend, checkpoint, tmp_path)

    failed, refused = broken.execute([request([b"text"]), request([b""])])

    assert (failed.error.code, refused.error.code) == (TritonError.INTERNAL, TritonError.INVALID_ARG)
    assert "the engine produced nan after" in failed.error.text
    assert "text_input is empty" in refused.error.text
    assert broken._runtime.free_slots == SERVING["max_batch_size"]
