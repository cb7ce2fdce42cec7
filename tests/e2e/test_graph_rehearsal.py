"""Graph deployments in a real tritonserver: what a rehearsal passes, each thing that it must find, and what is published."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from graph_deployment import Context, params, write_inputs

from enginesmith.errors import EnginesmithError, GateError, ServerError
from enginesmith.publish.local import publish
from enginesmith.triton.config import parse_config
from enginesmith.triton.graph.asking import Asking, text_rows
from enginesmith.triton.graph.assemble import run as assemble
from enginesmith.triton.graph.package import run as package
from enginesmith.triton.graph.package_tensorrt import package_digest
from enginesmith.triton.graph.package_tensorrt import run as package_tensorrt
from enginesmith.triton.graph.rehearse import run as rehearse
from enginesmith.triton.server import TritonServer

pytestmark = pytest.mark.server

NATIVE = {"runtime": "onnxruntime", "backend": "onnxruntime", "provider": "tensorrt"}
CASES: dict[str, dict[str, Any]] = {
    "embedding": {},
    "classification": {"truncate": False, "response_cache": True},
    "reranking": {"target": NATIVE, "pad_to": (8, 24)},
    "tensors": {},
}


def packaged(root: Path, inputs: Mapping[str, Path], step: Mapping[str, Any]) -> Path:
    context = Context(root / "package", step, inputs)
    package(context)
    return context.out


def rehearsed(root: Path, inputs: Mapping[str, Path], step: Mapping[str, Any]) -> dict[str, Any]:
    """``rehearsal.json`` of ``inputs["package"]``."""
    context = Context(root / "rehearsal", step, inputs)
    rehearse(context)
    report: dict[str, Any] = json.loads((context.out / "rehearsal.json").read_text())
    return report


@pytest.mark.parametrize("task", CASES)
def test_a_package_passes_and_is_published(task: str, tmp_path: Path) -> None:
    step, inputs = params(task, **CASES[task]), write_inputs(tmp_path, task)
    made = packaged(tmp_path, inputs, step)
    report = rehearsed(tmp_path, {**inputs, "package": made}, step)
    asked = {check["name"] for check in report["checks"]}
    assert {"warm-up", "metadata", "plain", "rows of one request", "at once", "too many rows"} <= asked
    assert ("texts at once" in asked) == (task != "tensors")
    assert ("label" in asked) == ("response cache" in asked) == (task == "classification")
    assert ("text that is too long" in asked) == (task == "classification")
    assert ("text that is cut" in asked) == (task in ("embedding", "reranking"))
    assert ("axis width is too long" in asked) == (task == "tensors")
    assert report["played_by"] == ("onnxruntime twin" if task == "reranking" else "itself")
    assert report["not_rehearsed"] == (["tiny-v/1/model.onnx"] if task == "reranking" else [])
    assert 1 < report["largest_batch"] <= 4
    published = publish(made, tmp_path / "repository", evidence={"rehearsal": report})
    assert [part.version for part in published.parts or (published,)] == [1] * len(report["models"])


def test_a_class_with_an_empty_name_passes(tmp_path: Path) -> None:
    step, inputs = params("classification"), write_inputs(tmp_path, "classification")
    for part in ("signature", "engine"):
        path = inputs[part] / "signature.json"
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | {"labels": ["", "", ""]}))
    made = packaged(tmp_path, inputs, step)
    report = rehearsed(tmp_path, {**inputs, "package": made}, step)
    assert "label" in {check["name"] for check in report["checks"]}


def edited(file: str, old: str, new: str) -> Callable[[Path], None]:
    """A fault: ``old`` in a file of the package becomes ``new``."""

    def plant(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).unlink()
        (root / file).write_text(text.replace(old, new))

    return plant


def without(pattern: str) -> Callable[[Path], None]:
    """A fault: the part of the engine's configuration that matches is not there."""

    def plant(root: Path) -> None:
        path = root / "tiny-v/config.pbtxt"
        text, times = re.subn(pattern, "", path.read_text(), flags=re.DOTALL)
        assert times
        path.write_text(text)

    return plant


def other_dims(root: Path) -> None:
    """A fault: clients are told that the output may have any length."""
    for model in ("tiny-v", "tiny-v-text"):
        edited(f"{model}/config.pbtxt", "dims: 6", "dims: -1")(root)


def other_weights(root: Path) -> None:
    """A fault: the engine is another one's."""
    other = write_inputs(root.parent / "other", seed=1)
    shutil.copy2(other["engine"] / "model.onnx", root / "tiny-v/1/model.tmp")
    (root / "tiny-v/1/model.tmp").replace(root / "tiny-v/1/model.onnx")


