"""What tritonserver's log says: progress of loading, why a model was passed over, the end of it."""

from __future__ import annotations

import re
from pathlib import Path

_LOADING = re.compile(rb'"loading: (\S+):(\d+)"')
_LOADED = re.compile(rb"\"(?:successfully|failed to) load(?:ed)? '([^']+)'\"")
_POLL_FAILED = re.compile(r"\"Poll failed for model directory '([^']+)': (.*)\"$", re.MULTILINE)
_PARSE_ERROR = re.compile(r"Error parsing text-format inference\.ModelConfig: (.*)$", re.MULTILINE)
_TABLE_LINE = re.compile(r"^[+|]|^\s*$")


class LoadProgress:
    """Follows the log of a server that is starting."""

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path
        self._offset = 0
        self._started: dict[str, None] = {}
        self._ended: set[str] = set()

    def update(self) -> float | None:
        """The fraction of models that are done, or None before the first is known."""
        with self._log_path.open("rb") as log:
            log.seek(self._offset)
            text = log.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        self._started.update(
            (match[1].decode(errors="replace"), None) for match in _LOADING.finditer(complete)
        )
        self._ended.update(match[1].decode(errors="replace") for match in _LOADED.finditer(complete))
        return len(self._ended) / len(self._started) if self._started else None

    @property
    def loading(self) -> tuple[str, ...]:
        """Models that began to load and did not end."""
        return tuple(name for name in self._started if name not in self._ended)

    @property
    def note(self) -> str:
        """One line for people."""
        if self.loading:
            return f"loading {', '.join(self.loading)}"
        return "loaded" if self._ended else "starting tritonserver"


def poll_failures(log_path: Path) -> dict[str, str]:
    """Why Triton passed over whole model directories, by name: a config.pbtxt that is missing or does not parse."""
    text = log_path.read_text(encoding="utf-8", errors="replace")
    reasons = {}
    start = 0
    for match in _POLL_FAILED.finditer(text):
        # protobuf prints where the text is wrong on a line of its own, just before.
        details = _PARSE_ERROR.findall(text, start, match.start())
        reasons[match[1]] = " ".join([match[2], *(f"({detail})" for detail in details)])
        start = match.end()
    return reasons


def explain_reason(reason: str) -> str:
    """A load failure's reason in a few lines; of a Python traceback the error and its innermost frames."""
    lines = [line.rstrip() for line in reason.strip().splitlines() if line.strip()]
    frames = [line for line in lines[1:] if "<frozen importlib" not in line]
    return "\n    ".join([lines[0], *(line.strip() for line in frames[:5])]) if lines else reason


def tail(log_path: Path, lines: int = 15) -> str:
    """The last lines of a log that say something, indented."""
    text = log_path.read_text(encoding="utf-8", errors="replace")
    said = [line for line in text.splitlines() if not _TABLE_LINE.match(line)]
    return "\n".join(f"  | {line[:300]}" for line in said[-lines:]) or "  (the log is empty)"
