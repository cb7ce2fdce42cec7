"""Reads specs from YAML and says what is wrong with one, in the words of its author.

The key ``task`` says which kind of spec it is: ``text-generation`` (the default) or one of a model that one ONNX graph
computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema

from enginesmith.errors import SpecError
from enginesmith.graph_spec import GRAPH_TASKS, GraphSpec
from enginesmith.spec import ModelSpec
from enginesmith.spec_errors import explain_problem, without_echoes

Spec = ModelSpec | GraphSpec
_TASKS = ("text-generation", *GRAPH_TASKS)


def load_spec(path: Path) -> Spec:
    """The checked spec in the YAML file at ``path``.

    Raises:
        SpecError: the file is missing, not YAML, or not a valid spec; every problem is listed with its location.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(
            f"cannot read spec {path}: {error.strerror}",
            hint="give the path of a YAML file, e.g. models/smollm2-135m.yaml",
        ) from error
    except UnicodeDecodeError as error:
        raise SpecError(f"spec {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    spec = parse_spec(text, origin=str(path), base_dir=path.resolve().parent)
    spec._path = path.resolve()
    return spec


def parse_spec(text: str, *, origin: str, base_dir: Path) -> Spec:
    """The checked spec in a YAML text; ``origin`` is named in messages."""
    try:
        document = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise SpecError(f"{origin} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise SpecError(f"{origin} must be a mapping of keys, seen: {type(document).__name__}")
    kind = _kind_of(document, origin)
    try:
        spec = kind.model_validate_json(json.dumps(document))
    except ValidationError as error:
        schema = kind.model_json_schema()
        problems = "\n".join(explain_problem(problem, schema) for problem in without_echoes(error.errors()))
        raise SpecError(f"{origin} is not a valid spec:\n{problems}") from error
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"{origin} holds a value that is not plain text, number, list or mapping: {error}"
        ) from error
    spec._base_dir = base_dir
    return spec


def _kind_of(document: dict[str, Any], origin: str) -> type[ModelSpec] | type[GraphSpec]:
    task = document.get("task", _TASKS[0])
    if task not in _TASKS:
        raise SpecError(
            f"{origin} is not a valid spec:\n  task: unknown task {task!r}; allowed: {', '.join(_TASKS)}"
        )
    return ModelSpec if task == _TASKS[0] else GraphSpec


def json_schema() -> str:
    """The JSON Schema of a spec, as committed in ``docs/spec.schema.json``."""
    reference = "#/$defs/{model}"
    _, schema = models_json_schema(
        [(ModelSpec, "validation"), (GraphSpec, "validation")], ref_template=reference
    )
    is_graph = {"properties": {"task": {"enum": list(GRAPH_TASKS)}}, "required": ["task"]}
    schema |= {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "enginesmith spec",
        "if": is_graph,
        "then": {"$ref": reference.format(model="GraphSpec")},
        "else": {"$ref": reference.format(model="ModelSpec")},
    }
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key may be written once; the plain loader keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
