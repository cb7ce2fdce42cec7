"""Specs: strict, with messages that name the place and the remedy."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.errors import SpecError
from enginesmith.spec import ModelSpec
from enginesmith.spec_file import load_spec, parse_spec

MINIMAL = "name: m\nsource: {path: here}\nvariants: {a: {scheme: none}}\n"
WHEEL = "a" * 64


def _parse(text: str) -> ModelSpec:
    return parse_spec(text, origin="m.yaml", base_dir=Path("/specs"))


def test_first_spec_of_the_project_is_valid() -> None:
    spec = load_spec(Path(__file__).parents[2] / "models" / "smollm2-135m.yaml")
    assert set(spec.variants) == {"bf16", "int8-sq", "int8-wo", "int4-awq", "fp8"}
    assert spec.triton_name("fp8") == "smollm2-135m-fp8"


def test_defaults_are_complete() -> None:
    spec = _parse(MINIMAL)
    assert spec.twin.mode == "fast"
    assert spec.serving.prompt_limit == 1023
    assert spec.resolve("x/../y") == Path("/specs/y")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL.replace("scheme", "sceme"), r"variants\.a\.sceme: unknown key; did you mean 'scheme'\?"),
        (
            MINIMAL + "serving: {max_batchsize: 4}",
            r"serving\.max_batchsize: unknown key; did you mean 'max_batch_size'",
        ),
        (MINIMAL + "zzz: 1", "zzz: unknown key; allowed here: calibration, name"),
        (
            MINIMAL + "serving: {dynamic_batching: {queue_policy: {max_queue: 1}}}",
            "did you mean 'max_queue_size'",
        ),
        (MINIMAL + "targets: [{runtime: onnxruntime, thread: 1}]", "did you mean 'threads'"),
        (MINIMAL.replace("none", "int3"), r"variants\.a\.scheme: .*'int4_awq'.* \(seen: 'int3'\)"),
        (MINIMAL + "serving: {max_batch_size: 0}", r"serving\.max_batch_size: .*greater.* \(seen: 0\)"),
        (
            MINIMAL + "serving: {max_batch_size: 4, dynamic_batching: {preferred_batch_sizes: [8]}}",
            r"\[8\] are not between",
        ),
        (MINIMAL + "serving: {max_sequence_length: 64, max_prompt_length: 64}", "an answer needs room"),
        (MINIMAL + "verify: {quality: {max_perplexity_increase: .nan}}", "finite"),
        (
            MINIMAL.replace("path: here", "path: here, hub: o/n"),
            "exactly one of path, hub and wheel; seen: path, hub",
        ),
        (MINIMAL.replace("path: here", "hub: o/n"), "hub and revision belong together"),
        (MINIMAL.replace("path: here", "hub: o/n, revision: main"), r"source\.revision"),
        (MINIMAL.replace("path: here", "wheel: m==1"), "wheel and sha256 belong together"),
        (MINIMAL.replace("path: here", f"wheel: m>=1, sha256: {WHEEL}"), r"source\.wheel"),
        (MINIMAL.replace("path: here", "path: here, member: x"), "for path, name the file itself"),
        (MINIMAL.replace("scheme: none", "scheme: fp8, group_size: 64"), "belongs to int4_awq"),
        (
            MINIMAL.replace("scheme: none", "scheme: int4_awq, group_size: 48"),
            "48 is not one of 32, 64, 128, 256",
        ),
        (
            MINIMAL.replace("scheme: none", "scheme: int8_sq, kv_cache: fp8"),
            "does not go with scheme int8_sq; allowed: none or int8",
        ),
        (MINIMAL.replace("{a:", "{A/b:"), "becomes part of a Triton model name"),
        (MINIMAL.replace("{a: {scheme: none}}", "{}"), "variants: .*at least 1"),
        (MINIMAL.replace("name: m\n", ""), "name: required key is missing"),
        (MINIMAL + "calibration: {corpus: {}}", "exactly one of builtin, file and dataset; seen: none"),
        (MINIMAL + "name: again", r"key 'name' is written twice(.|\n)*line 4"),
        (MINIMAL + "calibration: {seed: 2024-01-01}", "not plain text"),
        ("- a list", "must be a mapping of keys, seen: list"),
        ("a: [", "not valid YAML"),
        ("", "must be a mapping"),
    ],
)
def test_wrong_spec_is_explained(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        _parse(text)


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        _parse(MINIMAL.replace("none", "int3") + "serving: {instances: 0}\nextra: 1")
    assert caught.value.message.count("\n") == 3


def test_unreadable_spec_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read spec .*No such file"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(SpecError, match=r"not UTF-8: .* at byte 9"):
        load_spec(tmp_path / "latin.yaml")


def test_group_size_has_a_default_for_grouped_schemes_only() -> None:
    spec = _parse(MINIMAL.replace("{a: {scheme: none}}", "{a: {scheme: int4_awq}, b: {scheme: fp8}}"))
    assert spec.variants["a"].effective_group_size == 128
    assert spec.variants["b"].effective_group_size is None


@given(st.text())
def test_no_text_causes_anything_but_a_spec_error(text: str) -> None:
    with contextlib.suppress(SpecError):
        _parse(text)
