"""Plans: what changes a key, what does not, and what the explanation says."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_steps import HF_CONFIG, KINDS

from enginesmith.errors import SourceError, SpecError
from enginesmith.plan import Plan, make_plan
from enginesmith.plan_steps import MISSING_TOOL, canonical_json, step_key
from enginesmith.records import remember_build
from enginesmith.spec_file import load_spec
from enginesmith.steps import STEP_KINDS, StepKind, StepName
from enginesmith.store import ArtifactStore

Document = dict[str, Any]
Changed = set[tuple[str, str | None]]

BASE: Document = {
    "name": "tiny",
    "source": {"path": "checkpoint"},
    "variants": {
        "plain": {"scheme": "none"},
        "sq": {"scheme": "int8_sq"},
        "wo": {"scheme": "int8_wo"},
        "awq": {"scheme": "int4_awq", "group_size": 32},
        "fp8": {"scheme": "fp8"},
    },
}
VARIANTS = tuple(BASE["variants"])
QUANTIZED = ("sq", "wo", "awq", "fp8")
CALIBRATED = ("sq", "awq", "fp8")
FROM_QUANTIZE = ("quantize", "reference", "lower", "measure", "verify", "package", "rehearse")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    store = ArtifactStore(tmp_path / "store")
    yield store
    store.digests.close()


@pytest.fixture
def planned(tmp_path: Path, store: ArtifactStore) -> Callable[..., Plan]:
    """Plans the base document after a change to it and to its checkpoint."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(HF_CONFIG))
    (tmp_path / "text.txt").write_text("one\n\ntwo")

    def plan(
        change: Mapping[str, Any] | None = None,
        *,
        kinds: Mapping[StepName, StepKind] = KINDS,
        variants: list[str] | None = None,
        server: str | None = None,
    ) -> Plan:
        spec = tmp_path / "spec.yaml"
        spec.write_text(yaml.safe_dump(_merged(BASE, change or {}), sort_keys=False))
        return make_plan(load_spec(spec), store, kinds=kinds, variants=variants, server=server)

    return plan


def _merged(document: Any, change: Mapping[str, Any]) -> Document:
    """A change replaces what it names; a value of None removes it."""
    merged = dict(document)
    for name, value in change.items():
        known = merged.get(name)
        merged[name] = (
            _merged(known, value) if isinstance(value, Mapping) and isinstance(known, Mapping) else value
        )
    return {name: value for name, value in merged.items() if value is not None}


def _changed(before: Plan, after: Plan) -> Changed:
    keys = {(step.kind, step.variant): step.key for step in before.steps}
    return {(step.kind, step.variant) for step in after.steps if keys[step.kind, step.variant] != step.key}


def _all(kinds: tuple[str, ...], variants: tuple[str, ...]) -> Changed:
    return {(kind, variant) for kind in kinds for variant in variants}


def _variant(name: str, **change: Any) -> Document:
    return {"variants": {name: change}}


AFTER_MEASURE = ("measure", "verify", "package", "rehearse")
REFERENCES: Changed = {("reference", None)} | _all(("reference",), QUANTIZED)

