"""Messages for a wrong spec: what pydantic found, said in the words of the spec's author.

Knows pydantic's error records and the JSON Schema, not the spec's classes. Used by ``enginesmith.spec``.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic_core import ErrorDetails


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
    seen = problem["input"]
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
