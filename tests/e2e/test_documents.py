"""The reference documents say what the code does: every key of a spec, and every quoted message."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from enginesmith.cli import commands
from enginesmith.plan import Plan, make_plan
from enginesmith.spec_file import json_schema, parse_spec
from enginesmith.steps import STEP_KINDS
from enginesmith.store import ArtifactStore

ROOT = Path(__file__).parents[2]
SPEC_DOCUMENTS = {
    name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("spec.md", "graph-spec.md")
}
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SCHEMA: dict[str, Any] = json.loads(json_schema())
PARTS: dict[str, dict[str, Any]] = SCHEMA["$defs"]


def documented_keys() -> dict[tuple[str, str], list[str]]:
    """The cells of every table row of the specs' documents, by part and key."""
    rows: dict[tuple[str, str], list[str]] = {}
    part = ""
    for line in "\n".join(SPEC_DOCUMENTS.values()).splitlines():
        if heading := re.fullmatch(r"##+ (?:.*: )?`(\w+)`", line):
            part = heading[1]
        elif (row := re.match(r"\| `(\w+)` \|", line)) and part:
            assert (part, row[1]) not in rows, f"{part}.{row[1]} is documented twice"
            rows[part, row[1]] = [cell.strip() for cell in line.strip("|").split("|")]
    return rows


KEYS = documented_keys()


def test_every_key_is_documented_and_every_documented_key_exists() -> None:
    assert set(KEYS) == {(part, key) for part, schema in PARTS.items() for key in schema["properties"]}


@pytest.mark.parametrize(("part", "key"), KEYS)
def test_documented_default_is_the_default(part: str, key: str) -> None:
    schema = PARTS[part]
    default = schema["properties"][key].get("default", "required")
    cell = KEYS[part, key][2]
    assert (cell == "required") == (key in schema.get("required", ()))
    if default is None or (isinstance(default, (bool, int, float, list)) and key != "targets"):
        assert cell == f"`{json.dumps(default)}`"
    elif isinstance(default, str) and default != "required":
        assert cell == f'`"{default}"`'
    for number in re.findall(r"\d\.\d+", cell):
        assert number in json.dumps(default), "a limit of a group"


def test_rows_are_complete_and_name_steps_that_exist() -> None:
    kinds = {*STEP_KINDS, "nothing", "the same", "see there", ""}
    for place, cells in KEYS.items():
        assert len(cells) == 6, place
        first = re.split(r" or |,| \(", cells[5])[0]
        assert first in kinds, f"{place} runs again from {cells[5]!r}"


DEPLOYED: Mapping[str, Any] = {
    "name": "tiny",
    "source": {"wheel": "some-model==1", "sha256": "0" * 64},
    "variants": {"fp8": {"scheme": "fp8"}},
}
OF_TARGET = {
    "OnnxRuntimeTarget": ("onnxruntime", {"package", "rehearse"}),
    "TensorRtLlmTarget": (
        "tensorrt_llm",
        {"convert", "assemble", "rehearse_trtllm", "compile", "package_trtllm"},
    ),
    "LlmApiTarget": ("tensorrt_llm_llmapi", {"package_llmapi", "rehearse_llmapi"}),
}
# Where a part stands in a spec, and which targets read it.
PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "TensorRtLlmTarget": (("target",), ("TensorRtLlmTarget",)),
    "LlmApiTarget": (("target",), ("LlmApiTarget",)),
    "Parallelism": (("target", "parallelism"), ("TensorRtLlmTarget", "LlmApiTarget")),
    "KvCachePool": (("target", "kv_cache"), ("TensorRtLlmTarget", "LlmApiTarget")),
    "KvCacheMemory": (("target", "kv_cache"), ("OnnxRuntimeTarget",)),
    "Nccl": (("target", "nccl"), ("TensorRtLlmTarget", "LlmApiTarget")),
    "Plugins": (("target", "plugins"), ("TensorRtLlmTarget",)),
    "Serving": (("serving",), tuple(OF_TARGET)),
    "DynamicBatching": (("serving", "dynamic_batching"), tuple(OF_TARGET)),
    "QueuePolicy": (("serving", "dynamic_batching", "queue_policy"), tuple(OF_TARGET)),
}
# What the documented example needs beside it to be legal, before and after the edit.
BESIDE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("TensorRtLlmTarget", "devices"): {"parallelism": {"tensor": 2}, "launch": "orchestrator"},
    ("LlmApiTarget", "devices"): {"parallelism": {"tensor": 2}},
    ("Parallelism", "expert"): {"parallelism": {"tensor": 2}},
    ("Plugins", "use_paged_context_fmha"): {"kv_cache": {"reuse": False}, "chunked_context": False},
    ("Plugins", "reduce_fusion"): {"parallelism": {"tensor": 2}},
    ("Plugins", "user_buffer"): {"parallelism": {"tensor": 2}, "plugins": {"reduce_fusion": True}},
}


# Neither tools nor code differ between the two plans that are compared.
KINDS = {name: replace(kind, tools=(), code=()) for name, kind in STEP_KINDS.items()}


