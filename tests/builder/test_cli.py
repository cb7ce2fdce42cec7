"""The command line: what is printed where, and with which exit status."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from graph_project import write_graph_project
from tiny_steps import KINDS, write_project

from enginesmith import cli
from enginesmith.build import BuildEvent, build
from enginesmith.console import build_display, event_line, work_display
from enginesmith.plan import Step, make_plan
from enginesmith.spec_file import load_spec
from enginesmith.store import Artifact, ArtifactStore

ROOT = Path(__file__).parents[2]
VERBS = (
    "plan",
    "build",
    "publish",
    "serve",
    "ask",
    "gc",
    "schema",
    "demo",
    "inspect",
    "bench",
    "compare",
    "bench-report",
)
HEAVY = (
    "torch",
    "onnxruntime",
    "transformers",
    "numpy",
    "pydantic",
    "yaml",
    "rich",
    "tritonclient",
    "sqlite3",
)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINESMITH_STORE", str(tmp_path / "store"))
    return write_project(tmp_path)


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_shows_examples(capsys: pytest.CaptureFixture[str], verb: str | None) -> None:
    status, out, err = _run(capsys, *([verb] if verb else []), "--help")
    assert (status, err) == (0, "")
    assert f"  enginesmith {verb or 'plan'}" in out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from enginesmith import cli; cli.run(['--help'])\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["no-such-verb"], 2, "No such command 'no-such-verb'"),
        (["plan"], 2, "Missing argument 'SPEC'"),
        (["build", "x.yaml", "--jobs", "0"], 2, "0 is not in the range"),
        (["plan", "missing.yaml"], 2, "error: cannot read spec missing.yaml"),
        (["publish", "x.yaml"], 2, "Missing option '--to'"),
        (["schema", "--check", "missing.json"], 1, "enginesmith schema > missing.json"),
        (["--store", "missing", "gc"], 1, "there is no store at"),
        (["ask", "m", "hello", "--url", "grpc://127.0.0.1:1", "--timeout-s", "5"], 1, "error: "),
    ],
)
def test_wrong_command_line_is_one_message(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    seen, out, err = _run(capsys, *arguments)
    assert seen == status
    assert words in err
    assert out == ""
    assert "Traceback" not in err


def test_misspelled_key_is_a_usage_error(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    spec.write_text(spec.read_text() + "servng: {}\n")
    status, _, err = _run(capsys, "plan", spec)
    assert status == 2
    assert "servng: unknown key; did you mean 'serving'?" in err


def test_plan_lists_the_steps_and_explains_them(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    status, out, err = _run(capsys, "plan", spec, "--explain", "--variant", "wo")
    assert (status, err) == (0, "9 steps, 9 will run\n")
    first, reason, *_ = out.splitlines()
    assert first.split() == ["fetch", "-", first.split()[2], "will", "run"]
    assert reason.strip() == "never built"


def test_plan_in_json_is_all_that_is_on_stdout(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    status, out, _ = _run(capsys, "plan", spec, "--json")
    steps = json.loads(out)["steps"]
    assert status == 0
    assert (steps[0]["kind"], steps[0]["cached"], steps[0]["reasons"]) == ("fetch", False, ["never built"])
    assert all(len(step["key"]) == 64 for step in steps)


@pytest.mark.parametrize(
    ("serving", "warned"),
    [
        ({"dynamic_batching": {"queue_policy": {"max_queue_size": 64}}}, True),
        ({"dynamic_batching": {"queue_policy": {"max_queue_size": 64}}, "instances": 2}, False),
        ({"dynamic_batching": {"queue_policy": {}}}, False),
        ({"dynamic_batching": None}, False),
        ({}, False),
    ],
)
def test_plan_warns_of_a_queue_policy_with_one_instance(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    serving: dict[str, object],
    warned: bool,
) -> None:
    monkeypatch.setenv("ENGINESMITH_STORE", str(tmp_path / "store"))
    spec = write_graph_project(tmp_path, scheme="none", serving=serving)
    status, _, err = _run(capsys, "plan", spec)
    assert status == 0
    assert ("warning: tiny: serving.dynamic_batching.queue_policy with serving.instances 1" in err) == warned


def test_nothing_unbuilt_is_published(capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path) -> None:
    status, out, err = _run(capsys, "publish", spec, "--to", tmp_path / "repository")
    assert (status, out) == (1, "")
    assert (
        "variant wo of tiny is not built: quantize, reference, lower, measure, verify, package, rehearse missing"
        in err
    )
    assert not (tmp_path / "repository").exists()


def test_prompt_that_is_not_utf8_is_explained() -> None:
    command = [sys.executable, "-m", "enginesmith.cli", "ask", "m", "-"]
    done = subprocess.run(command, input=b"caf\xe9", capture_output=True)
    assert done.returncode == 1
    assert b"the prompt on stdin is not UTF-8: unexpected end of data at byte 3" in done.stderr


def test_schema_is_printed_and_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, out, _ = _run(capsys, "schema")
    file = tmp_path / "schema.json"
    file.write_text(out)
    assert _run(capsys, "schema", "--check", file)[0] == 0
    file.write_text(out + " ")
    status, _, err = _run(capsys, "schema", "--check", file)
    assert status == 1
    assert "is not the schema of this version" in err


def test_unexpected_error_leaves_its_traceback_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spec: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("enginesmith.plan.make_plan", lambda *_, **__: 1 / 0)
    status, out, err = _run(capsys, "plan", spec)
    (file,) = tmp_path.glob("enginesmith-*.traceback.txt")
    assert (status, out) == (3, "")
    assert "error: unexpected ZeroDivisionError: division by zero" in err
    assert str(file) in err
    assert "Traceback" not in err
    assert "ZeroDivisionError" in file.read_text()


def test_interrupt_is_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spec: Path
) -> None:
    monkeypatch.setattr("enginesmith.plan.make_plan", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    status, _, err = _run(capsys, "plan", spec)
    assert status == 130
    assert "the same command continues" in err


def test_damaged_entry_is_reported_on_stderr_by_a_real_build(
    capsys: pytest.CaptureFixture[str], spec: Path, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path / "store")
    key = make_plan(load_spec(spec), store).step("fetch", None).key
    store.digests.close()
    (store.entry(key)).mkdir(parents=True)
    status, _, err = _run(capsys, "publish", spec, "--to", tmp_path / "repository")
    assert status == 1
    assert f"warning: store entry {key[:12]} is damaged" in err


def test_plain_display_prints_a_line_for_each_finished_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spec: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("TINY_STEPS", str(tmp_path))
    store = ArtifactStore(tmp_path / "store")
    plan = make_plan(load_spec(spec), store, kinds=KINDS, variants=["wo"])
    for _ in range(2):
        with build_display(sys.stderr) as on_event:
            build([plan], store, kinds=KINDS, on_event=on_event)
    store.digests.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 18
    assert lines[0].split()[:3] == ["[1/9]", "fetch", "-"]
    assert lines[0].split()[-1] == "B"
    assert lines[17].split() == ["[9/9]", "rehearse", "wo", "cached"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_the_same_lines_and_what_is_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    artifact = Artifact("k", "quantize", tmp_path, {}, {}, {}, 0.0, 14.23, 1)
    step = Step("quantize", "[wo]", None, {}, {}, {"tools": {}}, "k")
    terminal = _Terminal()
    with build_display(terminal) as on_event:
        on_event(BuildEvent("started", step, 0, 9))
        on_event(BuildEvent("progress", step, 0, 9, fraction=0.5, note="[layer] 3"))
        on_event(BuildEvent("built", step, 1, 9, artifact=artifact))
    assert "[1/9]   quantize         [wo]            14.2s  0 B" in terminal.getvalue()


def test_work_display_prints_each_note_once_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with work_display(stream) as on_progress:
        for note in ("loading", "loading", "ready"):
            on_progress(None, note)
    assert stream.getvalue() == "loading\nready\n"


def test_started_steps_have_no_line_of_their_own() -> None:
    step = Step("quantize", "wo", None, {}, {}, {"tools": {}}, "k")
    assert event_line(BuildEvent("started", step, 0, 9)) is None
    assert event_line(BuildEvent("failed", step, 3, 9)) == "[3/9]   quantize         wo              FAILED"
