"""The LLM API package in a real tritonserver: what a rehearsal passes, and each thing that it must find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_factory import tiny_checkpoint

from enginesmith.engines.onnxruntime.lower import run as lower
from enginesmith.errors import GateError, ServerError
from enginesmith.publish.local import publish
from enginesmith.spec import Serving
from enginesmith.targets import LlmApiTarget
from enginesmith.triton.llmapi import scenarios
from enginesmith.triton.llmapi.package import run as package
from enginesmith.triton.llmapi.rehearse import run as rehearse

pytestmark = pytest.mark.server

TARGETS: dict[str, dict[str, Any]] = {
    "streaming": {"cancellation_check_period_ms": 20},
    "one answer per request": {"streaming": False, "cancellation_check_period_ms": 20},
    "two instances": {"devices": [[0], [1]], "model_prefix": "tiny-"},
}


class Context:
    """A step's context without a build."""

    def __init__(self, root: Path, params: dict[str, Any], inputs: dict[str, Path]) -> None:
        self.params, self.inputs = params, inputs
        self.out, self.scratch = root / "out", root / "scratch"
        self.out.mkdir(parents=True)
        self.scratch.mkdir()

    def progress(self, fraction: float | None, note: str = "") -> None:
        """Nobody looks."""


def params(**target: Any) -> dict[str, Any]:
    serving = {
        "max_batch_size": 4,
        "max_sequence_length": 96,
        "max_prompt_length": 64,
        "default_max_tokens": 8,
    }
    made = LlmApiTarget.model_validate({"runtime": "tensorrt_llm_llmapi", **target})
    return {
        "target": made.model_dump(mode="json", exclude={"variants", "nccl"}),
        "serving": Serving.model_validate(serving).model_dump(mode="json"),
        "model_name": "tiny-bf16-llmapi",
        "variant": "bf16",
        "scheme": "none",
        "server": "auto",
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, its ONNX Runtime engine, and its streaming package."""
    root = tmp_path_factory.mktemp("llmapi")
    checkpoint = tiny_checkpoint(root / "checkpoint")
    engine = Context(root / "engine", {"mode": "exact"}, {"checkpoint": checkpoint})
    lower(engine)
    packaged = Context(root / "package", params(**TARGETS["streaming"]), {"checkpoint": checkpoint})
    package(packaged)
    return {"checkpoint": checkpoint, "engine": engine.out, "package": packaged.out}


@pytest.mark.parametrize("name", TARGETS)
def test_a_package_passes_and_the_report_names_its_bytes(
    name: str, made: dict[str, Path], tmp_path: Path
) -> None:
    step = params(**TARGETS[name])
    packaged = Context(tmp_path / "package", step, {"checkpoint": made["checkpoint"]})
    package(packaged)
    rehearsal = Context(tmp_path / "rehearsal", step, {**made, "package": packaged.out})
    facts = rehearse(rehearsal)
    assert facts["played_by"] == "onnxruntime twin"
    report = json.loads((rehearsal.out / "rehearsal.json").read_text())
    asked = {check["name"] for check in report["checks"]}
    assert {"plain 0", "at once", "stop string", "cancelled", "prompt too long"} <= asked
    assert ("streaming" in asked) == (name != "one answer per request")
    assert ("stopped by its id" in asked) == (name != "two instances")
    published = publish(packaged.out, tmp_path / "repository", evidence={"rehearsal": report})
    assert published.version == 1


def test_an_architecture_without_a_twin_is_echoed_and_the_report_says_so(
    made: dict[str, Path], tmp_path: Path
) -> None:
    inputs = {"package": made["package"], "checkpoint": made["checkpoint"]}
    rehearsal = Context(tmp_path / "rehearsal", params(**TARGETS["streaming"]), inputs)
    assert rehearse(rehearsal)["played_by"] == "echo"
    assert json.loads((rehearsal.out / "rehearsal.json").read_text())["played_by"] == "echo"


def test_settings_elsewhere_are_served(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.yaml"
    document = yaml.safe_load((made["package"] / "tensorrt_llm/1/model.yaml").read_text())
    other.write_text(yaml.safe_dump({**document, "cuda_graphs": {}}))
    monkeypatch.setenv("LLM_CONFIG_PATH", str(other))
    with pytest.raises(ServerError, match="LLM got invalid argument: cuda_graphs"):
        rehearse(Context(tmp_path / "rehearsal", params(**TARGETS["streaming"]), made))


def edited(file: str, old: str, new: str) -> Callable[[Path], None]:
    """A fault: ``old`` in ``file`` of the model becomes ``new``."""

    def plant(model: Path) -> None:
        text = (model / file).read_text()
        assert old in text
        (model / file).unlink()
        (model / file).write_text(text.replace(old, new))

    return plant


def without_tokenizer(model: Path) -> None:
    """A fault: the checkpoint has no tokenizer."""
    (model / "1/checkpoint/tokenizer.json").unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "an unknown argument": (
        edited("1/model.yaml", "max_seq_len:", "max_sequence_length:"),
        ServerError,
        "got invalid argument: max_sequence_length",
    ),
    "an unknown argument of the KV cache": (
        edited("1/model.yaml", "enable_block_reuse:", "enable_reuse:"),
        ServerError,
        "KvCacheConfig: .*enable_reuse",
    ),
    "other GPUs than the target's": (
        edited("1/model.yaml", "tensor_parallel_size: 1", "tensor_parallel_size: 4"),
        GateError,
        r"options of the LLM: .*\n.*tensor_parallel_size: 1.*\n.*tensor_parallel_size: 4",
    ),
    "no tokenizer": (without_tokenizer, ServerError, r"tokenizer\.json is missing"),
    "the policy in model.yaml only": (
        edited("config.pbtxt", "decoupled: true", "decoupled: false"),
        GateError,
        "this model does not stream",
    ),
    "a wrong type": (
        edited("config.pbtxt", 'name: "sampling_param_top_p"\n  data_type: TYPE_FP32', 'name: "sampling_param_top_p"\n  data_type: TYPE_INT32'),
        GateError,
        "sampling, twice with one seed: asked",
    ),
    "a stop string that leaks": (
        edited("1/llm_stream.py", "return size\n", "return 0\n"),
        GateError,
        "stop string, streaming: asked",
    ),
    "requests that nobody watches": (
        edited("1/model.py", "running.sender.is_cancelled()", "False"),
        GateError,
        "cancelled: asked .*(?s:.)*seen .*it did not end",
    ),
    "a limit that is not kept": (
        edited("1/model.yaml", "max_prompt_length: 64", "max_prompt_length: 4096"),
        GateError,
        "prompt too long: asked",
    ),
    "a seed that is dropped": (
        edited("1/llm_requests.py", '"seed": self.seed', '"seed": None'),
        GateError,
        "sampling, twice with one seed: asked",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(
    name: str, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenarios, "_PATIENCE_S", 3.0)
    plant, error, message = FAULTS[name]
    shutil.copytree(made["package"], tmp_path / "package")
    plant(tmp_path / "package" / "tensorrt_llm")
    inputs = {**made, "package": tmp_path / "package"}
    rehearsal = Context(tmp_path / "rehearsal", params(**TARGETS["streaming"]), inputs)
    with pytest.raises(error, match=message):
        rehearse(rehearsal)
    assert not any(rehearsal.out.iterdir())
