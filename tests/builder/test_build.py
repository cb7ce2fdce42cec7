"""Builds: real processes that are killed, crash and compete, and what is there afterwards."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue
from threading import Thread

import pytest
import tiny_steps
from tiny_steps import KINDS, write_project

from enginesmith.build import BuildEvent, BuildResult, build
from enginesmith.errors import GateError, SpecError, StepFailedError, StoreError, ToolchainError
from enginesmith.plan import Plan, make_plan
from enginesmith.report import build_report
from enginesmith.spec_file import load_spec
from enginesmith.store import ArtifactStore

STEPS = {
    "fetch": 1,
    "reference": 2,
    "quantize": 1,
    "lower": 1,
    "measure": 1,
    "verify": 1,
    "package": 1,
    "rehearse": 1,
}


class Project:
    """A tiny spec, its store, and the control directory of its steps."""

    def __init__(self, directory: Path) -> None:
        self.control = directory / "control"
        self.control.mkdir()
        self.spec = write_project(directory)
        self.store = ArtifactStore(directory / "store")
        self.events: list[BuildEvent] = []
        self._builders: list[subprocess.Popen[str]] = []

    def plan(self) -> Plan:
        return make_plan(load_spec(self.spec), self.store, kinds=KINDS)

    def build(self, *, jobs: int = 1, keep_going: bool = False) -> BuildResult:
        return build(
            [self.plan()],
            self.store,
            jobs=jobs,
            keep_going=keep_going,
            kinds=KINDS,
            on_event=self.events.append,
        )

    def order(self, kind: str, order: str | None) -> None:
        """Make a kind of step misbehave from now on, or behave again."""
        if order is None:
            (self.control / f"{kind}.do").unlink()
        else:
            (self.control / f"{kind}.do").write_text(order)

    def runs(self) -> Counter[str]:
        runs = self.control / "runs.txt"
        return (
            Counter(line.split()[0] for line in runs.read_text().splitlines()) if runs.exists() else Counter()
        )

    def hold(self, kind: str) -> None:
        self.order(kind, "hold")
        for name in ("started", "release"):
            os.mkfifo(self.control / name)

    def await_held_step(self) -> int:
        """Block until the held step runs; its process id."""
        return int((self.control / "started").read_text())

    def release(self) -> None:
        (self.control / "release").write_text("go")

    def builder(self, *death: str) -> subprocess.Popen[str]:
        """A build of this project in a process of its own."""
        command = [sys.executable, tiny_steps.__file__, str(self.spec), str(self.store.root), *death]
        self._builders.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return self._builders[-1]

    def close(self) -> None:
        self.store.digests.close()
        for builder in self._builders:  # A failed test may have left one behind.
            builder.kill()

    def assert_complete(self) -> None:
        """Everything is there once, and nothing else."""
        plan = self.plan()
        assert all(self.store.get(step.key, verify="full") for step in plan.steps)
        assert list((self.store.root / "staging").iterdir()) == []
        assert len(list(self.store.root.glob("artifacts/*/*"))) == len(plan.steps)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("TINY_STEPS", str(tmp_path / "control"))
    project = Project(tmp_path)
    yield project
    project.close()


def _wait_for_end(pid: int) -> None:
    """Block until a process that is not a child has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 30)[0], f"process {pid} lives on"
    finally:
        os.close(descriptor)


def test_first_build_runs_every_step_once_and_the_second_none(project: Project) -> None:
    project.build(jobs=2)
    assert project.runs() == STEPS
    project.assert_complete()
    assert {event.state for event in project.events} == {"started", "progress", "built"}
    project.events.clear()
    project.build()
    assert project.runs() == STEPS
    assert {event.state for event in project.events} == {"cached"}
    assert [event.number for event in project.events] == list(range(1, 10))


def test_what_a_step_took_is_recorded(project: Project) -> None:
    result = project.build()
    artifact = result.artifacts[project.plan().step("fetch", None).key]
    assert artifact.duration_s > 0
    assert artifact.peak_rss_bytes > 5 * 2**20, "a Python process needs that much"
    assert artifact.facts == {"kind": "fetch"}


