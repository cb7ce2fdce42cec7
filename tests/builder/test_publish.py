"""Publishing: complete before visible, immutable afterwards, safe to kill and to run twice."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton
from echo_models import ECHO, write_model

from enginesmith.errors import GateError, OperatorError
from enginesmith.publish.local import Publication, publish
from enginesmith.triton.config import parse_config
from enginesmith.triton.placement import contents_digest, tree_contents
from enginesmith.triton.server import TritonServer

MODEL = "echo"


def make_package(directory: Path, mark: str = "", *, weight_bytes: int = 10) -> Path:
    """A package whose model answers differently for every ``mark``."""
    version = write_model(directory, MODEL, ECHO.replace('"text": text', f'"text": text + "{mark}"')) / "1"
    (version / "weights.bin").write_bytes(os.urandom(weight_bytes))
    return directory


def evidence(package: Path) -> dict[str, Any]:
    digest = contents_digest(tree_contents(package / MODEL))
    return {"rehearsal": {"passed": True, "package_digest": digest}, "keys": {"package": "k"}}


def release(package: Path, repository: Path) -> Publication:
    return publish(package, repository, evidence=evidence(package))


def served_version(repository: Path) -> int:
    """The version that Triton would serve; asserts that everything visible is complete."""
    model = repository / MODEL
    config = parse_config((model / "config.pbtxt").read_text())
    (version,) = config.version_policy.specific.versions
    for directory in model.iterdir():
        if directory.name[:1].isdecimal():
            document = json.loads((directory / "release.json").read_text())
            contents = tree_contents(directory)
            del contents["release.json"]
            assert contents == document["files"]
    assert (model / str(version)).is_dir()
    assert {entry.name for entry in repository.iterdir()} <= {MODEL, ".publish.lock"}
    return version


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    if os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_the_first_publication_is_version_1_and_is_made_of_links(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    done = release(package, tmp_path / "repository")
    assert done == Publication(MODEL, 1, tmp_path / "repository" / MODEL / "1", changed=True)
    assert served_version(tmp_path / "repository") == 1
    assert (done.path / "weights.bin").samefile(package / MODEL / "1" / "weights.bin")
    document = json.loads((done.path / "release.json").read_text())
    assert document["evidence"] == evidence(package)
    assert document["config"] == (package / MODEL / "config.pbtxt").read_text()
    assert {entry.name for entry in tmp_path.iterdir()} == {"package", "repository"}


def test_publishing_the_same_bytes_again_changes_nothing(tmp_path: Path) -> None:
    package, repository = make_package(tmp_path / "package"), tmp_path / "repository"
    release(package, repository)
    before = {path: path.stat().st_mtime_ns for path in (repository / MODEL).rglob("*")}
    assert release(package, repository) == Publication(MODEL, 1, repository / MODEL / "1", changed=False)
    assert {path: path.stat().st_mtime_ns for path in (repository / MODEL).rglob("*")} == before


def test_other_bytes_become_the_next_version_and_the_old_one_stays(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    release(make_package(tmp_path / "a", "a"), repository)
    old = tree_contents(repository / MODEL / "1")
    assert release(make_package(tmp_path / "b", "b"), repository).version == 2
    assert served_version(repository) == 2
    assert tree_contents(repository / MODEL / "1") == old


def test_publishing_an_older_version_again_points_back_to_it(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    first = make_package(tmp_path / "a", "a")
    release(first, repository)
    release(make_package(tmp_path / "b", "b"), repository)
    assert release(first, repository) == Publication(MODEL, 1, repository / MODEL / "1", changed=True)
    assert served_version(repository) == 1


def test_another_configuration_alone_is_another_version(tmp_path: Path) -> None:
    package, repository = make_package(tmp_path / "package"), tmp_path / "repository"
    release(package, repository)
    config = package / MODEL / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batch_size: 4"))
    assert release(package, repository).version == 2
    assert parse_config((repository / MODEL / "config.pbtxt").read_text()).max_batch_size == 4


@pytest.mark.parametrize("rehearsal", [None, {}, {"passed": False}, {"passed": "true"}])
def test_a_package_without_a_passed_rehearsal_is_refused(tmp_path: Path, rehearsal: object) -> None:
    package = make_package(tmp_path / "package")
    with pytest.raises(GateError, match="no passed rehearsal"):
        publish(package, tmp_path / "repository", evidence={"rehearsal": rehearsal})
    assert not (tmp_path / "repository").exists()


def test_bytes_other_than_the_rehearsed_ones_are_refused(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    rehearsed = evidence(package)
    (package / MODEL / "1" / "weights.bin").write_bytes(b"other")
    with pytest.raises(GateError, match="not what was rehearsed"):
        publish(package, tmp_path / "repository", evidence=rehearsed)


def test_a_directory_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="is not a package"):
        publish(tmp_path, tmp_path / "repository", evidence={})


def test_a_model_that_somebody_else_put_there_is_left_alone(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write_model(repository, MODEL)
    before = tree_contents(repository / MODEL)
    with pytest.raises(OperatorError, match=r"version 1 of .* was not published by enginesmith"):
        release(make_package(tmp_path / "package"), repository)
    assert tree_contents(repository / MODEL) == before


def test_publishers_at_once_take_turns(tmp_path: Path) -> None:
    packages = [make_package(tmp_path / mark, mark) for mark in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda package: release(package, tmp_path / "repository"), packages))
    assert sorted(publication.version for publication in done) == [1, 2, 3, 4]
    assert served_version(tmp_path / "repository") == 4


def test_files_are_copied_where_links_cannot_reach(tmp_path: Path, other_file_system: Path) -> None:
    package = make_package(other_file_system / "package")
    done = release(package, tmp_path / "repository")
    assert served_version(tmp_path / "repository") == 1
    assert not (done.path / "weights.bin").samefile(package / MODEL / "1" / "weights.bin")
    assert (done.path / "weights.bin").stat().st_mode & 0o222 == 0


def test_a_disk_that_refuses_the_bytes_leaves_the_published_version(
    tmp_path: Path, other_file_system: Path
) -> None:
    repository = tmp_path / "repository"
    release(make_package(tmp_path / "package", "a"), repository)
    package = make_package(other_file_system / "package", "b", weight_bytes=1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OperatorError, match=r"cannot publish echo .*File too large"):
            release(package, repository)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert served_version(repository) == 1
    assert {entry.name for entry in tmp_path.iterdir()} == {"package", "repository"}


KILLED_PUBLISHERS = """
import json, os, shutil, sys
from pathlib import Path
from enginesmith.publish.local import publish

