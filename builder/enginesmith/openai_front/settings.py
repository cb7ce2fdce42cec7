"""What the front is told when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from enginesmith.errors import OperatorError


@dataclass(frozen=True)
class FrontSettings:
    """Limits and names of one front."""

    triton_urls: tuple[str, ...]
    timeout_s: float = 120.0
    """Longest time from a request to the end of its answer."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Callers must send one of these; none: anybody may call."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of models, to the names that Triton serves."""
    chat_templates: Mapping[str, Path] = field(default_factory=dict)
    """For models that render no messages themselves: the directory with the template of each."""
    default_max_tokens: int | None = None
    """Sent for chats that name no limit; None: the model decides."""
    max_request_bytes: int = 16 << 20
    max_generations: int = 256
    """Answers that may be generated at once, over all requests; each choice of each prompt is one."""
    read_timeout_s: float = 30.0
    """Longest time in which the body of a request must arrive, and each piece of an answer be taken."""
    drain_s: int = 30
    """How long answers may still take after SIGTERM."""


def api_keys_from_file(path: Path) -> tuple[str, ...]:
    """The keys in a file: one a line; empty lines and lines that begin with # do not count.

    Raises:
        OperatorError: the file cannot be read, or has no keys, or one that no header can carry.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"the API keys in {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise OperatorError(
            f"{path} has no API keys",
            hint="write one a line, or leave --api-key-file out to let anybody call",
        )
    for number, key in enumerate(keys, start=1):
        if not all("!" <= character <= "~" for character in key):
            raise OperatorError(
                f"key {number} of {path} has characters that an Authorization header cannot carry",
                hint="use printable ASCII without spaces",
            )
    return keys