MATRIX: dict[str, tuple[Document, Changed]] = {
    "serving": ({"serving": {"max_batch_size": 4}}, _all(("package", "rehearse"), VARIANTS)),
    "queue delay means nothing in flight": (
        {"serving": {"dynamic_batching": {"max_queue_delay_us": 1}}},
        set(),
    ),
    "queue size": (
        {"serving": {"dynamic_batching": {"queue_policy": {"max_queue_size": 8}}}},
        _all(("package", "rehearse"), VARIANTS),
    ),
    "key/value memory": (
        {"targets": [{"runtime": "onnxruntime", "kv_cache": {"reuse_tokens": 64}}]},
        _all(("package", "rehearse"), VARIANTS),
    ),
    "prefill chunks": (
        {"targets": [{"runtime": "onnxruntime", "prefill_chunk_tokens": 128}]},
        _all(("package", "rehearse"), VARIANTS),
    ),
    "batch invariance": (
        {"targets": [{"runtime": "onnxruntime", "batch_invariant": False}]},
        _all(("package", "rehearse"), VARIANTS),
    ),
    "threads": (
        {"targets": [{"runtime": "onnxruntime", "threads": 2}]},
        _all(("package", "rehearse"), VARIANTS),
    ),
    "mode": (
        {"targets": [{"runtime": "onnxruntime", "mode": "exact"}]},
        _all(("lower", *AFTER_MEASURE), VARIANTS),
    ),
    "slo": ({"slo": {"ttft_ms": 5}}, set()),
    "sq alpha": (_variant("sq", alpha=0.7), _all(FROM_QUANTIZE, ("sq",))),
    "awq alpha means nothing": (_variant("awq", alpha=0.7), set()),
    "awq alpha_step": (_variant("awq", alpha_step=0.2), _all(FROM_QUANTIZE, ("awq",))),
    "sq alpha_step means nothing": (_variant("sq", alpha_step=0.2), set()),
    "awq group": (_variant("awq", group_size=64), _all(FROM_QUANTIZE, ("awq",))),
    "fp8 kv": (_variant("fp8", kv_cache="fp8"), _all(FROM_QUANTIZE, ("fp8",))),
    "exclude": (_variant("wo", exclude=["*.down_proj"]), _all(FROM_QUANTIZE, ("wo",))),
    "calibration": ({"calibration": {"samples": 8}}, _all(FROM_QUANTIZE, CALIBRATED)),
    "own calibration": (_variant("fp8", calibration={"seed": 3}), _all(FROM_QUANTIZE, ("fp8",))),
    "plain calibration means nothing": (_variant("plain", calibration={"seed": 3}), set()),
    "calibration text": (
        {"calibration": {"corpus": {"file": "text.txt"}}},
        _all(FROM_QUANTIZE, CALIBRATED),
    ),
    "evaluation tokens": ({"verify": {"tokens": 512}}, REFERENCES | _all(AFTER_MEASURE, VARIANTS)),
    "probe": ({"verify": {"probe_tokens": 9}}, _all(AFTER_MEASURE, VARIANTS)),
    "quality": (
        {"verify": {"quality": {"min_top1_agreement": 0.5}}},
        _all(("verify", "package", "rehearse"), VARIANTS),
    ),
    "lowering limit": (
        {"verify": {"lowering": {"max_logit_delta": 9}}},
        _all(("verify", "package", "rehearse"), VARIANTS),  # "plain" may come quantized.
    ),
    "baseline limit": (
        {"verify": {"baseline": {"max_logit_delta": 9}}},
        _all(("verify", "package", "rehearse"), ("plain",)),
    ),
    "variant quality": (
        _variant("sq", quality={"min_top1_agreement": 0.1}),
        _all(("verify", "package", "rehearse"), ("sq",)),
    ),
    "repetition": (
        {"verify": {"max_repeated_run": 9}},
        _all(("verify", "package", "rehearse"), VARIANTS),
    ),
}


@pytest.mark.parametrize(("change", "expected"), MATRIX.values(), ids=MATRIX)
def test_edit_changes_exactly_these_steps(
    planned: Callable[..., Plan], change: Document, expected: Changed
) -> None:
    assert _changed(planned(), planned(change)) == expected


def test_edited_checkpoint_changes_everything(planned: Callable[..., Plan], tmp_path: Path) -> None:
    before = planned()
    (tmp_path / "checkpoint" / "tokenizer.json").write_text("{}")
    assert len(_changed(before, planned())) == len(before.steps)


def test_edited_text_file_changes_what_reads_it(planned: Callable[..., Plan], tmp_path: Path) -> None:
    change = {"calibration": {"corpus": {"file": "text.txt"}}}
    before = planned(change)
    (tmp_path / "text.txt").write_text("other")
    assert _changed(before, planned(change)) == _all(FROM_QUANTIZE, CALIBRATED)


def test_place_of_the_files_does_not_matter(planned: Callable[..., Plan], tmp_path: Path) -> None:
    before = planned({"calibration": {"corpus": {"file": "text.txt"}}})
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    (tmp_path / "text.txt").rename(tmp_path / "renamed.txt")
    after = planned({"source": {"path": "moved"}, "calibration": {"corpus": {"file": "renamed.txt"}}})
    assert _changed(before, after) == set()
    assert after.steps[0].params["location"]["path"] == str(tmp_path / "moved")


def test_server_does_not_change_a_key(planned: Callable[..., Plan]) -> None:
    before, after = planned(), planned(server="/opt/tritonserver")
    assert _changed(before, after) == set()
    assert after.step("rehearse", "sq").params["server"] == "/opt/tritonserver"


def test_tool_version_and_own_code_change_the_steps_that_use_them(planned: Callable[..., Plan]) -> None:
    with_tool = {**KINDS, "lower": replace(KINDS["lower"], tools=("click",))}
    other_code = {**KINDS, "lower": replace(KINDS["lower"], code=("enginesmith.schemes",))}
    expected = _all(("lower", *AFTER_MEASURE), VARIANTS)
    assert _changed(planned(), planned(kinds=with_tool)) == expected
    assert _changed(planned(), planned(kinds=other_code)) == expected