def planned(directory: Path, target: Mapping[str, Any], serving: Mapping[str, Any]) -> Plan:
    return planned_document(directory, {**DEPLOYED, "targets": [target], "serving": serving})


def planned_document(directory: Path, document: Mapping[str, Any]) -> Plan:
    spec = parse_spec(yaml.safe_dump(document), origin="test", base_dir=directory)
    store = ArtifactStore(directory / "store")
    try:
        return make_plan(spec, store, kinds=KINDS)
    finally:
        store.digests.close()


def edited(document: Any, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = path
    inside = edited(document.get(first, {}), tuple(rest), value) if rest else value
    return {**document, first: inside}


EDITS = [
    pytest.param(part, key, reader, id=f"{part}.{key} {reader}")
    for (part, key), cells in KEYS.items()
    if part in PLACES and cells[5] not in ("", "see there")
    for reader in PLACES[part][1]
]


@pytest.mark.parametrize(("part", "key", "reader"), EDITS)
def test_edit_runs_again_from_the_documented_step(tmp_path: Path, part: str, key: str, reader: str) -> None:
    """The edit is the documented example."""
    runtime, kinds = OF_TARGET[reader]
    cells = KEYS[part, key]
    base = {"target": {"runtime": runtime, **BESIDE.get((part, key), {})}, "serving": {}}
    value = yaml.safe_load(cells[4].strip("`"))
    after = edited(base, (*PLACES[part][0], key), value)
    known = {step.key for step in planned(tmp_path, base["target"], base["serving"]).steps}
    steps = planned(tmp_path, after["target"], after["serving"]).steps
    changed = [step.kind for step in steps if step.key not in known]
    named = [word for word in re.split(r", | or ", cells[5]) if word in kinds]
    assert changed[:1] == named


GRAPH: Mapping[str, Any] = {
    "name": "tiny",
    "task": "embedding",
    "source": {"wheel": "some-model==1", "sha256": "0" * 64},
    "variants": {"some": {"scheme": "int8"}},
    "targets": [{"runtime": "onnxruntime"}],
}
MODULE: Mapping[str, Any] = {
    "name": "tiny",
    "task": "tensors",
    "source": {"module": "first.py:make", "files": []},
    "inputs": [{"name": "input", "shape": ["batch", "height", "width"], "low": -2}],
    "outputs": ["output"],
    "axes": {"height": {"min": 1, "opt": 100, "max": 300}, "width": {"max": 300}},
    "variants": {"some": {"scheme": "int8"}},
}
RTX = {**GRAPH, "targets": [{"runtime": "tensorrt_rtx"}]}
TENSORRT = {**GRAPH, "targets": [{"runtime": "tensorrt", "gpu": "a100"}]}
# Where a part stands in a graph spec, and the spec that its keys are edited in.
GRAPH_PLACES: Mapping[str, tuple[tuple[str | int, ...], Mapping[str, Any]]] = {
    "GraphSpec": ((), GRAPH),
    "GraphInput": (("inputs", 0), MODULE),
    "Axis": (("axes", "height"), MODULE),
    "Samples": (("calibration",), GRAPH),
    "GraphLimits": (("verify", "quality"), GRAPH),
    "GraphVariant": (("variants", "some"), GRAPH),
    "GraphServing": (("serving",), GRAPH),
    "GraphOnnxRuntimeTarget": (("targets", 0), GRAPH),
    "TensorRtTarget": (("targets", 0), TENSORRT),
    "TensorRtRtxTarget": (("targets", 0), RTX),
}
# Edits that need another spec to have a meaning, or to be legal before and after.
GRAPH_SPECS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("GraphSpec", "outputs"): MODULE,
    ("GraphSpec", "probabilities"): {**GRAPH, "task": "classification"},
    ("GraphLimits", "min_top1_agreement"): {**GRAPH, "task": "classification"},
    ("GraphLimits", "min_rank_correlation"): {**GRAPH, "task": "reranking"},
    ("GraphServing", "pad_to"): {**GRAPH, "serving": {"max_sequence_length": 256}},
    ("GraphOnnxRuntimeTarget", "backend"): {**GRAPH, "variants": {"some": {"scheme": "none"}}},
    ("GraphOnnxRuntimeTarget", "provider_options"): {
        **GRAPH,
        "targets": [{"runtime": "onnxruntime", "provider": "tensorrt"}],
    },
    ("Samples", "file"): MODULE,
}
GRAPH_EDITS = [
    pytest.param(part, key, id=f"{part}.{key}")
    for (part, key), cells in KEYS.items()
    if part in GRAPH_PLACES and cells[4] and cells[5] not in ("", "see there")
]


