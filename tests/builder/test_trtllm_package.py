"""Engines join the rehearsed repository, and a package of several models is published parts first."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from trtllm_deployment import Context, deployment, write_engines

from enginesmith.errors import EnginesmithError, GateError, OperatorError
from enginesmith.publish import local
from enginesmith.publish.local import publish
from enginesmith.triton.config import parse_config
from enginesmith.triton.placement import contents_digest, tree_contents
from enginesmith.triton.trtllm import package

NOT_REHEARSED = ["tensorrt_llm/1/rank*.engine", "tensorrt_llm/1/config.json"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deployment(tmp_path_factory.mktemp("deployment"))[1]


def rehearsal_of(repository: Path) -> dict[str, Any]:
    digest = contents_digest(tree_contents(repository))
    return {"passed": True, "package_digest": digest, "not_rehearsed": NOT_REHEARSED}


def run_package(
    root: Path, repository: Path, engines: Path, *, rehearsal: dict[str, Any] | None = None
) -> Path:
    (root / "rehearsal").mkdir(parents=True)
    document = rehearsal if rehearsal is not None else rehearsal_of(repository)
    (root / "rehearsal" / "rehearsal.json").write_text(json.dumps(document))
    inputs = {"repository": repository, "engines": engines, "rehearsal": root / "rehearsal"}
    context = Context(root / "package", {}, inputs)
    package.run(context)
    return context.out


def evidence(repository: Path) -> dict[str, Any]:
    return {"rehearsal": rehearsal_of(repository)}


def test_a_package_is_the_repository_and_the_engines(tmp_path: Path, repository: Path) -> None:
    packaged = run_package(tmp_path, repository, write_engines(tmp_path / "engines"))
    contents = tree_contents(packaged)
    added = contents.keys() - tree_contents(repository).keys()
    assert added == {"tensorrt_llm/1/rank0.engine", "tensorrt_llm/1/config.json"}
    assert {name: contents[name] for name in tree_contents(repository)} == tree_contents(repository)


@pytest.mark.parametrize(
    ("built", "message"),
    [
        ({"max_batch_size": 2}, "max_batch_size is 2, the repository relies on 4"),
        ({"max_input_len": 32}, "max_input_len is 32"),
        ({"max_seq_len": 95}, "max_seq_len is 95"),
        ({"max_num_tokens": 64}, "max_num_tokens is 64"),
        ({"max_beam_width": None}, "max_beam_width is None"),
        ({"plugin_config": {"use_paged_context_fmha": False}}, "use_paged_context_fmha is off"),
    ],
)
def test_engines_that_do_not_cover_the_repository_are_refused(
    tmp_path: Path, repository: Path, built: dict[str, Any], message: str
) -> None:
    with pytest.raises(GateError, match=message):
        run_package(tmp_path, repository, write_engines(tmp_path / "engines", **built))


def test_engines_of_another_mapping_are_refused(tmp_path: Path, repository: Path) -> None:
    engines = write_engines(tmp_path / "engines")
    (engines / "rank1.engine").write_bytes(b"engine")
    with pytest.raises(GateError, match="there are 2 engines, the mapping has 1 ranks"):
        run_package(tmp_path / "two", repository, engines)
    (engines / "rank1.engine").unlink()
    (engines / "rank0.engine").unlink()
    with pytest.raises(GateError, match=r"rank0\.engine is missing"):
        run_package(tmp_path / "none", repository, engines)


@pytest.mark.parametrize("change", [{"passed": False}, {"package_digest": "0" * 64}])
def test_what_was_not_rehearsed_is_not_packaged(
    tmp_path: Path, repository: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(GateError, match="rehears"):
        run_package(
            tmp_path,
            repository,
            write_engines(tmp_path / "engines"),
            rehearsal=rehearsal_of(repository) | change,
        )


def test_publishing_shows_parts_before_what_refers_to_them(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = run_package(tmp_path, repository, write_engines(tmp_path / "engines"))
    seen: list[str] = []
    reveal = local._reveal

    def watched(release: Any, config: str, staging: Path) -> Any:
        done = reveal(release, config, staging)
        seen.append(release.model.name)
        return done

    monkeypatch.setattr(local, "_reveal", watched)
    done = publish(packaged, tmp_path / "models", evidence=evidence(repository))
    assert set(seen[:3]) == {"preprocessing", "tensorrt_llm", "postprocessing"}
    assert set(seen[3:]) == {"ensemble", "tensorrt_llm_bls"}
    assert [part.model for part in done.parts] == seen
    assert done.changed
    release = json.loads((tmp_path / "models/tensorrt_llm/1/release.json").read_text())
    assert release["not_rehearsed"] == ["config.json", "rank0.engine"]
    again = publish(packaged, tmp_path / "models", evidence=evidence(repository))
    assert not again.changed


def test_paths_follow_the_published_version(tmp_path: Path, repository: Path) -> None:
    for number, engine in enumerate((b"first", b"second"), start=1):
        engines = write_engines(tmp_path / f"engines{number}")
        (engines / "rank0.engine").write_bytes(engine)
        packaged = run_package(tmp_path / str(number), repository, engines)
        done = publish(packaged, tmp_path / "models", evidence=evidence(repository))
    versions = {part.model: part.version for part in done.parts}
    assert versions["tensorrt_llm"] == 2
    assert set(versions.values()) == {1, 2}
    assert [part.model for part in done.parts if part.version == 2] == ["tensorrt_llm"]
    for model in ("tensorrt_llm", "preprocessing"):
        config = parse_config((tmp_path / "models" / model / "config.pbtxt").read_text())
        assert config.parameters["gpt_model_path"].string_value == "/models/tensorrt_llm/2"
        assert list(config.version_policy.specific.versions) == [versions[model]]


def test_a_publication_that_was_killed_between_two_models_is_completed_by_the_next(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = run_package(tmp_path, repository, write_engines(tmp_path / "engines"))
    reveal, calls = local._reveal, iter(range(99))

    def killed(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return reveal(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(local, "_reveal", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(packaged, tmp_path / "models", evidence=evidence(repository))
    visible = {path.parent.name for path in (tmp_path / "models").glob("*/config.pbtxt")}
    assert visible == {"preprocessing", "tensorrt_llm", "postprocessing"}
    done = publish(packaged, tmp_path / "models", evidence=evidence(repository))
    assert {part.model for part in done.parts if part.changed} == {"ensemble", "tensorrt_llm_bls"}


@pytest.mark.parametrize(
    "changed", ["postprocessing/1/model.py", "ensemble/config.pbtxt", "tensorrt_llm/1/limits.json"]
)
def test_only_engines_may_differ_from_what_was_rehearsed(
    tmp_path: Path, repository: Path, changed: str
) -> None:
    packaged = run_package(tmp_path, repository, write_engines(tmp_path / "engines"))
    copy = tmp_path / "copy"
    shutil.copytree(packaged, copy)
    with (copy / changed).open("a") as file:
        file.write("\n# changed\n")
    wide = evidence(repository)
    wide["rehearsal"]["not_rehearsed"] = [
        *NOT_REHEARSED,
        changed,
        "*",
        "tensorrt_llm/1/*",
        "postprocessing/1/*",
    ]
    with pytest.raises(EnginesmithError, match="is not what was rehearsed"):
        publish(copy, tmp_path / "models", evidence=wide)
    assert not (tmp_path / "models").exists()


def test_a_disk_that_is_full_shows_no_part_and_the_same_publication_goes_on_later(
    tmp_path: Path, repository: Path
) -> None:
    packaged = run_package(tmp_path / "run", repository, write_engines(tmp_path / "engines"))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        models = disk / "models"
        with pytest.raises(OperatorError, match=r"cannot publish .*No space left on device"):
            publish(packaged, models, evidence=evidence(repository))
        assert not [path for path in models.iterdir() if path.is_dir()]
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert publish(packaged, models, evidence=evidence(repository)).changed
        assert len([path for path in models.iterdir() if path.is_dir()]) == 5
    finally:
        subprocess.run(["umount", str(disk)], check=True)
