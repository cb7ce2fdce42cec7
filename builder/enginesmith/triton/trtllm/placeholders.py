"""Finds what a template engine would have filled in and did not: ``${`` in a repository's text files.

TensorRT-LLM's backend reads ``${name}`` as a value like any other, or not at all, and says nothing.
"""

from __future__ import annotations

from pathlib import Path

from enginesmith.triton.placement import tree_files

_PLACEHOLDER = "${"
_CHECKED = frozenset({".pbtxt", ".py", ".json", ".yaml", ".yml", ".txt", ""})
# A vocabulary is not ours to judge: ${ is a token of every model that saw a shell script.
_VOCABULARY = frozenset({"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"})


def placeholders(repository: Path) -> list[str]:
    """Where ``${`` is, as ``file:line: text``."""
    found = []
    for file in tree_files(repository):
        if file.suffix not in _CHECKED or file.name in _VOCABULARY:
            continue
        for number, line in enumerate(
            file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1
        ):
            if _PLACEHOLDER in line:
                found.append(f"{file.relative_to(repository)}:{number}: {line.strip()[:80]}")
    return found
