"""The rehearse step on a real tiny engine: what passes, and that each kind of wrong answer stops it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from checkpoint_factory import tiny_checkpoint

from enginesmith.engines.onnxruntime import lower
from enginesmith.errors import GateError, ServerError
from enginesmith.publish.local import publish
from enginesmith.spec import Serving
from enginesmith.targets import KvCacheMemory
from enginesmith.triton import package, rehearse
from enginesmith.triton.llm_asking import Answer, Response
from enginesmith.triton.llm_checks import run_checks
from enginesmith.triton.llm_subject import Subject, read_subject

MODEL = "tiny-none"


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
    queue = {"queue_policy": {"max_queue_size": 6}}
    serving = Serving.model_validate(
        {"max_batch_size": 4, "max_sequence_length": 64, "dynamic_batching": queue}
    )
    params = {
        "model_name": MODEL,
        "variant": "none",
        "scheme": "none",
        "serving": serving.model_dump(mode="json"),
        "threads": 1,
        "kv_cache": KvCacheMemory(tokens_per_block=16).model_dump(mode="json"),
        "prefill_chunk_tokens": 16,
        "batch_invariant": True,
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
        "stream",
        "6 at once",
        "messages",
        "a long prompt for the second time",
        "prompt too long",
        "more than it can take",
    }
    assert facts["requests"] == document["requests"] >= 40
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
    code = broken / MODEL / "1" / "llm_sampling.py"
    best = "best = int(np.argmax(steered))"
    assert best in code.read_text()
    code.write_text(code.read_text().replace(best, "best = int(np.argsort(steered)[-2])"))
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


@pytest.mark.model
def test_an_answer_is_possible_if_each_token_is_as_likely_as_the_best(packaged: Path) -> None:
    subject = read_subject(packaged / MODEL)
    for prompt, answer in zip(subject.prompts, subject.alone, strict=True):
        assert subject.could_answer(prompt, answer)
        assert not subject.could_answer(prompt, answer[:-1])
        assert not subject.could_answer(prompt, answer + "a")
    second = subject.prompts[1]
    assert not subject.could_answer(second, subject.alone[0]), "the answer to another prompt"
    assert subject.alone[0] != subject.alone[1]


def answer(*texts: str, output_tokens: int = 3, finish_reason: str = "length", **more: Any) -> Answer:
    reasons = (finish_reason,) * len(texts)
    return Answer((Response(texts, reasons, 1, output_tokens, **more),))


def pieces(*texts: str) -> Answer:
    """A stream with one response a token."""
    last = len(texts)
    responses = (
        Response((text,), ("length" if turn == last else "",), 1, turn) for turn, text in enumerate(texts, 1)
    )
    return Answer(tuple(responses))


def refusal(reason: str, status: str | None = "INVALID_ARG") -> Answer:
    return Answer(refusal=reason, status=status)


POSSIBLE = {("a", "A"), ("b", "B"), ("b", "b"), ("c", "C"), ("long", "LONG")}
SUBJECT = Subject(
    prompts=("a", "b", "c"),
    alone=("A", "B", "C"),
    log_probs=(-1.0, -2.0),
    chat=("hello", "HELLO"),
    could_answer=lambda prompt, text: (prompt, text) in POSSIBLE,
    too_long="word " * 10,
    prompt_limit=9,
    sequence_limit=12,
    slots=3,
    max_queue_size=0,
    may_time_out=False,
    reusable="long",
)
RIGHT: Mapping[str, Answer] = {
    **{prompt: answer(text) for prompt, text in zip(SUBJECT.prompts, SUBJECT.alone, strict=True)},
    **{f"stream {prompt}": pieces("", prompt.upper()) for prompt in SUBJECT.prompts},
    "with input": answer("aA"),
    "generate": answer("A"),
    "generate_stream": pieces("", "A"),
    "generate 0": refusal("max_tokens is 0", "HTTP 400"),
    "rows": answer(*SUBJECT.alone),
    "seed": answer("B"),
    "log_probs": answer("A", output_tokens=2, log_probs=(-1.0, -2.0), cum_log_prob=-3.0, tokens=(b"x", b"y")),
    "messages": answer("HELLO"),
    "template": answer("HELLO"),
    "long": answer("LONG", reused_blocks=2),
    SUBJECT.too_long: refusal("the prompt has 10 tokens; at most 9"),
    "not UTF-8": refusal("text_input is not valid UTF-8"),
    "": refusal("text_input is empty"),
    "max_tokens 0": refusal("max_tokens is 0"),
    "NaN": refusal("temperature is nan"),
    "beams": refusal("beam_width is 2"),
    "not JSON": refusal("messages is not JSON"),
    "both": refusal("give one of text_input and messages"),
}
NAMES = {
    "seed": "seed",
    "return_log_probs": "log_probs",
    "apply_chat_template": "template",
    "beam_width": "beams",
    "temperature": "NaN",
}


def label(prompts: Sequence[bytes], inputs: Mapping[str, Sequence[object]]) -> str:
    """The entry of ``RIGHT`` that answers a request."""
    if len(prompts) > 1:
        return "rows"
    if "messages" in inputs:
        return "both" if prompts else "not JSON" if inputs["messages"] == [b"hello"] else "messages"
    if inputs.get("max_tokens") == [0]:
        return "max_tokens 0"
    for name, entry in NAMES.items():
        if name in inputs:
            return entry
    if inputs.get("exclude_input_in_output") == [False]:
        return "with input"
    try:
        text = prompts[0].decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return f"stream {text}" if inputs.get("stream") == [True] else text


class Scripted:
    """Answers as a correct server would, but for what ``changes`` says. ``refused`` is what a flood gets."""

    def __init__(self, changes: Mapping[str, Answer], refused: Sequence[str] = ()) -> None:
        self.answers = {**RIGHT, **changes}
        self.refused = list(refused)

    def __call__(self, *prompts: bytes, **inputs: Sequence[object]) -> Answer:
        return self.answers[label(prompts, inputs)]

    def flood(self, prompt: bytes, *, count: int, max_tokens: int, wants_refusal: bool) -> list[str]:
        return self.refused

    def generate(
        self, document: Mapping[str, object], endpoint: Literal["generate", "generate_stream"]
    ) -> Answer:
        return self.answers[endpoint if document["max_tokens"] else "generate 0"]


def failed(
    changes: Mapping[str, Answer], subject: Subject = SUBJECT, refused: Sequence[str] = ()
) -> set[str]:
    return {check.name for check in run_checks(Scripted(changes, refused), subject) if not check.passed}


def test_right_answers_pass() -> None:
    assert failed({}) == set()


def test_an_answer_that_the_engine_gives_in_company_is_right_only_there() -> None:
    assert failed({"b": answer("b")}) == set()
    alone = {"greedy", "greedy again, after all that"}
    assert failed({"a": answer("?")}) == {*alone, "5 at once", "cancelled streams"}


WRONG: Mapping[str, tuple[Mapping[str, Answer], set[str]]] = {
    "rows in another order": ({"rows": answer("B", "A", "C")}, {"rows of one request"}),
    "a row is missing": ({"rows": answer("A", "B")}, {"rows of one request"}),
    "the prompt is left out": ({"with input": answer("A")}, {"prompt before the answer"}),
    "a stream in one piece": ({"stream a": answer("A")}, {"stream"}),
    "a stream that does not end": (
        {"stream a": Answer(pieces("", "", "A").responses[:2])},
        {"stream", "5 at once"},
    ),
    "a piece is missing": ({"generate_stream": pieces("", "")}, {"HTTP /generate_stream"}),
    "HTTP answers otherwise": ({"generate": answer("a")}, {"HTTP /generate"}),
    "a reason that is none": ({"seed": answer("B", finish_reason="maybe")}, {"sampling"}),
    "too many tokens": ({"seed": answer("B", output_tokens=99)}, {"sampling"}),
    "a stop word": ({"seed": answer("B###")}, {"sampling"}),
    "no log-probabilities": ({"log_probs": answer("A")}, {"log-probabilities"}),
    "other log-probabilities": (
        {
            "log_probs": answer(
                "A", output_tokens=2, log_probs=(-1.0, -2.1), cum_log_prob=-3.1, tokens=(b"", b"")
            )
        },
        {"log-probabilities"},
    ),
    "a wrong sum": (
        {
            "log_probs": answer(
                "A", output_tokens=2, log_probs=(-1.0, -2.0), cum_log_prob=-2.0, tokens=(b"", b"")
            )
        },
        {"log-probabilities"},
    ),
    "chat without the template": ({"messages": answer("hello")}, {"messages"}),
    "nothing is reused": (
        {"long": answer("LONG", reused_blocks=0)},
        {"a long prompt for the second time"},
    ),
    "reuse spoils the answer": (
        {"long": answer("GNOL", reused_blocks=1)},
        {"a long prompt for the first time", "a long prompt for the second time"},
    ),
    "a refusal without its reason": ({"max_tokens 0": refusal("bad request")}, {"max_tokens 0"}),
    "a refusal as an error of the server": (
        {"generate 0": refusal("max_tokens is 0", "HTTP 500")},
        {"HTTP /generate, max_tokens 0"},
    ),
    "a refusal with a traceback": (
        {SUBJECT.too_long: refusal("Traceback: at most 9")},
        {"prompt too long"},
    ),
    "what is wrong is answered": ({"both": answer("A")}, {"prompt and messages"}),
    "an empty prompt crashes": (
        {"": refusal("Stub process is not healthy", None)},
        {"empty prompt"},
    ),
}


@pytest.mark.parametrize(("changes", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_answers_fail_their_check(changes: Mapping[str, Answer], expected: set[str]) -> None:
    assert failed(changes) == expected


def test_an_empty_prompt_may_be_answered() -> None:
    assert failed({"": answer("x")}) == set()


def test_requests_may_be_turned_away_only_where_the_spec_limits_the_queue() -> None:
    full = {"c": refusal("the queue is full", "UNAVAILABLE")}
    assert failed(full) == {"5 at once"}
    assert failed(full, replace(SUBJECT, may_time_out=True)) == set()


def test_a_full_queue_must_refuse_and_only_then() -> None:
    limited = replace(SUBJECT, max_queue_size=4)
    assert failed({}, limited) == {"more than it can take"}
    assert failed({}, limited, ["[UNAVAILABLE] the queue is full"]) == set()
    assert failed({}, limited, ["crashed"]) == {"more than it can take"}
    assert failed({}, refused=["[UNAVAILABLE] the queue is full"]) == {"cancelled streams"}


def test_a_model_without_a_chat_template_must_say_so() -> None:
    plain = replace(SUBJECT, chat=None)
    assert failed({}, plain) == {"chat without a template"}
    assert failed({"messages": refusal("this model has no chat template")}, plain) == set()
