"""Profiles as files: what is read, and what is said of a wrong one."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile import ClosedLoad, OpenLoad, Profile, TraceArrivals
from enginesmith_client.perf._profile_file import profile_from_file, profile_from_mapping, profile_schema
from enginesmith_client.perf.many._suite import BUILT_IN

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "bench-profile.md"


def in_file(directory: Path, text: str, name: str = "my Profile.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_profile_is_called_as_its_file_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert profile_from_file(in_file(tmp_path, "seed: 3")) == Profile(name="my-profile", seed=3)
    assert profile_from_file(in_file(tmp_path, "name: given")).name == "given"


def test_relative_paths_start_from_the_file(tmp_path: Path) -> None:
    text = "requests: {prompts_file: p.jsonl, tensors_file: /abs.json}\nload: {loop: open, arrivals: {kind: trace, file: t/a.jsonl}}"
    profile = profile_from_file(in_file(tmp_path, text))
    assert profile.requests.prompts_file == tmp_path / "p.jsonl"
    assert profile.requests.tensors_file == Path("/abs.json")
    assert isinstance(profile.load, OpenLoad)
    assert isinstance(profile.load.arrivals, TraceArrivals)
    assert profile.load.arrivals.file == tmp_path / "t" / "a.jsonl"


def test_what_is_left_out_has_its_default() -> None:
    profile = profile_from_mapping({"load": {"loop": "closed", "concurrency": 2}}, source="it")
    assert profile == Profile(load=ClosedLoad(concurrency=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lode: {}", "  lode: unknown key; did you mean 'load'?"),
        ("load: {loop: open, rate_per_s: 1, capacity_facto: 2}", "  load.capacity_facto: unknown key; did you mean 'capacity_factor'?"),
        ("requests: {prompt_tokens: {kind: normal, mean: 5, stdev: 1, hihg: 9}}", "  requests.prompt_tokens.hihg: unknown key; did you mean 'high'?"),
        ("requests: {prompt_tokens: {kind: unifrom}}", "  requests.prompt_tokens: unknown kind 'unifrom'; did you mean 'uniform'? allowed: fixed, uniform, normal, lognormal, empirical"),
        ("requests: {prompt_tokens: 64}", "  requests.prompt_tokens: must be a mapping of keys (seen: 64); write {kind: fixed, tokens: 64}"),
        ("requests: {prompt_tokens: {kind: uniform, low: 3, high: 2}}", "low must not be above high; seen: low 3, high 2"),
        ("requests: {prompt_tokens: {kind: uniform, low: 3}}", "  requests.prompt_tokens.high: required key is missing"),
        ("load: {concurrency: 4}", "  load: the key loop is missing; write {loop: closed, concurrency: 4}"),
        ("load: {loop: closed, concurrency: 0}", "  load.concurrency: must be greater than or equal to 1 (seen: 0)"),
        ("load: {loop: closed, concurrency: '4'}", "  load.concurrency: must be a whole number (seen: '4')"),
        ("load: {loop: open}", "give exactly one of rate_per_s and capacity_factor; seen: none"),
        ("load: {loop: open, rate_per_s: 5, arrivals: {kind: trace, file: a}}", "a trace has its own times; leave out rate_per_s"),
        ("measure: {window_s: true}", "  measure.window_s: must be a valid number (seen: True)"),
        ("measure: {window_s: 1.0e-12}", "  measure.window_s: must be greater than or equal to 0.01 (seen: 1e-12)"),
        ("start: warmm", "  start: must be 'warm' or 'cold' (seen: 'warmm')"),
        ("name: 5", "  name: must be text; write it in quotes, YAML reads it as something else (seen: 5)"),
        ("name: Ümlaut", "must be made of a-z, 0-9, '.', '_' and '-'"),
        ("description: 2026-01-01", "holds a value that is not plain text, finite number, list or mapping"),
        ("price: {per_hour: .inf}", "holds a value that is not plain text, finite number, list or mapping"),
        ("seed: 1\nseed: 2", "line 2, column 1: not valid YAML: the key 'seed' is written twice"),
        ("load: [1", "line 1, column 9: not valid YAML"),
        ("", "is empty"),
        ("- 1", "must be a mapping of keys; seen: list"),
    ],
)  # fmt: skip
def test_a_wrong_profile_is_an_error_in_its_authors_words(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ProfileError) as caught:
        profile_from_file(in_file(tmp_path, text))
    assert message in caught.value.message
    assert str(tmp_path / "my Profile.yaml") in caught.value.message


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ProfileError) as caught:
        profile_from_file(in_file(tmp_path, "seed: -1\nstart: x\nlode: 1"))
    assert caught.value.message.count("\n") == 3


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no\.yaml cannot be read: No such file"):
        profile_from_file(tmp_path / "no.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ProfileError, match="is not UTF-8: invalid start byte at byte 3"):
        profile_from_file(tmp_path / "bytes.yaml")


def test_the_committed_schema_is_current_and_takes_what_we_take() -> None:
    committed = (ROOT / "docs" / "bench-profile.schema.json").read_text(encoding="utf-8")
    assert committed == profile_schema(), "write profile_schema() to docs/bench-profile.schema.json"
    for path in BUILT_IN.glob("*/*.yaml"):
        jsonschema.validate(
            yaml.safe_load(path.read_text(encoding="utf-8"))["profile"], json.loads(committed)
        )


def test_the_profiles_in_the_documentation_are_valid(tmp_path: Path) -> None:
    examples = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        profile_from_file(in_file(tmp_path, example))


def test_every_key_is_in_the_documentation() -> None:
    page = PAGE.read_text(encoding="utf-8")
    parts = [Profile.model_json_schema(), *Profile.model_json_schema()["$defs"].values()]
    missing = {key for part in parts for key in part.get("properties", {}) if f"`{key}`" not in page}
    assert not missing
