"""A tiny encoder, a classifier, a module and an ONNX file: from the spec to what a client gets, as users run it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_project import Project

from enginesmith_client import Client, InvalidInput

sys.path.insert(0, str(Path(__file__).parents[1] / "graphs"))

from encoder_factory import LABELS, tiny_encoder

pytestmark = [pytest.mark.model, pytest.mark.server]

TEXTS = ("a bridge carries its load", "stars", "the names of the values in this list are not ordered")
ENCODER: Mapping[str, Any] = {
    "name": "tiny",
    "task": "embedding",
    "source": {"path": "checkpoint"},
    "calibration": {"samples": 8, "length": 24},
    "variants": {
        "fp32": {"scheme": "none"},
        "fp16": {"scheme": "fp16"},
        "int8": {"scheme": "int8"},
        "fp8": {"scheme": "fp8"},
    },
    "serving": {"max_batch_size": 8, "max_sequence_length": 48},
    "verify": {"samples": {"samples": 12, "length": 24, "seed": 1}, "quality": {"min_mean_cosine": 0.9}},
}
NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, image):
        return self.head(torch.relu(self.mix(image)).mean((2, 3)))

def make():
    torch.manual_seed(0)
    return Net().eval()
"""
MODULE: Mapping[str, Any] = {
    "name": "net",
    "task": "tensors",
    "source": {"module": "net.py:make"},
    "inputs": [{"name": "image", "shape": ["batch", 3, "height", 8], "low": -1}],
    "outputs": ["scores"],
    "axes": {"height": {"min": 4, "max": 16}},
    "calibration": {"samples": 16},
    "variants": {"fp32": {"scheme": "none"}, "int8": {"scheme": "int8"}},
    "serving": {"max_batch_size": 4},
    "verify": {"samples": {"samples": 16, "seed": 1}, "quality": {"min_mean_cosine": 0.9}},
}


def create(directory: Path, document: Mapping[str, Any]) -> Project:
    project = Project.create(directory)
    project.spec.write_text(yaml.safe_dump(dict(document), sort_keys=False))
    return project


@contextmanager
def served(project: Project) -> Iterator[Client]:
    ports = ("--http-port", 0, "--grpc-port", 0, "--metrics-port", 0)
    with project.running("serve", project.repository, *ports) as command:
        said = command.read_until("metrics")
        (url,) = [line.split()[-1] for line in said.splitlines() if line.startswith("  gRPC")]
        command.family()
        with Client(f"grpc://{url}") as client:
            yield client
        command.process.terminate()
        command.finish()
        command.assert_alone()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, Any]]:
    """A built and published encoder, and its report."""
    project = create(tmp_path_factory.mktemp("encoder") / "project", ENCODER)
    tiny_encoder(project.directory / "checkpoint", pooling="mean_tokens", normalize=True)
    done = project.build("--json", "--publish", project.repository).assert_ok()
    (report,) = json.loads(done.out)["reports"]
    return project, {entry["variant"]: entry for entry in report["variants"]}