def test_steps_are_kept_offline(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    project.build()
    assert {line.split()[1] for line in (project.control / "runs.txt").read_text().splitlines()} == {"1"}


def test_plans_that_share_steps_run_them_once(project: Project, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(project.spec.read_text().replace("name: tiny", "name: other"))
    plans = [project.plan(), make_plan(load_spec(other), project.store, kinds=KINDS)]
    build(plans, project.store, kinds=KINDS)
    assert project.runs() == {**STEPS, "package": 2, "rehearse": 2}


def test_failing_gate_stops_the_build_with_its_own_error(project: Project) -> None:
    project.order("verify", "gate")
    with pytest.raises(GateError) as caught:
        project.build()
    assert caught.value.message == "top-1 agreement is 0.1, the limit is 0.6"
    assert caught.value.hint == "use another scheme"
    assert project.runs()["verify"] == 1
    assert project.runs()["package"] == 0, "what is not verified is not packaged"
    project.order("verify", None)
    project.build()
    assert {kind: project.runs()[kind] for kind in ("measure", "verify")} == {"measure": 1, "verify": 2}


def test_keep_going_builds_what_does_not_need_the_failed_step(project: Project) -> None:
    with project.spec.open("a") as spec:
        spec.write("  plain: {scheme: none}\n")
    project.order("quantize", "gate")
    result = project.build(keep_going=True)
    states = {(step.kind, step.variant): result.outcomes[step.key].state for step in project.plan().steps}
    assert states["quantize", "wo"] == "failed"
    assert states["rehearse", "wo"] == states["reference", "wo"] == "skipped"
    assert states["rehearse", "plain"] == "built"
    assert [type(error) for error in result.errors] == [GateError]
    assert project.runs()["quantize"] == 1


def test_crash_shows_the_end_of_the_log_and_where_it_is(project: Project) -> None:
    project.order("quantize", "crash")
    with pytest.raises(
        StepFailedError, match="step quantize wo failed: ValueError: the step is broken"
    ) as caught:
        project.build()
    log = project.store.log_path(project.plan().step("quantize", "wo").key)
    assert "a last word on stdout" in caught.value.message
    assert str(log) in str(caught.value.hint)
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (
            "killed",
            r"signal 9 \(SIGKILL\), most likely because the machine ran out of memory; it had used \d+ MiB",
        ),
        ("quit", "exit status 7 and no answer"),
    ],
)
def test_worker_that_dies_is_explained_and_the_build_resumes(
    project: Project, order: str, words: str
) -> None:
    project.order("quantize", order)
    with pytest.raises(StepFailedError, match=f"step quantize wo .*{words}"):
        project.build()
    before = project.runs()
    project.order("quantize", None)
    project.build()
    assert project.runs()["fetch"] == before["fetch"] == 1
    project.assert_complete()


def test_step_ends_although_it_left_a_thread_behind(project: Project) -> None:
    project.order("quantize", "thread")
    project.build()
    project.assert_complete()


def test_step_that_makes_a_link_is_refused(project: Project) -> None:
    project.order("fetch", "link")
    with pytest.raises(StoreError, match="link is a link; artifacts hold plain files only"):
        project.build()
    assert not project.store.entry(project.plan().step("fetch", None).key).exists()