def test_missing_tool_is_part_of_the_plan(planned: Callable[..., Plan]) -> None:
    kinds = {**KINDS, "lower": replace(KINDS["lower"], tools=("no-such-distribution",))}
    assert planned(kinds=kinds).step("lower", "sq").tools == {"no-such-distribution": MISSING_TOOL}


def test_graph_connects_the_steps_as_documented(planned: Callable[..., Plan]) -> None:
    plan = planned()
    places = {step.key: (step.kind, step.variant) for step in plan.steps}
    inputs = {
        (step.kind, step.variant): {role: places[key] for role, key in step.inputs.items()}
        for step in plan.steps
    }
    assert inputs["measure", "sq"] == {
        "engine": ("lower", "sq"),
        "reference": ("reference", "sq"),
        "baseline": ("reference", None),
        "checkpoint": ("fetch", None),
    }
    assert (
        inputs["measure", "plain"]["reference"]
        == inputs["measure", "plain"]["baseline"]
        == ("reference", None)
    )
    assert inputs["lower", "sq"] == {"checkpoint": ("quantize", "sq")}
    assert inputs["lower", "plain"] == {"checkpoint": ("fetch", None)}
    assert inputs["reference", "sq"] == {"checkpoint": ("quantize", "sq"), "tokenizer": ("fetch", None)}
    assert inputs["package", "sq"] == {
        "engine": ("lower", "sq"),
        "verdict": ("verify", "sq"),
        "checkpoint": ("fetch", None),
    }
    assert ("quantize", "plain") not in inputs
    done: set[str] = set()
    for step in plan.steps:
        assert done.issuperset(step.inputs.values()), "inputs come before users"
        done.add(step.key)


def test_subset_of_variants_has_the_same_keys(planned: Callable[..., Plan]) -> None:
    assert planned(variants=["awq"]).variants == ("awq",)
    assert {step.key for step in planned(variants=["awq"]).steps} < {step.key for step in planned().steps}
    with pytest.raises(SpecError, match="no variant int4; it has: plain, sq"):
        planned(variants=["int4"])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"source": {"path": "nowhere"}}, SourceError, "nowhere does not exist"),
        ({"source": {"path": "text.txt"}}, SourceError, r"neither a directory nor a \.gguf"),
        (
            {"calibration": {"corpus": {"file": "no.txt"}}},
            SourceError,
            r"calibration\.corpus\.file .*no\.txt",
        ),
        (
            {"verify": {"corpus": {"dataset": "org/name"}}},
            SpecError,
            r"verify\.corpus\.dataset .* needs its revision",
        ),
        (
            _variant("awq", group_size=128),
            SpecError,
            r"128 does not divide the 64 inputs.*q_proj.*\n.*32 or 64",
        ),
        (_variant("sq", lm_head="scheme"), SpecError, "ties lm_head"),
        (
            {"serving": {"max_sequence_length": 4096}},
            SpecError,
            "max_sequence_length is 4096.* 2048 positions",
        ),
        ({"verify": {"window": 4096}}, SpecError, r"verify\.window is 4096"),
    ],
)
def test_what_cannot_be_built_is_refused_in_the_plan(
    planned: Callable[..., Plan], change: Document, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        planned(change)


def test_excluded_layers_need_no_group(planned: Callable[..., Plan]) -> None:
    blocks = ["*.self_attn.*", "*.gate_proj", "*.up_proj"]
    plan = planned(_variant("awq", group_size=128, exclude=blocks))
    assert plan.step("quantize", "awq").params["group_size"] == 128


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            SpecError,
            "GPT2LMHeadModel is not supported; supported: LlamaFor",
        ),
        ({"architectures": None}, SpecError, "none named"),
        (
            {"hidden_size": "large"},
            SourceError,
            "hidden_size must be a whole number of at least 1, seen: 'large'",
        ),
    ],
)
def test_unfit_checkpoint_is_refused_in_the_plan(
    planned: Callable[..., Plan], tmp_path: Path, config: Document, error: type[Exception], words: str
) -> None:
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({**HF_CONFIG, **config}))
    with pytest.raises(error, match=words):
        planned()


def test_directory_without_config_is_refused(planned: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / "config.json").unlink()
    with pytest.raises(SourceError, match=r"cannot read .*config\.json"):
        planned()


def _remember_all(store: ArtifactStore, plan: Plan) -> None:
    for step in plan.steps:
        remember_build(store, spec_name="tiny", place=step.place, kind=step.kind, parts=step.parts)


