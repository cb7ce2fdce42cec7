"""Reads profiles from YAML and says what is wrong with one, in the words of its author."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile import Part, Profile

Checked = TypeVar("Checked", bound=Part)

_FILES = (("requests", "prompts_file"), ("requests", "tensors_file"), ("load", "arrivals", "file"))
"""Keys that hold a path."""
_FORMS = {
    "prompt_tokens": "{kind: fixed, tokens: 64}",
    "output_tokens": "{kind: fixed, tokens: 64}",
    "arrivals": "{kind: poisson}",
    "load": "{loop: closed, concurrency: 4}",
}
"""What is written for keys that look as if a plain value would do."""


def profile_from_file(path: Path) -> Profile:
    """The checked profile in the YAML file at ``path``. Relative paths in it start from its directory.

    Without a ``name`` in it, it is called as the file is.

    Raises:
        ProfileError: the file is missing, not YAML, or not a valid profile; every problem is listed with its key.
    """
    data = document_from_file(path, what="profile")
    data.setdefault("name", name_of(path))
    return profile_from_mapping(data, source=f"profile {path}", directory=path.resolve().parent)


def profile_from_mapping(data: Mapping[str, Any], *, source: str, directory: Path | None = None) -> Profile:
    """The checked profile in plain YAML or JSON values.

    Args:
        source: what error messages call it.
        directory: where relative paths in it start; default: the working directory.

    Raises:
        ProfileError: it is not a valid profile; every problem is listed with its key.
    """
    return validated(
        Profile,
        _with_paths(dict(data), directory or Path()),
        source=f"{source} is not a valid profile",
        hint="docs/bench-profile.md explains every key",
    )


def validated(kind: type[Checked], data: Mapping[str, Any], *, source: str, hint: str) -> Checked:
    """``data`` as a part; ``source`` is how the error begins.

    Raises:
        ProfileError: it is not valid; every problem is listed with its key.
    """
    try:
        # JSON, because its values are those that YAML and JSON share; strict, because "4" is no number.
        return kind.model_validate_json(json.dumps(data, allow_nan=False), strict=True)
    except ValidationError as error:
        schema = kind.model_json_schema()
        problems = "\n".join(_explained(problem, schema) for problem in error.errors())
        raise ProfileError(f"{source}:\n{problems}", hint=hint) from error
    except (TypeError, ValueError) as error:
        raise ProfileError(
            f"{source}: it holds a value that is not plain text, finite number, list or mapping: {error}"
        ) from error


def profile_schema() -> str:
    """The JSON Schema of a profile, as committed in ``docs/bench-profile.schema.json``."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Profile.model_json_schema()
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def document_from_file(path: Path, *, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; ``what`` it should be is named in messages.

    Raises:
        ProfileError: the file is missing, empty, not YAML, or something else.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ProfileError(
            f"{what} {path} cannot be read: {error.strerror}", hint="give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"{what} {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ProfileError(f"{what} {path}{at}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ProfileError(f"{what} {path} is not valid YAML: {error}") from error
    if document is None:
        raise ProfileError(
            f"{what} {path} is empty", hint="give it keys: docs/bench-profile.md, docs/bench-scenarios.md"
        )
    if not isinstance(document, dict):
        raise ProfileError(f"{what} {path} must be a mapping of keys; seen: {type(document).__name__}")
    return document


def content_of(path: Path, *, what: str) -> bytes:
    """The bytes of a file that a profile names; ``what`` it is called in messages.

    Raises:
        ProfileError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProfileError(
            f"{what} {path} cannot be read: {error.strerror}",
            hint="paths in a profile are relative to the profile's directory",
        ) from error


def name_of(path: Path) -> str:
    """The name of a file as one of a profile: what is not allowed in it becomes a hyphen."""
    allowed = "".join(one if one.isascii() and (one.isalnum() or one in "_.-") else "-" for one in path.stem)
    return allowed.lower().lstrip("_.-")[:63] or "profile"


def _with_paths(data: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A copy of ``data`` in which paths are absolute."""
    for keys in _FILES:
        data = _with_path(data, keys, directory)
    return data


def _with_path(data: dict[str, Any], keys: tuple[str, ...], directory: Path) -> dict[str, Any]:
    key, inner = keys[0], data.get(keys[0])
    if len(keys) > 1:
        return data | {key: _with_path(inner, keys[1:], directory)} if isinstance(inner, dict) else data
    return data | {key: str((directory / inner).absolute())} if isinstance(inner, str) else data


def _explained(problem: ErrorDetails, schema: dict[str, Any]) -> str:
    """One line: which key, what was seen, what is allowed, and which key was probably meant."""
    steps = [str(part) for part in problem["loc"]]
    where, key = ".".join(_without_tags(steps, schema)) or "profile", steps[-1] if steps else ""
    kind, seen, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = sorted(_part_at(steps[:-1], schema)[0].get("properties", {}))
        close = difflib.get_close_matches(key, allowed, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"allowed here: {', '.join(allowed)}"
        return f"  {where}: unknown key; {advice}"
    if kind == "missing":
        return f"  {where}: required key is missing"
    if kind == "union_tag_not_found":
        return f"  {where}: the key {str(context['discriminator']).strip(chr(39))} is missing{_form(key)}"
    if kind == "union_tag_invalid":
        tags = str(context["expected_tags"]).replace("'", "")
        name = str(context["discriminator"]).strip("'")
        close = difflib.get_close_matches(str(context["tag"]), tags.split(", "), n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        return f"  {where}: unknown {name} {context['tag']!r}; {meant}allowed: {tags}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"  {where}: must be a mapping of keys (seen: {seen!r}){_form(key)}"
    shown = "" if isinstance(seen, (dict, list)) else f" (seen: {seen!r})"
    return f"  {where}: {_worded(problem)}{shown}"


def _worded(problem: ErrorDetails) -> str:
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "string_type" and isinstance(problem["input"], (int, float)):
        return "must be text; write it in quotes, YAML reads it as something else"
    if problem["type"] == "string_pattern_mismatch":
        return "must be made of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit"
    return message.replace("should be", "must be", 1).replace("valid integer", "whole number")


def _form(key: str) -> str:
    return f"; write {_FORMS[key]}" if key in _FORMS else ""


def _without_tags(steps: list[str], schema: dict[str, Any]) -> list[str]:
    """``steps`` without those that say which kind a part is: they are values of the file, not keys."""
    return [step for index, step in enumerate(steps) if not _part_at(steps[: index + 1], schema)[1]]


def _part_at(steps: list[str], schema: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The schema of the part at ``steps``, and whether the last step was the kind of a part."""
    node, was_kind = schema, False
    for step in steps:
        tags = node.get("discriminator", {}).get("mapping", {})
        was_kind = step in tags
        if was_kind:
            node = {"$ref": tags[step]}
        elif step in node.get("properties", {}):
            node = node["properties"][step]
        else:
            inner = node.get("additionalProperties")
            node = node.get("items", inner if isinstance(inner, dict) else {})
        node = _resolved(node, schema)
    return node, was_kind


def _resolved(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    node = next((option for option in node.get("anyOf", ()) if "$ref" in option), node)
    return dict(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]) if "$ref" in node else node


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key may be written once; the plain loader keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
