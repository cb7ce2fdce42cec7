"""The tokenizer files of a canonical checkpoint: copied where a fast tokenizer exists, converted where it can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from enginesmith.checkpoints.tensors import read_json_object
from enginesmith.errors import SourceError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
COPIED_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE, "special_tokens_map.json")
SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""What transformers can make a ``tokenizer.json`` from."""
MODULES_FILE = "modules.json"
SENTENCE_FILES = (MODULES_FILE, "sentence_bert_config.json", "config_sentence_transformers.json")
"""What sentence-transformers writes beside a model; each module but the first has a directory with a config.json."""


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


def copy_sentence_transformer(source: Path, out: Path, *, copy: Callable[[Path, Path], None]) -> None:
    """Put what makes an encoder a sentence-transformers model into ``out``, where the checkpoint in ``source`` is one.

    Raises:
        SourceError: ``modules.json`` is damaged or names a directory that is not inside of ``source``.
    """
    if not (source / MODULES_FILE).exists():
        return
    settings = [f"{path}/config.json" for _, path in read_modules(source) if path]
    for name in (*SENTENCE_FILES, *settings):
        if (source / name).exists():
            (out / name).parent.mkdir(exist_ok=True)
            copy(source / name, out / name)


def read_modules(directory: Path) -> list[tuple[str, str]]:
    """The type and the path of each module that ``modules.json`` lists, in order; the path is '' or one name.

    Raises:
        SourceError: it is damaged, or a path leads elsewhere.
    """
    path = directory / MODULES_FILE
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(entry["type"]), str(entry["path"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path} is not as sentence-transformers writes it: {error}",
            hint="copy it from the original model, or remove it and set pooling and normalize in the spec",
        ) from error
    for _, name in modules:
        if name and (PurePosixPath(name).parts != (name,) or name == ".."):
            raise SourceError(
                f"{path} names {name!r}, which is not a directory beside it", hint="do not trust this model"
            )
    return modules


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
