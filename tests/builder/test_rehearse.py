"""The rehearse step on a real tiny engine: what passes, and that each kind of wrong answer stops it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import tiny_checkpoint

from enginesmith.engines.onnxruntime import lower
from enginesmith.errors import GateError, ServerError
from enginesmith.publish.local import publish
from enginesmith.spec import Serving
from enginesmith.triton import package, rehearse
from enginesmith.triton.rehearse import Answer, Subject

MODEL = "tiny-none"
SUBJECT = Subject(
    prompts=("a", "b", "c"),
    alone=("A", "B", "C"),
    together=("A", "B", "C"),
    in_company=(frozenset("A"), frozenset({"B", "b"}), frozenset("C")),
    too_long="word " * 10,
    prompt_limit=9,
    may_turn_away=False,
)


@dataclass
class Context:
    """A step's context without a build."""

    root: Path
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True)
        self.scratch.mkdir()

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    def progress(self, fraction: float | None, note: str = "") -> None:
        self.notes.append(note)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a tiny random engine."""
    root = tmp_path_factory.mktemp("packaged")
    checkpoint = tiny_checkpoint(root / "checkpoint")
    engine = Context(root / "lower", {"mode": "exact"}, {"checkpoint": checkpoint})
    lower.run(engine)
    (root / "verdict").mkdir()
    (root / "verdict" / "verdict.json").write_text('{"passed": true}')
    serving = Serving.model_validate({"max_batch_size": 4, "max_sequence_length": 64})
    params = {
        "model_name": MODEL,
        "variant": "none",
        "scheme": "none",
        "serving": serving.model_dump(mode="json"),
        "threads": 1,
    }
    inputs = {"engine": engine.out, "verdict": root / "verdict", "checkpoint": checkpoint}
    context = Context(root / "package", params, inputs)
    package.run(context)
    return context.out


def rehearsal(root: Path, packaged: Path) -> Context:
    return Context(root, {"model_name": MODEL, "server": None}, {"package": packaged})


@pytest.mark.server
@pytest.mark.model
def test_a_rehearsed_package_can_be_published_as_those_bytes(tmp_path: Path, packaged: Path) -> None:
    context = rehearsal(tmp_path / "rehearse", packaged)
    facts = rehearse.run(context)
    document = json.loads((context.out / "rehearsal.json").read_text())
    assert document["passed"] is True
    assert {check["name"] for check in document["checks"]} >= {
        "greedy",
        "at once",
        "prompt too long",
        "invalid UTF-8",
    }
    assert facts["requests"] == document["requests"] >= 10
    assert facts["server_version"].count(".") == 2
    assert publish(packaged, tmp_path / "repository", evidence={"rehearsal": document}).version == 1
    assert not list(packaged.rglob("__pycache__"))


@pytest.mark.server
@pytest.mark.model
def test_a_server_that_answers_otherwise_than_the_engine_stops_the_build(
    tmp_path: Path, packaged: Path
) -> None:
    broken = tmp_path / "package"
    shutil.copytree(packaged, broken)
    code = broken / MODEL / "1" / "model.py"
    code.write_text(
        code.read_text().replace(
            "return [self._respond(job) for job in jobs]", "return [self._respond(job) for job in jobs[::-1]]"
        )
    )
    code.write_text(code.read_text().replace("kind(row[name][0])", "kind(row[name][0]) + 1"))
    context = rehearsal(tmp_path / "rehearse", broken)
    with pytest.raises(
        GateError, match=r"(?s)failed its rehearsal in tritonserver.*greedy: asked .*expected .*seen"
    ):
        rehearse.run(context)
    assert not any(context.out.iterdir())


@pytest.mark.server
@pytest.mark.model
def test_a_package_that_does_not_load_stops_the_build_with_tritons_reason(
    tmp_path: Path, packaged: Path
) -> None:
    broken = tmp_path / "package"
    shutil.copytree(packaged, broken)
    code = broken / MODEL / "1" / "model.py"
    code.write_text(code.read_text().replace("import json\n", "import a_module_that_nobody_has\n"))
    with pytest.raises(ServerError, match="No module named 'a_module_that_nobody_has'"):
        rehearse.run(rehearsal(tmp_path / "rehearse", broken))


class Scripted:
    """Answers as a correct server would, but for what ``changes`` says, by prompt."""

    def __init__(self, **changes: Answer) -> None:
        self.changes = {prompt.encode(): answer for prompt, answer in changes.items()}

    def __call__(self, *prompts: bytes, **options: object) -> Answer:
        if len(prompts) > 1:
            return self.changes.get(b"rows", Answer("\n".join(prompt.decode().upper() for prompt in prompts)))
        (prompt,) = prompts
        if options.get("max_tokens") == [0]:
            return self.changes.get(b"zero", refusal("max_tokens is 0"))
        if prompt in self.changes:
            return self.changes[prompt]
        if len(prompt) > 9:
            return refusal("the prompt has 10 tokens; at most 9")
        try:
            return Answer(prompt.decode().upper(), "length", 1, 3) if prompt else refusal("empty")
        except UnicodeDecodeError:
            return refusal("text_input is not valid UTF-8")


def refusal(reason: str, status: str = "StatusCode.INVALID_ARGUMENT") -> Answer:
    return Answer(refusal=reason, status=status)


def failed(subject: Subject = SUBJECT, **changes: Answer) -> set[str]:
    return {check.name for check in rehearse.run_checks(Scripted(**changes), subject) if not check.passed}


def test_right_answers_pass() -> None:
    assert failed() == set()


def test_an_answer_that_the_prompt_gets_in_other_company_is_right_only_among_others() -> None:
    assert failed(b=Answer("b", "length", 1, 3)) == set()
    assert failed(a=Answer("a", "length", 1, 3)) == {
        "greedy",
        "at once",
        "greedy again, after the bad requests",
    }


def test_rows_in_the_wrong_order_fail() -> None:
    assert failed(rows=Answer("B\nA\nC")) == {"rows of one request"}


def test_a_request_that_the_queue_policy_may_refuse_does_not_fail() -> None:
    full = refusal("exceeds maximum queue size", "StatusCode.UNAVAILABLE")
    assert failed(c=full) == {"at once"}
    assert failed(replace(SUBJECT, may_turn_away=True), c=full) == set()


def test_a_refusal_that_does_not_name_the_reason_fails() -> None:
    assert failed(zero=refusal("bad request")) == {"max_tokens 0"}
    assert failed(zero=Answer("A", "length", 1, 0)) == {"max_tokens 0"}
    assert failed(**{SUBJECT.too_long: refusal("Traceback: 9")}) == {"prompt too long"}


def test_an_empty_prompt_may_be_answered_or_refused_but_may_not_crash() -> None:
    assert failed(**{"": Answer("x", "length", 1, 2)}) == set()
    assert failed(**{"": refusal("Stub process is not healthy", "StatusCode.INTERNAL")}) == {"empty prompt"}


def test_sampling_that_ignores_the_stop_words_fails() -> None:
    assert failed(b=Answer("b", "maybe", 1, 3)) == {"sampling"}
    assert failed(b=Answer("b", "stop", 1, 99)) == {"sampling"}