base, package, evidence = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
WRITES = {"os.mkdir", "os.link", "os.rename", "os.rmdir", "os.chmod", "shutil.rmtree"}


def die_at(count):
    def hook(event, arguments):
        nonlocal count
        if event in WRITES or event == "open" and arguments[1] and arguments[1][0] in "wx":
            count -= 1
            if count == 0:
                os.kill(os.getpid(), 9)
    sys.addaudithook(hook)


for point in range(1, 200):
    repository = base / str(point) / "repository"
    shutil.copytree(base / "template", repository)
    child = os.fork()
    if child == 0:
        die_at(point)
        publish(package, repository, evidence=evidence)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        print(point)
        break
"""


@pytest.mark.parametrize("published_before", [False, True])
def test_a_publisher_killed_at_any_point_leaves_whole_versions_and_is_completed_by_the_next(
    tmp_path: Path, published_before: bool
) -> None:
    template = tmp_path / "template"
    template.mkdir()
    if published_before:
        release(make_package(tmp_path / "a", "a"), template)
    package = make_package(tmp_path / "b", "b")
    program = [
        sys.executable,
        "-c",
        KILLED_PUBLISHERS,
        str(tmp_path),
        str(package),
        json.dumps(evidence(package)),
    ]
    points = int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    assert points > 8
    for point in range(1, points + 1):
        repository = tmp_path / str(point) / "repository"
        if (repository / MODEL).exists() or published_before:
            served_version(repository)
        assert release(package, repository).version == (2 if published_before else 1)
        assert served_version(repository) == (2 if published_before else 1)
        assert {entry.name for entry in repository.parent.iterdir()} == {"repository"}


@pytest.mark.server
def test_servers_that_start_or_load_during_publications_see_whole_versions(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    packages = [make_package(tmp_path / mark, mark) for mark in "abcdef"]
    release(packages[0], repository)
    stop = threading.Event()

    def publish_without_pause() -> int:
        count = 0
        while not stop.is_set():
            release(packages[count % len(packages)], repository)
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        publications = pool.submit(publish_without_pause)
        try:
            with TritonServer(repository, model_control="explicit", load_models=[MODEL]) as server:
                server.wait_ready()
                with triton.InferenceServerClient(server.grpc_url) as client:
                    for _ in range(5):
                        client.load_model(MODEL, client_timeout=60)
        finally:
            stop.set()
        assert publications.result() > 5


@pytest.mark.server
def test_a_load_serves_what_was_published_last(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    release(make_package(tmp_path / "a", "-first"), repository)
    with TritonServer(repository, model_control="explicit", load_models=[MODEL]) as server:
        server.wait_ready()
        with triton.InferenceServerClient(server.grpc_url) as client:
            assert ask(client) == "hi-first"
            release(make_package(tmp_path / "b", "-second"), repository)
            assert ask(client) == "hi-first"
            client.load_model(MODEL, client_timeout=60)
            assert ask(client) == "hi-second"
    # The server compiled model.py in there; that is not another release.
    assert not release(tmp_path / "b", repository).changed


def ask(client: triton.InferenceServerClient) -> str:
    import numpy as np

    tensor = triton.InferInput("text_input", [1, 1], "BYTES").set_data_from_numpy(
        np.array([[b"hi"]], dtype=np.object_)
    )
    return str(json.loads(client.infer(MODEL, [tensor]).as_numpy("text_output")[0, 0])["text"])
