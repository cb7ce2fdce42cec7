"""Builds after the first one: what runs again, what is resumed, and what two builders do to each other."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_project import VARIANTS, Built, Project, StepPlace, steps_in

pytestmark = [pytest.mark.model, pytest.mark.server]

LAST_STEPS = ("package", "rehearse")


def places(kinds: Sequence[str], *variants: str) -> set[StepPlace]:
    return {(kind, variant) for kind in kinds for variant in variants}


def would_run(project: Project) -> set[StepPlace]:
    return {(step["kind"], step["variant"] or "-") for step in project.plan() if not step["cached"]}


def test_second_build_runs_no_step_and_publishes_nothing_new(built: Built) -> None:
    second = built.project.build("--publish", built.project.repository).assert_ok()
    assert set(second.steps.values()) == {"cached"}
    assert second.err.count("already published tiny-") == len(VARIANTS)


def test_serving_edit_runs_package_and_rehearse_only(built: Built, tmp_path: Path) -> None:
    edits = {"serving.dynamic_batching": {"max_queue_delay_us": 1000}, "serving.default_max_tokens": 4}
    edited = built.project.edited(edits, name="serving.yaml")
    assert would_run(edited) == places(LAST_STEPS, *VARIANTS)
    repository = tmp_path / "repository"
    finished = edited.build("--variant", "fp8", "--publish", repository).assert_ok()
    assert finished.built == places(LAST_STEPS, "fp8")
    assert json.loads((repository / "tiny-fp8" / "1" / "serving.json").read_text())["default_max_tokens"] == 4


def test_limit_edit_runs_the_gate_and_what_follows_it(built: Built) -> None:
    edited = built.project.edited({"variants.fp8.quality": {"min_top1_agreement": 0.01}}, name="limit.yaml")
    assert would_run(edited) == places(("verify", *LAST_STEPS), "fp8")
    reasons = {step["kind"]: step["reasons"] for step in edited.plan() if not step["cached"]}
    assert reasons["verify"] == ["params.limits.quality.min_top1_agreement: none → 0.01"]
    assert reasons["package"][-1] == "input verify changed (verdict)"


def test_scheme_edit_runs_that_variant_only_and_goes_on_after_its_builder_was_killed(
    project: Project,
) -> None:
    edited = project.edited({"variants.int8-sq.alpha": 0.7})
    kinds = ("quantize", "reference", "lower", "measure", "verify", *LAST_STEPS)
    assert would_run(edited) == places(kinds, "int8-sq")
    before = edited.artifacts()
    with edited.running("build", edited.spec, "--publish", edited.repository) as build:
        build.await_child(edited.keys()["quantize", "int8-sq"])
        build.process.kill()
        build.process.wait()
        build.assert_alone()
    assert edited.artifacts() == before
    resumed = edited.build("--publish", edited.repository).assert_ok()
    assert resumed.built == places(kinds, "int8-sq")
    assert edited.leftovers() == []
    versions = [path.name for path in (edited.repository / "tiny-int8-sq").iterdir() if path.is_dir()]
    assert sorted(versions) == ["1", "2"]


def test_rehearsal_whose_builder_was_killed_leaves_no_server_and_runs_again(project: Project) -> None:
    key = project.keys()["rehearse", "bf16"]
    project.forget(key)
    with project.running("build", project.spec) as build:
        build.await_child(key)
        build.await_child("--model-repository=")
        build.process.kill()
        build.process.wait()
        build.assert_no_process_left()
    assert project.build().assert_ok().built == {("rehearse", "bf16")}
    build.assert_alone()
    assert project.leftovers() == []


def test_killed_worker_is_one_error_and_the_next_build_goes_on(project: Project) -> None:
    key = project.keys()["lower", "int8-wo"]
    before = project.artifacts()
    project.forget(key)
    with project.running("build", project.spec) as build:
        build.await_child(key).kill()
        finished = build.finish()
    finished.assert_one_error(1, "step lower int8-wo was killed by signal 9 (SIGKILL)", "the whole log is")
    assert project.build().assert_ok().built == {("lower", "int8-wo")}
    assert project.artifacts() == before


def test_interrupted_build_says_so_and_goes_on(project: Project) -> None:
    key = project.keys()["rehearse", "fp8"]
    project.forget(key)
    with project.running("build", project.spec) as build:
        build.await_child("--model-repository=")
        build.process.send_signal(signal.SIGINT)
        finished = build.finish()
        build.assert_alone()
    assert finished.status == 130
    assert "interrupted; finished steps are kept, the same command continues" in finished.err
    assert project.leftovers() == []
    assert project.build().assert_ok().built == {("rehearse", "fp8")}


def test_two_builders_at_once_run_every_step_once(project: Project) -> None:
    keys = project.keys()
    missing = places(("lower", "measure", "verify", *LAST_STEPS), "bf16")
    project.forget(*(keys[place] for place in missing))
    command = ("build", project.spec, "--publish", project.repository)
    with project.running(*command) as first:
        worker = first.await_child(keys["lower", "bf16"])
        worker.suspend()
        with project.running(*command) as second:
            said = second.read_until("another build is making this step; waiting for it")
            worker.resume()
            results = (first.finish(), second.finish())
    assert [finished.status for finished in results] == [0, 0]
    ran = (
        results[0].built,
        {place for place, state in steps_in(said + results[1].err).items() if state == "built"},
    )
    assert ran[0] | ran[1] == missing
    assert ran[0] & ran[1] == set()
    assert not (project.repository / "tiny-bf16" / "2").exists()


def test_damaged_entry_is_named_and_made_again(project: Project) -> None:
    key = project.keys()["lower", "int4-awq"]
    weights = project.entry(key) / "files" / "weights.bin"
    content = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    finished = project.build().assert_ok()
    assert f"warning: store entry {key[:12]} is damaged: {weights} has SHA-256" in finished.err
    assert finished.built == {("lower", "int4-awq")}
    assert weights.read_bytes() == content


def test_broken_limit_stops_before_package_and_nothing_is_published(built: Built, tmp_path: Path) -> None:
    limits = {"variants.int4-awq.quality": {"min_top1_agreement": 1.0}}
    edited = built.project.edited(limits, name="strict.yaml")
    repository = tmp_path / "repository"
    finished = edited.build("--publish", repository)
    finished.assert_one_error(
        1,
        "scheme int4_awq failed 1 of",
        "quality.top1_agreement: measured 0.",
        "limit at least 1",
        "verify.quality",
    )
    assert finished.steps["verify", "int4-awq"] == "FAILED"
    assert ("package", "int4-awq") not in finished.steps
    assert not repository.exists()


def test_full_disk_is_one_error_and_the_build_goes_on_when_there_is_room(
    built: Built, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        project = replace(built.project, store=disk / "store")
        for key in (built.project.keys()[place] for place in (("fetch", "-"), ("reference", "-"))):
            shutil.copytree(built.project.entry(key), project.entry(key))
        finished = project.build("--variant", "bf16", "--publish", tmp_path / "repository")
        finished.assert_one_error(1, "the disk is full", "bytes are free", "finished steps are kept")
        assert project.leftovers() == []
        assert not (tmp_path / "repository").exists()
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        resumed = project.build("--variant", "bf16").assert_ok()
        assert resumed.built | finished.built == places(("lower", "measure", "verify", *LAST_STEPS), "bf16")
        assert resumed.built & finished.built == set()
    finally:
        subprocess.run(["umount", disk], check=True)
