"""One tiny model, built in every scheme and published, for all end-to-end tests; they copy it before they harm it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_factory import tiny_checkpoint
from tiny_project import Built, Project, Served


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    project = Project.create(tmp_path_factory.mktemp("e2e") / "project")
    tiny_checkpoint(project.directory / "checkpoint", shards=2)
    finished = project.build("--jobs", 2, "--json", "--publish", project.repository).assert_ok()
    return Built(project, finished)


@pytest.fixture
def project(built: Built, tmp_path: Path) -> Project:
    """A copy of the built project that a test may change."""
    return built.project.copied(tmp_path / "project")


@pytest.fixture(scope="session")
def served(built: Built) -> Iterator[Served]:
    """The published repository, served on free ports."""
    ports = ("--http-port", 0, "--grpc-port", 0, "--metrics-port", 0)
    with built.project.running("serve", built.project.repository, *ports) as command:
        said = command.read_until("metrics")
        urls = {line.split()[0]: line.split()[-1] for line in said.splitlines() if line.startswith("  ")}
        command.family()
        yield Served(command, f"grpc://{urls['gRPC']}", urls["HTTP"])
        command.process.terminate()
        command.finish()
        command.assert_alone()