def test_every_variant_gives_the_embeddings_of_sentence_transformers_as_far_as_its_precision_goes(
    encoder: tuple[Project, dict[str, Any]],
) -> None:
    from sentence_transformers import SentenceTransformer

    project, report = encoder
    wanted = SentenceTransformer(str(project.directory / "checkpoint"), device="cpu").encode(list(TEXTS))
    with served(project) as client:
        for variant, entry in report.items():
            seen = client.embed(f"tiny-{variant}", TEXTS)
            assert seen.shape == wanted.shape
            assert seen.dtype == np.float32
            np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 1, atol=5e-3)
            cosines = (seen * wanted).sum(axis=1)
            assert cosines.min() >= (0.99999 if variant == "fp32" else 0.9), entry
            if variant == "fp32":
                np.testing.assert_allclose(seen, wanted, atol=1e-5)
        ids = np.array([[2, 30, 31, 3]], np.int64)
        row = client.infer("tiny-fp32", {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        assert row.outputs["embedding"].shape == (1, 32)


def test_the_report_says_what_each_variant_gained_and_lost(
    encoder: tuple[Project, dict[str, Any]],
) -> None:
    _, report = encoder
    assert list(report) == ["fp32", "fp16", "int8", "fp8"]
    assert report["fp32"]["mean_cosine"] == pytest.approx(1, abs=1e-5)
    assert report["int8"]["mean_cosine"] < report["fp16"]["mean_cosine"]
    assert all(entry["passed"] and entry["rehearsed"] for entry in report.values())


def test_a_second_build_does_nothing(encoder: tuple[Project, dict[str, Any]]) -> None:
    project, _ = encoder
    assert not project.build("--publish", project.repository).assert_ok().built


def test_a_variant_that_loses_too_much_is_stopped_and_told_what_to_do(
    encoder: tuple[Project, dict[str, Any]], tmp_path: Path
) -> None:
    project = encoder[0].copied(tmp_path / "project")
    strict = project.edited({"variants": {"int8": {"scheme": "int8", "quality": {"min_mean_cosine": 1.0}}}})
    strict.build().assert_one_error(1, "mean_cosine", "exclude: auto", "sensitivity")


def test_engines_of_tensorrt_for_rtx_are_built_rehearsed_and_published_without_a_gpu(
    encoder: tuple[Project, dict[str, Any]], tmp_path: Path
) -> None:
    project = encoder[0].copied(tmp_path / "project")
    target = {"runtime": "tensorrt_rtx", "compute_capabilities": ["8.6"], "variants": ["fp16", "int8"]}
    rtx = project.edited({"targets": [target], "variants.fp32": None, "variants.fp8": None})
    rtx = replace(rtx, repository=tmp_path / "repository")
    rtx.build("--publish", rtx.repository).assert_ok()
    for variant in ("fp16", "int8"):
        assert (rtx.repository / f"tiny-{variant}" / "1" / "model.plan").stat().st_size
        assert (rtx.repository / f"tiny-{variant}-text" / "config.pbtxt").is_file()
    assert not rtx.build().assert_ok().built


def test_a_classifier_answers_with_its_labels(tmp_path: Path) -> None:
    document = {**ENCODER, "task": "classification", "variants": {"fp32": {"scheme": "none"}}}
    project = create(tmp_path / "project", document)
    tiny_encoder(project.directory / "checkpoint", "classifier")
    project.build("--publish", project.repository).assert_ok()
    with served(project) as client:
        answers = client.classify("tiny-fp32", TEXTS)
    assert len(answers) == len(TEXTS)
    assert {answer.label for answer in answers} <= set(LABELS)


def test_a_module_of_ones_own_is_served_with_its_named_tensors(tmp_path: Path) -> None:
    import torch

    project = create(tmp_path / "project", MODULE)
    (project.directory / "net.py").write_text(NET)
    project.build("--publish", project.repository).assert_ok()
    names: dict[str, Any] = {}
    exec(NET, names)  # The module as its author wrote it.
    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, 11, 8)).astype(np.float32)
    with torch.no_grad():
        wanted = names["make"]()(torch.from_numpy(image)).numpy()
    with served(project) as client:
        exact, rounded = (
            client.infer(f"net-{variant}", {"image": image}).outputs["scores"] for variant in ("fp32", "int8")
        )
        with pytest.raises(InvalidInput, match="takes no text: it takes image"):
            client.embed("net-fp32", TEXTS)
    np.testing.assert_allclose(exact, wanted, atol=1e-5)
    assert not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, wanted, atol=0.1)


def test_a_ready_onnx_file_is_served_as_it_describes_itself(
    encoder: tuple[Project, dict[str, Any]], tmp_path: Path
) -> None:
    built, _ = encoder
    plan = built.run("plan", built.spec, "--json").assert_ok()
    (export,) = [step["key"] for step in json.loads(plan.out)["steps"] if step["kind"] == "export"]
    graph = next(built.entry(export).rglob("model.onnx"))
    document = {
        "name": "ready",
        "task": "tensors",
        "source": {"onnx": "graph.onnx"},
        "inputs": [
            {"name": name, "dtype": "int64", "shape": ["batch", "sequence"], "low": 1, "high": high}
            for name, high in (("input_ids", 399), ("attention_mask", 1))
        ],
        "axes": {"sequence": {"min": 4, "max": 32}},
        "variants": {"fp32": {"scheme": "none"}},
    }
    project = create(tmp_path / "project", document)
    (project.directory / "graph.onnx").write_bytes(graph.read_bytes())
    project.build("--publish", project.repository).assert_ok()
    ids = np.arange(6, dtype=np.int64).reshape(1, 6) + 10
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with served(project) as client:
        ready = client.infer("ready-fp32", inputs).outputs["embedding"]
    with served(built) as client:
        np.testing.assert_allclose(ready, client.infer("tiny-fp32", inputs).outputs["embedding"], atol=1e-6)


BAD_MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "a factory that raises": (
        "def make():\n    raise RuntimeError('no weights here')\n",
        ("net.py", "no weights here"),
    ),
    "a factory that returns something else": (
        "def make():\n    return 7\n",
        ("make", "int", "torch.nn.Module"),
    ),
    "no such factory": ("def other():\n    return 7\n", ("net.py", "make")),
    "a file that is not Python": ("def make(:\n", ("net.py", "invalid syntax")),
    "an axis that the graph fixes": (
        NET.replace(
            "def forward(self, image):",
            "def forward(self, image):\n        image = image.reshape(image.shape[0], 3, 16, 8)",
        ),
        ("height",),
    ),
}


@pytest.mark.parametrize("bad", BAD_MODULES)
def test_a_module_that_cannot_be_exported_is_one_clear_error(tmp_path: Path, bad: str) -> None:
    source, words = BAD_MODULES[bad]
    project = create(tmp_path / "project", MODULE)
    (project.directory / "net.py").write_text(source)
    project.build().assert_one_error(1, *words)
