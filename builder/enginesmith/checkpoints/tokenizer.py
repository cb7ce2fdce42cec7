"""The tokenizer files of a canonical checkpoint: copied where a fast tokenizer exists, converted where it can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from enginesmith.checkpoints.tensors import read_json_object
from enginesmith.errors import SourceError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
COPIED_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE, "special_tokens_map.json")
SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""What transformers can make a ``tokenizer.json`` from."""


def copy_tokenizer(source: Path, out: Path, *, copy: Callable[[Path, Path], None]) -> None:
    """Put the tokenizer of the checkpoint in ``source`` into ``out``: always a ``tokenizer.json``.

    A chat template inside ``tokenizer_config.json`` is also written to a file of its own, where servers look.

    Raises:
        SourceError: there is no tokenizer, or only a slow one that transformers cannot convert.
    """
    if (source / TOKENIZER_FILE).exists():
        read_json_object(source / TOKENIZER_FILE)
        for name in COPIED_FILES:
            if (source / name).exists():
                copy(source / name, out / name)
    elif any((source / name).exists() for name in ("tokenizer.model", "vocab.json")):
        _convert_slow_tokenizer(source, out)
    else:
        raise SourceError(
            f"{source} has no {TOKENIZER_FILE}",
            hint="copy tokenizer.json and tokenizer_config.json of the original model into the directory",
        )
    _extract_chat_template(out)


def _convert_slow_tokenizer(source: Path, out: Path) -> None:
    import transformers

    try:
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(out)
        reason = "transformers wrote none"
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
    if not (out / TOKENIZER_FILE).exists():
        raise SourceError(
            f"{source} has no {TOKENIZER_FILE} and its slow tokenizer cannot be converted: {reason}",
            hint="copy tokenizer.json of the original model into the directory",
        )


def _extract_chat_template(out: Path) -> None:
    """Write ``chat_template.jinja`` where only ``tokenizer_config.json`` holds the template, as older exporters did."""
    if (out / CHAT_TEMPLATE_FILE).exists() or not (out / TOKENIZER_CONFIG_FILE).exists():
        return
    match read_json_object(out / TOKENIZER_CONFIG_FILE).get("chat_template"):
        case str(template):
            (out / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
        case [*named]:
            for entry in named:
                match entry:
                    case {"name": "default", "template": str(template)}:
                        (out / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