def test_disk_full_in_a_step_is_one_error_and_the_build_resumes(project: Project, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    project.store = ArtifactStore(disk / "store")
    try:
        project.order("quantize", "fill")
        with pytest.raises(StoreError, match=r"disk is full: step quantize wo.* bytes are free"):
            project.build()
        assert list((project.store.root / "staging").iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        project.build()
        project.assert_complete()
        assert project.runs()["fetch"] == 1
    finally:
        project.store.digests.close()
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("kind", ["fetch", "quantize", "measure", "rehearse"])
def test_killed_builder_takes_its_worker_along_and_the_next_one_resumes(project: Project, kind: str) -> None:
    project.hold(kind)
    with project.builder() as builder:
        worker = project.await_held_step()
        builder.kill()
    _wait_for_end(worker)
    before = project.runs()
    project.order(kind, None)
    project.build()
    project.assert_complete()
    assert project.runs() == {**STEPS, kind: STEPS[kind] + 1}, (
        f"only the killed step ran again, after {before}"
    )


@pytest.mark.parametrize(("call", "number"), [("fsync", 2), ("replace", 4), ("replace", 7)])
def test_builder_killed_while_committing_is_resumed(project: Project, call: str, number: int) -> None:
    with project.builder(call, str(number)) as builder:
        builder.wait()
    assert builder.returncode == -signal.SIGKILL
    project.build()
    project.assert_complete()


def test_killed_worker_is_resumed(project: Project) -> None:
    project.hold("quantize")
    with project.builder() as builder:
        os.kill(project.await_held_step(), signal.SIGKILL)
        builder.wait()
    assert builder.returncode == 1
    project.order("quantize", None)
    project.build()
    project.assert_complete()
    assert project.runs()["fetch"] == 1


def test_interrupt_ends_the_worker(project: Project) -> None:
    project.hold("quantize")
    with project.builder() as builder:
        worker = project.await_held_step()
        builder.send_signal(signal.SIGINT)
        builder.wait()
    _wait_for_end(worker)
    assert builder.returncode == -signal.SIGINT
    assert list((project.store.root / "staging").iterdir()) == []


def test_two_builds_at_once_share_the_work(project: Project) -> None:
    project.hold("quantize")
    with project.builder() as first, project.builder() as second:
        project.await_held_step()
        project.order("quantize", None)
        # The builder that does not hold the step says that it waits; either may have got it.
        lines: Queue[str] = Queue()
        for builder in (first, second):
            Thread(target=lambda stream: [lines.put(line) for line in stream], args=(builder.stdout,)).start()
        while lines.get(timeout=60) != "waiting quantize\n":
            pass
        project.release()
        first.wait()
        second.wait()
    assert (first.returncode, second.returncode) == (0, 0)
    assert project.runs() == STEPS
    project.assert_complete()


def test_damaged_artifact_is_built_again(project: Project) -> None:
    project.build()
    victim = project.store.entry(project.plan().step("quantize", "wo").key) / "files" / "quantize.txt"
    victim.chmod(0o644)
    victim.write_text("evil")
    assert any(
        "is damaged" in reason for step in project.plan().explain(project.store) for reason in step.reasons
    )
    project.build()
    assert project.runs() == {**STEPS, "quantize": 2}
    project.assert_complete()


def test_missing_tool_is_named_before_anything_runs(project: Project) -> None:
    kinds = {**KINDS, "lower": replace(KINDS["lower"], tools=("click",))}
    plan = make_plan(load_spec(project.spec), project.store, kinds=kinds)
    lower = plan.step("lower", "wo")
    broken = replace(lower, parts={**lower.parts, "tools": {"nvidia-modelopt": "missing", "onnx": "missing"}})
    plan = replace(plan, steps=(*(step for step in plan.steps if step is not lower), broken))
    with pytest.raises(ToolchainError, match=r"needs nvidia-modelopt, onnx.*\n.*enginesmith\[build\]"):
        build([plan], project.store, kinds=kinds)
    assert project.runs() == {}


def test_spec_is_checked_against_what_was_fetched(project: Project) -> None:
    # The steps of a wheel cannot be judged before its config.json is there.
    source = f"source: {{wheel: some-model==1.0, sha256: {'a' * 64}}}"
    text = project.spec.read_text().replace("source: {path: checkpoint}", source)
    project.spec.write_text(text + "serving: {max_sequence_length: 4096}\n")
    with pytest.raises(SpecError, match="max_sequence_length is 4096"):
        project.build()
    assert project.runs() == {"fetch": 1}
    with pytest.raises(SpecError, match="max_sequence_length is 4096"):
        project.plan()


def test_report_says_what_was_measured_and_what_was_not(project: Project) -> None:
    report = build_report(project.plan(), project.build().artifacts)
    row = report.variants[0]
    assert (row.engine_bytes, row.share_of_bf16, row.share_of_fp32) == (50, 0.5, 0.25)
    assert (row.perplexity, row.top1_agreement, row.passed, row.rehearsed) == (12.5, 0.9, True, True)
    assert row.fast_cost_top1_agreement is None
    assert json.loads(json.dumps(report.as_json()))["variants"][0]["perplexity"] == 12.5
    cells = [str(cell) for column in report.as_table().columns for cell in column.cells]
    assert "12.50" in cells
    assert "not measured" in cells
