"""Suites of scenarios: which ship, how they fit a model, and what a run of one leaves behind."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asked_models import load_models
from perf_models import PerfServer

from enginesmith_client import Client
from enginesmith_client.perf._errors import MeasurementError, ProfileError, ResultsError
from enginesmith_client.perf._profile import FixedLength, Profile, RequestsPart, UniformLength
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.many._fitting import Fitting, longest_accepted
from enginesmith_client.perf.many._suite import (
    SuiteResult,
    load_suite,
    load_suite_result,
    run_suite,
)
from enginesmith_client.perf.workload._workload import kind_of, make_workload, subject_of

PAGE = Path(__file__).parents[2] / "docs" / "bench-scenarios.md"
QUICK = "{window_s: 0.3, windows: 1, max_s: 0.3, warmup_s: 0, drain_s: 5}"


@pytest.fixture(scope="module")
def client(perf_server: PerfServer) -> Iterator[Client]:
    with Client(f"grpc://{perf_server.grpc_url}", timeout_s=30) as connected:
        load_models(connected, perf_server, "wordy", "echo", "sentences-text")
        yield connected


def scenario_file(directory: Path, name: str, text: str) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_standard_suite_has_the_twelve_kinds_of_load_in_fourteen_scenarios() -> None:
    suite = load_suite("standard")
    assert [scenario.name for scenario in suite.scenarios] == [
        "chat-short", "chat-long", "rag-long-prompt", "summarization", "code", "batch-offline", "streaming", "bursty",
        "many-tiny", "embeddings-single", "embeddings-bulk", "overload-2x", "cold-start", "soak",
    ]  # fmt: skip
    assert all(scenario.why and scenario.profile.name == scenario.name for scenario in suite.scenarios)


@pytest.mark.parametrize("kind", ["text", "embed", "tensors"])
def test_the_standard_suite_takes_less_than_a_quarter_of_an_hour(kind: Any) -> None:
    """At its longest, without the capacity runs (20 s at most each) and what drains."""
    scenarios = [one for one in load_suite("standard").scenarios if kind in one.for_kinds]
    longest_s = sum(one.profile.measure.max_s + one.profile.measure.warmup_s for one in scenarios)
    capacities_s = 20 * sum(
        getattr(one.profile.load, "capacity_factor", None) is not None for one in scenarios
    )
    assert longest_s + capacities_s < 15 * 60


def test_a_directory_of_scenarios_is_a_suite_and_so_is_one_file(tmp_path: Path) -> None:
    scenario_file(tmp_path, "b", "{title: B, profile: {seed: 2}}")
    path = scenario_file(
        tmp_path, "a", "{title: A, order: 200, kinds: [text], profile: {requests: {prompts_file: p}}}"
    )
    suite = load_suite(tmp_path)
    assert [(one.name, one.title, one.for_kinds) for one in suite.scenarios] == [
        ("b", "B", ("text", "embed", "tensors")),
        ("a", "A", ("text",)),
    ]
    assert suite.scenarios[1].profile.requests.prompts_file == tmp_path / "p"
    assert [one.name for one in load_suite(path).scenarios] == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{title: A}", "profile: required key is missing"),
        ("{title: A, profile: {}, kind: [text]}", "kind: unknown key; did you mean 'kinds'?"),
        ("{title: A, profile: {}, kinds: [txt]}", "kinds.0: must be 'text', 'embed' or 'tensors'"),
        ("{title: A, profile: {lode: 1}}", "lode: unknown key; did you mean 'load'?"),
        ("", "is empty"),
    ],
)
def test_a_wrong_scenario_is_an_error_that_names_its_file(tmp_path: Path, text: str, message: str) -> None:
    path = scenario_file(tmp_path, "a", text)
    with pytest.raises(ProfileError) as caught:
        load_suite(tmp_path)
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_a_suite_that_is_not_there_is_an_error_that_names_the_built_in_ones(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="there is no suite 'standart'") as caught:
        load_suite("standart")
    assert "built in: standard" in (caught.value.hint or "")
    with pytest.raises(ProfileError, match="holds no scenarios"):
        load_suite(tmp_path)


@pytest.mark.parametrize("limit", [1, 3, 40, 100, 1023])
def test_the_longest_text_is_found_within_an_eighth_and_is_one_that_is_taken(limit: int) -> None:
    found = longest_accepted(lambda tokens: None if tokens <= limit else "too long", 2464)
    again = longest_accepted(lambda tokens: None if tokens <= limit else "too long", 9000)
    assert found is not None
    assert limit * 7 / 8 <= found <= limit
    assert found == again


def test_a_limit_that_the_model_states_is_tried_first() -> None:
    asked: list[int] = []

    def ask(tokens: int) -> str | None:
        asked.append(tokens)
        return None if tokens <= 1023 else f"the prompt has {tokens} tokens; this model accepts at most 1023"

    assert longest_accepted(ask, 2464) == 1012
    assert asked == [2464, 1012]


def test_a_model_that_takes_nothing_is_an_error() -> None:
    with pytest.raises(ProfileError, match="not even the shortest text: no"):
        longest_accepted(lambda _: "no", 100)


@pytest.mark.server
@pytest.mark.parametrize("name", ["rag-long-prompt", "chat-short"])
def test_what_is_too_long_for_a_model_is_cut_to_what_it_takes(client: Client, name: str) -> None:
    target = Target("wordy", client.url)
    subject = subject_of(client, target, RequestsPart())
    (scenario,) = [one for one in load_suite("standard").scenarios if one.name == name]
    fitted = Fitting(subject, kind_of(subject.metadata), {}).fitted(scenario.profile)
    assert (name == "rag-long-prompt") == bool(fitted.notes)
    workload = make_workload(client, target, fitted.profile.requests, seed=0)
    assert max(one.prompt_tokens or 0 for one in workload.requests) <= 300


@pytest.mark.server
def test_a_limit_in_the_models_configuration_needs_no_question(client: Client) -> None:
    subject = subject_of(client, Target("wordy", client.url), RequestsPart())
    config = {"parameters": {"max_seq_len": {"string_value": "200"}}}
    requests = RequestsPart(
        prompt_tokens=UniformLength(kind="uniform", low=100, high=900), output_tokens=FixedLength(tokens=90)
    )
    fitted = Fitting(subject, "text", config).fitted(Profile(requests=requests)).profile.requests
    assert fitted.output_tokens == FixedLength(tokens=49)
    assert fitted.prompt_tokens == UniformLength(kind="uniform", low=100, high=149)


@pytest.mark.server
def test_batches_and_open_dimensions_are_made_to_fit(client: Client) -> None:
    def fitted(model: str, **requests: Any) -> tuple[RequestsPart, tuple[str, ...]]:
        subject = subject_of(client, Target(model, client.url), RequestsPart())
        found = Fitting(subject, kind_of(subject.metadata), {}).fitted(
            Profile(requests=RequestsPart(**requests))
        )
        return found.profile.requests, found.notes

    requests, notes = fitted("sentences-text", texts=32, prompt_tokens=FixedLength(tokens=5))
    assert (requests.texts, len(notes)) == (4, 1)
    requests, notes = fitted("echo", rows=9)
    assert (requests.rows, requests.shapes, len(notes)) == (8, {"in_BOOL": (16,)}, 2)
    assert fitted("tiny") == (RequestsPart(), ())


def quick_suite(directory: Path) -> Path:
    closed = "load: {loop: closed, concurrency: 1}"
    scenario_file(directory, "one", f"{{title: One, profile: {{{closed}, measure: {QUICK}}}}}")
    scenario_file(directory, "talk", f"{{title: Talk, kinds: [text], profile: {{measure: {QUICK}}}}}")
    broken = f"requests: {{kind: text}}, {closed}, measure: {QUICK}"
    scenario_file(directory, "wrong", f"{{title: Wrong, order: 0, profile: {{{broken}}}}}")
    return directory


@pytest.mark.server
def test_a_suite_measures_what_fits_and_says_why_it_left_out_the_rest(
    client: Client, perf_server: PerfServer, tmp_path: Path
) -> None:
    suite, target = load_suite(quick_suite(tmp_path / "quick")), perf_server.target("tiny")
    result = run_suite(target, suite, directory=tmp_path / "out")
    assert (result.name, result.kind, result.status) == ("quick", "tensors", "complete")
    by_name = {entry.name: entry for entry in result.scenarios}
    assert [(entry.name, entry.status) for entry in result.scenarios] == [
        ("wrong", "failed"), ("one", "measured"), ("talk", "skipped"),
    ]  # fmt: skip
    assert (
        by_name["talk"].reason == "it is for models that generate text; this is one of the models of tensors"
    )
    assert "requests.kind is text, but model 'tiny'" in by_name["wrong"].reason
    assert by_name["one"].directory == "one"
    assert load_suite_result(tmp_path / "out") == result
    alone = run_suite(target, suite, directory=tmp_path / "alone", only=["talk"])
    assert [entry.name for entry in alone.scenarios] == ["talk"]

    run_file = tmp_path / "out" / "one" / "run.json"
    before = run_file.stat().st_mtime_ns
    with pytest.raises(ResultsError, match="holds suite quick of model tiny"):
        run_suite(perf_server.target("steady20"), suite, directory=tmp_path / "out")
    again = run_suite(target, suite, directory=tmp_path / "out", only=["one"])
    assert again.scenarios == result.scenarios, "what is left out is as it was found before"
    assert run_file.stat().st_mtime_ns == before, "what was measured is not measured again"


@pytest.mark.server
def test_an_interrupted_suite_keeps_what_it_measured_and_goes_on(
    client: Client, perf_server: PerfServer, tmp_path: Path
) -> None:
    suite, target = load_suite(quick_suite(tmp_path / "quick")), perf_server.target("tiny")
    kept: list[SuiteResult] = []

    def run(*given: Any, **options: Any) -> Any:
        if not kept:
            kept.append(load_suite_result(tmp_path / "out"))
            raise KeyboardInterrupt
        raise MeasurementError("nothing was answered")

    with pytest.raises(KeyboardInterrupt):
        run_suite(target, reversed_suite(suite), directory=tmp_path / "out", run=run)
    assert [(entry.name, entry.status) for entry in kept[0].scenarios] == [("talk", "skipped")]
    assert kept[0].status == "partial"
    result = run_suite(target, reversed_suite(suite), directory=tmp_path / "out", run=run)
    assert [(entry.status, entry.reason) for entry in result.scenarios[1:]] == [
        ("failed", "nothing was answered")
    ] * 2


def reversed_suite(suite: Any) -> Any:
    return dataclasses.replace(suite, scenarios=suite.scenarios[::-1])


@pytest.mark.server
def test_scenarios_that_the_suite_does_not_have_are_an_error(perf_server: PerfServer, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="suite standard has no scenario 'chat'"):
        run_suite(perf_server.target("tiny"), load_suite("standard"), directory=tmp_path, only=["chat"])
    with pytest.raises(ResultsError):
        load_suite_result(tmp_path)


def test_the_documentation_lists_every_scenario_and_its_example_is_one(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{scenario.name}`" in page for scenario in load_suite("standard").scenarios)
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    load_suite(scenario_file(tmp_path, "example", example))