FAULTS: dict[str, tuple[Callable[[Path], None], type[EnginesmithError], str]] = {
    "other weights": (other_weights, GateError, r"plain: asked .* \(6 of 6 wrong\)'\n.*within 1.0e-04'\n.* at [0-9.e+-]+'"),
    "answers in another order": (
        edited("tiny-v/1/model.py", "return [_response(answer) for answer in", "return [_response(answer) for answer in self._answers(inputs)[::-1]]\n        return [_response(answer) for answer in"),
        GateError,
        "at once: asked",
    ),
    "a mask that keeps the padding": (
        edited("tiny-v/1/graph_runtime.py", 'if name == "input_ids" else 0', 'if name == "input_ids" else 1'),
        GateError,
        "at once: asked",
    ),
    "a tokenizer that cuts": (
        edited("tiny-v-tokenizer/1/graph_text.py", "enable_truncation(self._limit)", "enable_truncation(4)"),
        GateError,
        r"tokens: asked .* \(\d of 5 wrong\)",
    ),
    "other words": (
        edited("tiny-v-tokenizer/1/tokenizer.json", '"the": 4', '"the": 5'),
        GateError,
        "tokens: asked",
    ),
    "requests one by one": (without(r"dynamic_batching \{.*?\n\}"), GateError, "batches form: asked"),
    "other dims": (other_dims, GateError, "metadata: asked"),
    "a refusal that hurts its company": (
        edited("tiny-v/1/model.py", "if len(inputs) == 1:", "if True:"),
        GateError,
        "in the company of bad requests: asked",
    ),
    "a model is missing": (
        lambda root: shutil.rmtree(root / "tiny-v-text"),
        GateError,
        "expected: tiny-v, tiny-v-tokenizer, tiny-v-text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, tmp_path: Path) -> None:
    plant, kind, says = FAULTS[name]
    step, inputs = params(), write_inputs(tmp_path / "inputs")
    made = packaged(tmp_path, inputs, step)
    plant(made)
    with pytest.raises(kind, match=says):
        rehearsed(tmp_path, {**inputs, "package": made}, step)
    assert not any((tmp_path / "rehearsal/out").iterdir())


@pytest.mark.parametrize("places", [(0, 1), (0, 2), (1, 2)])
def test_names_of_classes_in_each_others_place_are_found(places: tuple[int, int], tmp_path: Path) -> None:
    step, inputs = params("classification"), write_inputs(tmp_path / "inputs", "classification")
    made = packaged(tmp_path, inputs, step)
    (path,) = (made / "tiny-v").glob("labels-*.txt")
    lines = path.read_text().splitlines()
    first, second = places
    lines[first], lines[second] = lines[second], lines[first]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(GateError, match="label: asked"):
        rehearsed(tmp_path, {**inputs, "package": made}, step)


def tensorrt_engine(directory: Path, step: Mapping[str, Any], **changes: Any) -> Path:
    """What the compile step leaves, as far as it can be without a GPU: ``model.plan`` is not read by anyone here."""
    longest, batch = step["serving"]["max_sequence_length"], step["serving"]["max_batch_size"]
    names = ("input_ids", "attention_mask")
    document = {
        "runtime": step["target"]["runtime"],
        "bindings": [
            *({"name": name, "mode": "input", "dtype": "int64", "shape": [-1, -1]} for name in names),
            {"name": "embedding", "mode": "output", "dtype": "float32", "shape": [-1, 6]},
        ],
        "profiles": [{name: {"min": [1, 1], "opt": [4, 8], "max": [batch, longest]} for name in names}],
    }
    directory.mkdir()
    (directory / "engine.json").write_text(json.dumps(document | changes))
    (directory / "model.plan").write_bytes(b"a plan")
    return directory


@pytest.mark.parametrize(
    "target",
    [{"runtime": "tensorrt"}, {"runtime": "tensorrt_rtx"}],
    ids=["backend tensorrt", "backend python"],
)
def test_a_tensorrt_repository_is_rehearsed_with_its_twin_and_then_gets_its_engine(
    target: dict[str, Any], tmp_path: Path
) -> None:
    step, inputs = params(target=target), write_inputs(tmp_path / "inputs")
    assembled = Context(tmp_path / "assemble", step, inputs)
    assemble(assembled)
    report = rehearsed(tmp_path, {**inputs, "package": assembled.out}, step)
    assert report["played_by"] == "onnxruntime twin"
    assert report["not_rehearsed"] == ["tiny-v/1/model.plan", "tiny-v/1/engine.json"]
    engine = tensorrt_engine(tmp_path / "engine", step)
    parts = {"repository": assembled.out, "engine": engine, "verdict": inputs["verdict"]}
    context = Context(tmp_path / "joined", step, {**parts, "rehearsal": tmp_path / "rehearsal/out"})
    package_tensorrt(context)
    published = publish(context.out, tmp_path / "repository", evidence={"rehearsal": report})
    release = json.loads((tmp_path / "repository/tiny-v/1/release.json").read_text())
    assert (published.version, release["not_rehearsed"]) == (1, ["engine.json", "model.plan"])
    assert (tmp_path / "repository/tiny-v/1/model.plan").samefile(engine / "model.plan")


def test_without_a_gpu_the_python_model_of_tensorrt_says_so(tmp_path: Path) -> None:
    step, inputs = params(target={"runtime": "tensorrt_rtx"}), write_inputs(tmp_path / "inputs")
    assembled = Context(tmp_path / "assemble", step, inputs)
    assemble(assembled)
    edited("tiny-v/config.pbtxt", "KIND_GPU", "KIND_CPU")(assembled.out)
    with (
        TritonServer(assembled.out) as server,
        pytest.raises(ServerError, match="this model needs a GPU; its instance is of kind CPU"),
    ):
        server.wait_ready()


def test_a_published_text_model_rolls_forward_and_back_with_its_warm_up_data(tmp_path: Path) -> None:
    repository, step = tmp_path / "repository", params("classification")
    packages = []
    for seed in (0, 1):
        inputs = write_inputs(tmp_path / str(seed), "classification", seed=seed)
        packages.append(packaged(tmp_path / str(seed), inputs, step))
        publish(packages[-1], repository, evidence=passed(packages[-1]))
    newest = _served(repository)
    back = publish(packages[0], repository, evidence=passed(packages[0]))
    oldest = _served(repository)
    assert {part.model: part.version for part in back.parts} == {
        "tiny-v": 1,
        "tiny-v-tokenizer": 1,
        "tiny-v-text": 1,
    }
    assert newest.keys() == oldest.keys() == {"engine", "text"}
    assert not np.allclose(newest["text"], oldest["text"])
    for answers in (newest, oldest):
        np.testing.assert_allclose(answers["text"], answers["engine"], atol=1e-6)


def test_a_text_that_the_tokenizer_fails_on_is_refused_alone(tmp_path: Path) -> None:
    step, inputs = params(), write_inputs(tmp_path / "inputs")
    tokenizer = inputs["checkpoint"] / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"unk_token": "[UNK]"', '"unk_token": "[NONE]"'))
    made = packaged(tmp_path, inputs, step)
    # Long enough for all requests to share a batch.
    edited("tiny-v-tokenizer/config.pbtxt", "dynamic_batching {", "dynamic_batching {\n  max_queue_delay_microseconds: 300000")(made)  # fmt: skip
    texts = [b"the river", b"an unheard-of word", b"a stone"]
    with TritonServer(made) as server:
        server.wait_ready()
        with grpc.InferenceServerClient(server.grpc_url) as client, ThreadPoolExecutor(len(texts)) as pool:
            ask = Asking(client)
            seen = list(pool.map(lambda text: ask("tiny-v-text", {"TEXT": text_rows(text)}), texts))
            assert ask.statistics("tiny-v-tokenizer").largest_batch > 1
    assert [answer.status for answer in seen] == [None, "StatusCode.INVALID_ARGUMENT", None]
    assert "cannot be tokenized" in str(seen[1].refusal)
    assert "Traceback" not in str(seen[1].refusal)
    assert "At:" not in str(seen[1].refusal)


def passed(package_dir: Path) -> dict[str, Any]:
    """Evidence as if the package had been rehearsed; that it can be is another test."""
    return {"rehearsal": {"passed": True, "package_digest": package_digest(package_dir)}}


def _served(repository: Path) -> dict[str, Any]:
    """The logits of "the river" as the published repository gives them, for text and for its tokens."""
    with TritonServer(repository) as server:
        server.wait_ready()
        with grpc.InferenceServerClient(server.grpc_url) as client:
            text = grpc.InferInput("TEXT", [1, 1], "BYTES").set_data_from_numpy(text_rows(b"the river"))
            config = parse_config((repository / "tiny-v/config.pbtxt").read_text())
            assert all(
                (repository / "tiny-v/warmup" / one.input_data_file).is_file()
                for sample in config.model_warmup
                for one in sample.inputs.values()
            )
            tokens = []
            for name, values in (("input_ids", [[2, 4, 11, 3]]), ("attention_mask", [[1, 1, 1, 1]])):
                array = np.array(values)
                tokens.append(grpc.InferInput(name, [1, 4], "INT64").set_data_from_numpy(array))
            return {
                "text": client.infer("tiny-v-text", [text]).as_numpy("logits"),
                "engine": client.infer("tiny-v", tokens).as_numpy("logits"),
            }
