"""Messages for a wrong spec: what pydantic found, said in the words of the spec's author.

Knows pydantic's error records and the JSON Schema, not the spec's classes. Used by ``enginesmith.spec``.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic_core import ErrorDetails


def without_echoes(problems: list[ErrorDetails]) -> list[ErrorDetails]:
    """``problems`` without those that only follow from one inside: a list is too short once its wrong entries are left out."""
    return [
        problem
        for problem in problems
        if problem["type"] != "too_short"
        or not any(
            len(other["loc"]) > len(problem["loc"]) and other["loc"][: len(problem["loc"])] == problem["loc"]
            for other in problems
        )
    ]


def explain_problem(problem: ErrorDetails, schema: dict[str, Any]) -> str:
    """One line for one validation problem: where, what was seen, what is allowed, and the likely intended key."""
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location) or "spec"
    if problem["type"] == "extra_forbidden":
        allowed = _allowed_keys(location[:-1], schema)
        close = difflib.get_close_matches(location[-1], allowed, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"allowed here: {', '.join(allowed)}"
        return f"  {where}: unknown key; {advice}"
    if problem["type"] == "missing":
        return f"  {where}: required key is missing"
    message = problem["msg"].removeprefix("Value error, ")
    seen, context = problem["input"], problem.get("ctx", {})
    key = str(context.get("discriminator")).strip("'")
    if problem["type"] == "union_tag_not_found":
        return f"  {where}: required key {key} is missing"
    if problem["type"] == "union_tag_invalid":
        allowed_tags = str(context["expected_tags"]).replace("'", "")
        return f"  {where}: unknown {key} {context['tag']!r}; allowed: {allowed_tags}"
    if problem["type"] == "string_type" and isinstance(seen, int | float):
        return f"  {where}: must be text (seen: {seen!r}); write it in quotes, YAML reads it as a number"
    shown = "" if isinstance(seen, (dict, list)) else f" (seen: {seen!r})"
    return f"  {where}: {message}{shown}"


def _allowed_keys(location: list[str], schema: dict[str, Any]) -> list[str]:
    """The keys of the part at ``location``, found by walking the JSON Schema."""
    node = schema
    for step in location:
        node = _resolve_reference(node, schema)
        if step.isdigit() and "items" in node:
            node = node["items"]
        elif step in node.get("discriminator", {}).get("mapping", {}):
            node = {"$ref": node["discriminator"]["mapping"][step]}
        elif step in node.get("properties", {}):
            node = node["properties"][step]
        elif isinstance(node.get("additionalProperties"), dict):
            node = node["additionalProperties"]
    return sorted(_resolve_reference(node, schema).get("properties", {}))


def _resolve_reference(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for option in node.get("anyOf", ()):
        if "$ref" in option:
            node = option
    if "$ref" in node:
        return dict(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
    return node