def edited_inside(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(first, int):
        entries = list(document)
        entries[first] = edited_inside(entries[first], tuple(rest), value)
        return entries
    return {**document, first: edited_inside(document.get(first, {}), tuple(rest), value)}


@pytest.mark.parametrize(("part", "key"), GRAPH_EDITS)
def test_edit_of_a_graph_spec_runs_again_from_the_documented_step(
    tmp_path: Path, part: str, key: str
) -> None:
    """The edit is the documented example."""
    for name in ("first.py", "net.py", "weights.pt", "inputs.npz"):
        (tmp_path / name).write_text(name)
    place, base = GRAPH_PLACES[part]
    base = GRAPH_SPECS.get((part, key), base)
    cells = KEYS[part, key]
    value = yaml.safe_load(cells[4].strip("`"))
    known = {step.key for step in planned_document(tmp_path, base).steps}
    after = planned_document(tmp_path, edited_inside(base, (*place, key), value))
    changed = [step.kind for step in after.steps if step.key not in known]
    named = [word for word in re.split(r", | or ", cells[5]) if word != "nothing"]
    assert changed[:1] == (named[:1] if "tensorrt" not in str(base.get("targets", "")) else named[-1:])


def anchors_of(document: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", SPEC_DOCUMENTS)
def test_links_in_the_specs_documents_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", SPEC_DOCUMENTS[document]):
        file, _, anchor = target.partition("#")
        assert not file or (ROOT / "docs" / file).is_file(), target
        text = (ROOT / "docs" / (file or document)).read_text() if anchor else ""
        assert not anchor or anchor in anchors_of(text), target


@pytest.mark.parametrize("document", SPEC_DOCUMENTS)
def test_example_specs_are_valid_and_edit_something_in_every_part(tmp_path: Path, document: str) -> None:
    edited_keys: set[str] = set()
    for example in re.findall(r"```yaml\n(.*?)```", SPEC_DOCUMENTS[document], re.DOTALL):
        spec = parse_spec(example, origin=document, base_dir=tmp_path)
        assert yaml.safe_load(example)["variants"].keys() == spec.variants.keys()
        edited_keys |= spec.model_fields_set
    everything = set(type(spec).model_fields) - {"task", "probabilities"}
    assert edited_keys | {"task"} == everything | {"task"}


def quoted_messages() -> list[str]:
    """What stands in code in the first cell of every row; ``...`` is a value."""
    cells = re.findall(r"^\| (`[^|]+) \|", TROUBLESHOOTING, re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def source_strings() -> Iterator[str]:
    """Every string in the source, its values replaced by NUL."""
    for package in ("builder/enginesmith", "client/enginesmith_client"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values
                    )


STRINGS = tuple(source_strings())


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_message_exists(message: str) -> None:
    pattern = re.compile(".+".join(re.escape(part.strip()) for part in message.split("...")))
    assert any(pattern.search(text) for text in STRINGS), message


def test_messages_are_quoted_once() -> None:
    messages = quoted_messages()
    assert len(messages) > 50
    assert len(messages) == len(set(messages))


def documented_commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of enginesmith that stands on a line of its own: where, and its arguments."""
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *(ROOT / "models").glob("*.yaml"),
    ):
        for line in path.read_text(encoding="utf-8").splitlines():
            if found := re.match(r"(?:    |\.venv/bin/|# .*: )enginesmith (.*)", line):
                command = re.split(r" {4,}| [>&|] ?", found[1])[0]
                yield path.name, shlex.split(command, comments=True)


@pytest.mark.parametrize(("document", "arguments"), list(documented_commands()))
def test_documented_command_line_is_one_that_the_program_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engines").mkdir()  # Where the documents say that compiled engines are.
    with commands.make_context("enginesmith", list(arguments)) as context:
        # The group leaves everything behind its own options to the verb.
        verb, command, rest = commands.resolve_command(context, arguments)
        assert command is not None
        try:
            command.make_context(verb, rest, parent=context).close()
        except click.ClickException as error:
            pytest.fail(f"{document}: enginesmith {shlex.join(arguments)}: {error.format_message()}")


def test_readme_shows_every_verb_of_tensorrt_llm_and_every_document() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {arguments[0] for document, arguments in documented_commands() if document == "README.md"}
    assert {"plan", "rehearse", "trtllm-command", "build", "serve", "doctor"} <= shown
    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in readme, path.name
    assert "Not yet run on a GPU" in readme


DOCUMENTS = (
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "client")),
    *sorted((ROOT / "docs").glob("*.md")),
)


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS])
def test_links_lead_to_headings_of_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file.read_text(encoding="utf-8")), target


def test_promises_name_tests_and_benchmarks_that_exist() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Promises")[2]
    named = re.findall(r"`((?:tests|benchmarks)/[^`]+)`", table.partition("## ")[0])
    assert named
    for name in named:
        assert list(ROOT.glob(name)), name


def test_tree_in_the_readme_names_what_exists() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2].partition("## ")[0]
    above = ROOT
    for line in filter(None, tree.splitlines()):
        nested = line.startswith(" " * 8)
        names = [
            word
            for word in re.split(r" {2,}", line.strip())[0].split()
            if re.fullmatch(r"[\w*./-]+(/|\.\w+)|Makefile", word)
        ]
        assert names, line
        for name in names:
            assert list((above if nested else ROOT).glob(name)), name
        above = above if nested else ROOT / names[0]
