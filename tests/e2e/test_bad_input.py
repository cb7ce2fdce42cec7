"""What users get wrong, through the command line: one clear error, the right status, and nothing lost."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import tiny_checkpoint
from tiny_project import Built, Project

from enginesmith.spec_part import DynamicBatching
from enginesmith.triton.config import LLM_INPUTS, Tensor, config_text, model_config

model = pytest.mark.model
server = pytest.mark.server

KILLS_ITS_SERVER = """
import os
import signal


class TritonPythonModel:
    def initialize(self, arguments):
        os.kill(os.getppid(), signal.SIGKILL)
"""
LAST_SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("original") / "checkpoint", shards=2)


@pytest.fixture
def fresh(original: Path, tmp_path: Path) -> Project:
    """A project with a checkpoint of its own and nothing built."""
    project = Project.create(tmp_path / "fresh")
    shutil.copytree(original, project.directory / "checkpoint")
    return project


def missing_shard(checkpoint: Path) -> None:
    (checkpoint / LAST_SHARD).unlink()


def truncated_shard(checkpoint: Path) -> None:
    shard = checkpoint / LAST_SHARD
    shard.write_bytes(shard.read_bytes()[:-100])


def wrong_dtype(checkpoint: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shard = checkpoint / LAST_SHARD
    tensors = load_file(shard)
    name = min(tensors)
    save_file({**tensors, name: tensors[name].to(torch.int64)}, shard)


def unsupported_architecture(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))


@pytest.mark.parametrize(
    ("spoil", "status", "words"),
    [
        (missing_shard, 1, (f"shard {LAST_SHARD} is missing", "fetch the missing file")),
        (truncated_shard, 1, (LAST_SHARD, "fetch this file again")),
        (wrong_dtype, 1, (LAST_SHARD, "has dtype I64; allowed: BF16, F16, F32")),
        (unsupported_architecture, 2, ("GPT2LMHeadModel is not supported", "LlamaForCausalLM")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_checkpoint_is_one_error_and_the_repaired_one_is_taken(
    fresh: Project, original: Path, spoil: Callable[[Path], None], status: int, words: tuple[str, ...]
) -> None:
    checkpoint = fresh.directory / "checkpoint"
    spoil(checkpoint)
    fresh.build("--publish", fresh.repository).assert_one_error(status, *words)
    assert not fresh.artifacts()
    assert not fresh.leftovers()
    assert not fresh.repository.exists()
    shutil.rmtree(checkpoint)
    shutil.copytree(original, checkpoint)
    assert all(not step["cached"] for step in fresh.plan())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"servng": {}}, ("servng: unknown key; did you mean 'serving'?",)),
        (
            {"variants.int4-awq.group_size": 128},
            (
                "group_size 128 does not divide the 64 inputs of model.layers.0",
                "group_size may be 32 or 64 here",
            ),
        ),
        ({"serving.max_sequence_length": 4096}, ("serving.max_sequence_length is 4096", "set serving.")),
        ({"source": {"path": "nowhere"}}, ("source.path", "does not exist")),
    ],
)
def test_spec_that_cannot_be_built_is_refused_before_anything_runs(
    fresh: Project, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    status = 1 if "source" in changes else 2
    fresh.edited(changes).build("--publish", fresh.repository).assert_one_error(status, *words)
    assert not fresh.artifacts()
    assert not fresh.repository.exists()


def test_unknown_variant_is_answered_with_those_there_are(fresh: Project) -> None:
    refused = fresh.build("--variant", "int4")
    refused.assert_one_error(2, "tiny has no variant int4; it has: bf16, int8-sq, int8-wo, int4-awq, fp8")


def test_wheel_with_another_sha256_is_refused(fresh: Project) -> None:
    index = fresh.directory / "index"
    index.mkdir()
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    edited = fresh.edited({"source": {"wheel": "tiny-model==1.0", "sha256": "0" * 64}})
    local_index = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    refused = edited.run("build", edited.spec, **local_index)
    refused.assert_one_error(1, "0" * 64, hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert not fresh.artifacts()


@model
@pytest.mark.parametrize(
    ("content", "words"),
    [(b"  \n\n", "holds no text"), (b"caf\xe9 au lait", "is not UTF-8: invalid continuation byte at byte 3")],
)
def test_calibration_text_that_cannot_be_used_is_named(project: Project, content: bytes, words: str) -> None:
    before = project.artifacts()
    (project.directory / "text.txt").write_bytes(content)
    edited = project.edited({"calibration.corpus": {"file": "text.txt"}})
    refused = edited.build("--variant", "int8-sq", "--publish", project.directory / "other")
    refused.assert_one_error(1, str(project.directory / "text.txt"), words)
    assert refused.steps["quantize", "int8-sq"] == "FAILED"
    assert project.artifacts() == before
    assert not project.leftovers()
    assert not (project.directory / "other").exists()


@model
def test_port_in_use_is_named_with_its_owner(built: Built) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = ("--http-port", 0, "--grpc-port", port, "--metrics-port", 0)
        refused = built.project.run("serve", built.project.repository, *ports)
    refused.assert_one_error(1, f"the gRPC port {port} on 127.0.0.1 is in use", "choose another gRPC port")


@server
def test_server_that_dies_while_loading_is_explained(fresh: Project) -> None:
    directory = fresh.repository / "fatal" / "1"
    directory.mkdir(parents=True)
    (directory / "model.py").write_text(KILLS_ITS_SERVER)
    config = model_config(
        "fatal",
        inputs=LLM_INPUTS[:1],
        outputs=[Tensor("text_output", "TYPE_STRING")],
        max_batch_size=1,
        dynamic_batching=DynamicBatching(),
        instances=1,
    )
    (fresh.repository / "fatal" / "config.pbtxt").write_text(config_text(config))
    ports = ("--http-port", 0, "--grpc-port", 0, "--metrics-port", 0)
    with fresh.running("serve", fresh.repository, *ports) as serve:
        finished = serve.finish()
        serve.assert_alone()
    finished.assert_one_error(
        1, "tritonserver was killed by SIGKILL while it was loading models", "the whole log: "
    )


def test_repository_without_a_model_says_how_to_fill_it(fresh: Project) -> None:
    fresh.repository.mkdir()
    fresh.run("serve", fresh.repository).assert_one_error(
        1, "there is no model in", "enginesmith build SPEC --publish"
    )


def test_server_that_is_not_there_is_named(fresh: Project) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"grpc://127.0.0.1:{nobody.getsockname()[1]}"
        fresh.run("ask", "tiny-bf16", "Hello", "--url", url).assert_one_error(1, url.removeprefix("grpc://"))


@pytest.mark.parametrize("prompt", [b"caf\xe9", b"\xff\xfe"])
def test_prompt_on_stdin_that_is_not_utf8_is_refused(fresh: Project, prompt: bytes) -> None:
    refused = fresh.run("ask", "tiny-bf16", "-", stdin=prompt)
    refused.assert_one_error(1, "the prompt on stdin is not UTF-8", "iconv")
