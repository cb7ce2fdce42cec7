"""The production image as far as it can be judged without building it: lint, pins, user, health check, and ``make image``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from enginesmith.platforms import TOOLCHAINS
from enginesmith.targets import TensorRtLlmTarget

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile.triton"
TEXT = DOCKERFILE.read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, continued lines joined, comments left out."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def arguments_of(keyword: str) -> list[str]:
    return [arguments for name, arguments in instructions() if name == keyword]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--no-color", "--failure-threshold", "style", "--format", "json", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


def test_hadolint_would_have_something_to_say(tmp_path: Path) -> None:
    worse = tmp_path / "Dockerfile"
    worse.write_text(TEXT.replace("--no-cache-dir ", "").replace("USER 1000:1000", "USER root"))
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", worse], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert {"DL3042", "DL3002"} <= set(re.findall(r"DL\d{4}", done.stdout))


def test_no_rule_is_ignored() -> None:
    assert "hadolint ignore" not in TEXT
    assert not list(ROOT.glob(".hadolint.y*ml"))


def test_base_is_the_toolchain_that_targets_default_to() -> None:
    tag = TensorRtLlmTarget(runtime="tensorrt_llm").toolchain
    assert f"BASE_TAG={tag}" in arguments_of("ARG")
    (image,) = [text for text in arguments_of("ARG") if text.startswith("BASE_IMAGE=")]
    assert image.removeprefix("BASE_IMAGE=").replace("${BASE_TAG}", tag) == TOOLCHAINS[tag].image
    assert arguments_of("FROM") == ["${BASE_IMAGE}"]
    assert f"TOOLCHAIN ?= {tag}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_server_runs_without_root_and_says_when_it_is_ready() -> None:
    assert arguments_of("USER") == ["1000:1000"]
    names = [name for name, _ in instructions()]
    assert "RUN" not in names[names.index("USER") :], "nothing is installed as the user that serves"
    (check,) = arguments_of("HEALTHCHECK")
    assert "http://127.0.0.1:8000/v2/health/ready" in check
    (command,) = arguments_of("CMD")
    served = json.loads(command)
    assert served[0] == "tritonserver"
    for option in ("http", "grpc", "metrics"):
        assert f"--{option}-address=127.0.0.1" in served


def test_nothing_is_fetched_by_a_pipe_into_a_shell_and_nothing_secret_is_there() -> None:
    assert not re.search(r"\b(curl|wget)\b|\|\s*(ba)?sh\b", TEXT)
    assert not re.search(
        r"(?i)token|password|secret|api_?key|--extra-index-url", TEXT.replace("tokenizers", "")
    )
    assert not arguments_of("ADD")


def test_python_packages_are_pinned_by_the_projects_own_constraints() -> None:
    installs = [text for text in arguments_of("RUN") if "pip install" in text]
    assert len(installs) == 1
    assert "--constraint /tmp/constraints.txt" in installs[0]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("grpcio", "numpy", "protobuf", "tritonclient", "ml_dtypes", "urllib3", "python-rapidjson"):
        assert re.search(rf"(?mi)^{re.sub('[-_]', '[-_]', name)}==", constraints), name


def test_what_is_copied_exists_and_is_all_that_is_sent() -> None:
    sources = [text.split()[0] for text in arguments_of("COPY")]
    assert all((ROOT / source).exists() for source in sources)
    ignore = (ROOT / "Dockerfile.triton.dockerignore").read_text(encoding="utf-8").split()
    assert ignore[0] == "*"
    assert sorted(line[1:] for line in ignore if line.startswith("!")) == sorted(sources)


def test_labels_are_those_of_the_oci_specification() -> None:
    (labels,) = arguments_of("LABEL")
    names = re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", labels)
    assert set(names) >= {"title", "description", "version", "revision", "licenses", "base.name"}
    assert len(re.findall(r"(?:^|\s)([a-z.]+)=", labels)) == len(names)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory for a container tool of the test's making."""
    directory = tmp_path / "bin"
    directory.mkdir()
    return directory


def make_image(tools: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), "image", *arguments],
        env={"PATH": f"{tools}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("daemon", [None, "exit 1"])
def test_without_a_container_tool_make_image_is_one_clear_error(daemon: str | None, tools: Path) -> None:
    if daemon is not None:
        script(tools / "nothere", daemon)
    done = make_image(tools, "CONTAINER=nothere")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    assert len(errors) == 1
    assert errors[0].startswith("error: make image needs a container tool, and 'nothere version' fails")
    assert "CONTAINER=podman" in errors[0]


def test_make_image_builds_the_toolchain_that_is_asked_for(tools: Path) -> None:
    script(tools / "docker", f'echo "$@" >> {tools}/calls')
    assert make_image(tools, "TOOLCHAIN=26.04").returncode == 0
    calls = (tools / "calls").read_text().splitlines()
    assert calls == [
        "version",
        "build --file Dockerfile.triton --build-arg BASE_TAG=26.04 --tag enginesmith-triton:26.04 .",
    ]
