"""One spec for three runtimes, by the command line: rehearsed without a GPU, compiled by a stand-in, published."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import tiny_checkpoint
from tiny_project import Project

sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))

from trtllm_build_standin import install

pytestmark = [pytest.mark.server, pytest.mark.model]

TARGETS: list[dict[str, Any]] = [
    {"runtime": "tensorrt_llm", "name": "tp2", "parallelism": {"tensor": 2}, "max_num_tokens": 256},
    {"runtime": "tensorrt_llm_llmapi", "model_prefix": "llmapi-"},
]
PARTS = ("ensemble", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project for both TensorRT-LLM runtimes with one variant, rehearsed."""
    project = Project.create(tmp_path_factory.mktemp("trtllm") / "project")
    tiny_checkpoint(project.directory / "checkpoint", shards=2)
    changes = {"targets": TARGETS, "variants": {"awq": {"scheme": "int4_awq", "group_size": 32}}}
    project = project.edited(changes, name="deploy.yaml")
    project.run("rehearse", project.spec).assert_ok()
    return project


def compiler(directory: Path) -> dict[str, str]:
    """An environment with a ``trtllm-build`` and a GPU, both played."""
    directory.mkdir()
    install(directory)
    return {"PATH": f"{directory}:/usr/bin:/bin"}


def test_rehearsal_reports_what_was_asked_and_who_played_the_engine(deployed: Project) -> None:
    again = deployed.run("rehearse", deployed.spec, "--json").assert_ok()
    assert again.built == set()
    rehearsals = {one["place"]: one for one in json.loads(again.out)}
    assert set(rehearsals) == {"awq@tp2", "awq@llmapi"}
    for one in rehearsals.values():
        assert "twin" in one["played_by"]
        assert one["checks"]
        assert all(check["passed"] for check in one["checks"])


def test_build_without_a_compiler_stops_before_any_step_and_says_what_can_be_done(deployed: Project) -> None:
    deployed.run("build", deployed.spec, PATH="/usr/bin:/bin").assert_one_error(
        1, "TensorRT-LLM 1.2.1", "trtllm-build is not on PATH", "26.07", "enginesmith rehearse"
    )


def test_engines_are_compiled_packaged_and_published_as_rehearsed(deployed: Project, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    build = deployed.run(
        "build", deployed.spec, "--publish", repository, **compiler(tmp_path / "bin")
    ).assert_ok()
    assert build.built == {("compile", "awq@tp2"), ("package_trtllm", "awq@tp2")}
    names = {path.name for path in repository.iterdir() if path.is_dir()}
    assert names == {*PARTS, "llmapi-tensorrt_llm"}
    version = repository / "tensorrt_llm" / "1"
    assert {"rank0.engine", "rank1.engine", "config.json", "release.json"} <= {
        p.name for p in version.iterdir()
    }
    assert not [path for path in repository.rglob("config.pbtxt") if "${" in path.read_text()]
    again = deployed.run("build", deployed.spec, "--publish", repository, **compiler(tmp_path / "bin2"))
    assert again.assert_ok().built == set()
    assert "already published" in again.err
    deployed.run("serve", repository, "--print").assert_one_error(
        2, "llmapi-tensorrt_llm", "cannot be served by one tritonserver", "repositories of their own"
    )


def test_a_published_repository_says_how_it_is_started(deployed: Project, tmp_path: Path) -> None:
    """Without the spec: what was published is enough."""
    engines, llmapi = tmp_path / "engines", tmp_path / "llmapi"
    environment = compiler(tmp_path / "bin")
    for repository, target in ((engines, "tp2"), (llmapi, "llmapi")):
        choice = ("--target", target, "--publish", repository)
        deployed.run("build", deployed.spec, *choice, **environment).assert_ok()
    leader = deployed.run("serve", engines, "--print", "--json").assert_ok()
    (command,) = json.loads(leader.out)["commands"]
    assert command["argv"][:4] == ["mpirun", "--allow-run-as-root", "-n", "1"]
    assert command["argv"].count("-n") == 2
    assert command["argv"].count("--load-model=tensorrt_llm") == 1
    plain = deployed.run("serve", llmapi, "--print").assert_ok()
    assert "mpirun" not in plain.out
    assert f"--model-repository={llmapi}" in plain.out


def test_engines_from_the_printed_script_are_adopted(deployed: Project, tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    script = deployed.run(
        "trtllm-command", deployed.spec, "--target", "tp2", "--engine-dir", engines
    ).assert_ok()
    assert "tritonserver:26.07-trtllm-python-py3" in script.out
    asked = deployed.run(
        "trtllm-command", deployed.spec, "--target", "tp2", "--engine-dir", engines, "--json"
    ).assert_ok()
    arguments = json.loads(asked.out)["command"][1:]
    assert shlex.join(arguments) in script.out

    standin = compiler(tmp_path / "bin")["PATH"].split(":")[0]
    subprocess.run([f"{standin}/trtllm-build", *arguments], check=True, capture_output=True, cwd=tmp_path)
    project = deployed.copied(tmp_path / "project")
    for key in {step["key"] for step in project.plan() if step["kind"] in ("compile", "package_trtllm")}:
        if key in project.artifacts():
            project.forget(key)
    choice = ("--target", "tp2", "--engine-dir", engines)
    built = project.run("build", project.spec, *choice, PATH="/usr/bin:/bin").assert_ok()
    assert ("compile", "awq@tp2") in built.built
    assert project.run("build", project.spec, *choice).assert_ok().built == set()

    (engines / "rank1.engine").unlink()  # Other engines are other engines, whatever the store has.
    project.run("build", project.spec, *choice).assert_one_error(1, "rank1.engine")
    (engines / "config.json").unlink()
    refused = project.run("build", project.spec, *choice)
    refused.assert_one_error(1, "holds no engines")
    assert refused.steps == {}


def test_two_deployments_of_one_name_are_refused(deployed: Project, tmp_path: Path) -> None:
    twice = {**deployed_variants(), "other": {"scheme": "int4_awq", "group_size": 32, "alpha_step": 0.5}}
    project = deployed.edited({"variants": twice}, name="twice.yaml")
    project.run("build", project.spec, "--publish", tmp_path / "models").assert_one_error(
        2, "would both be published as the Triton model tensorrt_llm", "model_prefix"
    )


def deployed_variants() -> dict[str, Any]:
    return {"awq": {"scheme": "int4_awq", "group_size": 32}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": [{**TARGETS[0], "parallelism": {"tensor": 3}}]}, ("3", "heads")),
        ({"targets": [{**TARGETS[0], "toolchain": "26.7"}]}, ("26.7", "26.07")),
        ({"targets": [{**TARGETS[0], "parallelism": {"pipeline": 4}}]}, ("pipeline", "2")),
        (
            {"targets": [{**TARGETS[1], "gpu": "a100"}], "variants": {"fp8": {"scheme": "fp8"}}},
            ("fp8", "a100"),
        ),
        ({"targets": [TARGETS[1]], "variants": {"sq": {"scheme": "int8_sq"}}}, ("int8_sq", "LLM API")),
        ({"targets": TARGETS, "verify.twin": False}, ("int4_awq", "Without a twin only scheme: none")),
    ],
)
def test_illegal_combination_fails_in_plan(
    deployed: Project, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    project = deployed.edited(changes, name="illegal.yaml")
    project.run("plan", project.spec).assert_one_error(2, *words)
