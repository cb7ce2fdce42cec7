"""Prompts that a person wrote down: one JSON object a line, ``{"prompt": ..., "max_tokens": ...}``, the last optional."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginesmith_client._codec import text_bytes
from enginesmith_client._errors import InvalidInput
from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile_file import content_of

PROMPTS_FILE = "requests.prompts_file"
"""What the file is called in messages."""
_KEYS = ("prompt", "max_tokens")


@dataclass(frozen=True)
class WrittenPrompt:
    """One line."""

    prompt: str
    max_tokens: int | None = None


def read_prompts(path: Path) -> list[WrittenPrompt]:
    """Every line of the file; empty ones are left out.

    Raises:
        ProfileError: it cannot be read, or a line is not as it must be; names the line.
    """
    try:
        # Not ``splitlines``: JSON may hold other characters that end a line of text.
        lines = content_of(path, what=PROMPTS_FILE).decode().split("\n")
    except UnicodeDecodeError as error:
        raise ProfileError(
            f"{PROMPTS_FILE} {path} is not UTF-8: {error.reason} at byte {error.start}"
        ) from error
    prompts = [
        _prompt(line, where=f"{PROMPTS_FILE} {path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise ProfileError(f"{PROMPTS_FILE} {path} holds no prompts")
    return prompts


def _prompt(line: str, *, where: str) -> WrittenPrompt:
    form = 'a line is {"prompt": "...", "max_tokens": 32}, max_tokens optional'
    try:
        fields: Any = json.loads(line)
    except ValueError as error:
        raise ProfileError(f"{where}: not JSON ({error})", hint=form) from error
    if not isinstance(fields, dict) or "prompt" not in fields:
        raise ProfileError(f"{where}: there is no prompt; seen: {line[:60]}", hint=form)
    unknown = [key for key in fields if key not in _KEYS]
    if unknown:
        raise ProfileError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(_KEYS)}", hint=form)
    prompt, max_tokens = fields["prompt"], fields.get("max_tokens")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ProfileError(f"{where}: prompt must be text that is not empty; seen: {prompt!r}", hint=form)
    if max_tokens is not None and (
        isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or not 1 <= max_tokens < 2**31
    ):
        raise ProfileError(
            f"{where}: max_tokens must be a whole number from 1 on; seen: {max_tokens!r}", hint=form
        )
    try:
        text_bytes(prompt, what="prompt")
    except InvalidInput as error:
        raise ProfileError(f"{where}: {error.message}", hint=error.hint) from error
    return WrittenPrompt(prompt, max_tokens)