def _reasons(plan: Plan, store: ArtifactStore, kind: str, variant: str | None) -> tuple[str, ...]:
    return next(step.reasons for step in plan.explain(store) if (step.kind, step.variant) == (kind, variant))


def test_explanation_names_what_changed(planned: Callable[..., Plan], store: ArtifactStore) -> None:
    assert _reasons(planned(), store, "fetch", None) == ("never built",)
    _remember_all(store, planned())
    after = planned({"calibration": {"samples": 8}, "serving": {"max_batch_size": 4}})
    assert _reasons(after, store, "quantize", "sq") == ("params.calibration.samples: 16 → 8",)
    assert _reasons(after, store, "lower", "sq") == ("input quantize changed (checkpoint)",)
    assert _reasons(after, store, "package", "plain") == ("params.serving.max_batch_size: 16 → 4",)
    assert _reasons(after, store, "fetch", None) == ("the artifact is no longer in the store",)


def test_explanation_names_tools_and_code(planned: Callable[..., Plan], store: ArtifactStore) -> None:
    plan = planned()
    _remember_all(store, plan)
    step = plan.step("lower", "sq")
    before = {**step.parts, "tools": {"onnxruntime": "1.31"}, "code": {"tiny_steps": "0" * 64}}
    remember_build(store, spec_name="tiny", place="sq", kind="lower", parts=before)
    assert _reasons(plan, store, "lower", "sq") == (
        "tool onnxruntime 1.31 → (absent)",
        "enginesmith's code of this step changed (tiny_steps)",
    )


def test_plan_of_the_first_spec_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from enginesmith.spec_file import load_spec; from enginesmith.plan import make_plan\n"
        "from enginesmith.store import ArtifactStore\n"
        "make_plan(load_spec(Path(sys.argv[1])), ArtifactStore(Path(sys.argv[2])))\n"
        "print([name for name in ('torch', 'onnxruntime', 'numpy', 'transformers') if name in sys.modules])"
    )
    spec = Path(__file__).parents[2] / "models" / "smollm2-135m.yaml"
    done = subprocess.run(
        [sys.executable, "-c", script, spec, tmp_path / "s"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _reversed(document: Any) -> Any:
    if isinstance(document, dict):
        return {name: _reversed(document[name]) for name in reversed(document)}
    return [_reversed(item) for item in document] if isinstance(document, list) else document


@given(_JSON)
def test_canonical_json_ignores_the_order_of_keys_and_loses_nothing(document: Any) -> None:
    assert canonical_json(_reversed(document)) == canonical_json(document)
    assert json.loads(canonical_json(document)) == document


@given(st.dictionaries(st.text(), _JSON, max_size=3), st.dictionaries(st.text(), _JSON, max_size=3))
def test_keys_are_equal_exactly_when_the_parts_are(left: Document, right: Document) -> None:
    assert (step_key(left) == step_key(right)) == (canonical_json(left) == canonical_json(right))
    assert len(step_key(left)) == 64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_key_of_what_json_cannot_say_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        step_key({"value": value})


# Shapes of parameters (their values are in the key), and plumbing that writes no bytes of an artifact.
_BESIDE_THE_RESULT = {
    "enginesmith.checkpoints.config_kinds",
    "enginesmith.digests",
    "enginesmith.durable",
    "enginesmith.errors",
    "enginesmith.platforms",
    "enginesmith.schemes",
    "enginesmith.spec",
    "enginesmith.spec_errors",
    "enginesmith.graph_spec",
    "enginesmith.graph_targets",
    "enginesmith.spec_part",
    "enginesmith.steps",
    "enginesmith.targets",
}


@pytest.mark.parametrize("kind", STEP_KINDS.values(), ids=lambda kind: kind.name)
def test_every_module_that_a_step_imports_is_in_its_key(kind: StepKind) -> None:
    """Followed through the sources, imports inside functions included."""
    waiting, seen = [kind.function.split(":")[0]], set[str]()
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += imported_by(module)
    covered = tuple(f"{module}." for module in kind.code)
    assert {module for module in seen if not f"{module}.".startswith(covered)} <= _BESIDE_THE_RESULT


def imported_by(module: str) -> set[str]:
    """The modules of enginesmith that the source of ``module`` imports, but for annotations."""
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None, module
    names: set[str] = set()
    for node in walk(ast.parse(Path(found.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return {name for name in names if name.startswith("enginesmith.") and is_module(name)}


def walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from walk(child)


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
