"""Names and texts out of a model as Python: identifiers, class names, literals. Pure.

Names of models and tensors come from files that anybody may have written: whatever is in them, nothing here can end a
literal or a docstring, and everything that it gives for an identifier is one.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping

from enginesmith.errors import SourceError

_PARAMETERS = {"self", "cls", "request_id", "timeout_s", "priority", "parameters", "answer", "answers"}
_GLOBALS = {"np", "npt", "given_arrays", "output_array", "from_result"}
RESERVED = frozenset(_PARAMETERS | _GLOBALS)
"""What the generated methods need for themselves."""


def identifier_from_name(name: str) -> str:
    """A parameter or field for a tensor: its own name where Python allows it, ASCII only."""
    kept = re.sub(r"[^0-9A-Za-z_]+", "_", name).lstrip("_")
    if not kept:
        return "tensor"
    if kept[0].isdigit():
        kept = f"tensor_{kept}"
    return f"{kept}_" if keyword.iskeyword(kept) or kept in RESERVED else kept


def identifiers_from_names(model: str, kind: str, names: Iterable[str]) -> dict[str, str]:
    """The identifier of each name.

    Raises:
        SourceError: two names have the same one.
    """
    found = {name: identifier_from_name(name) for name in names}
    refuse_collisions(found, what=f"{kind}s of model {model!r}", become="identifier")
    return found


def class_name_from_model(model: str) -> str:
    """``Smollm2135mInt4Awq`` for ``smollm2-135m-int4-awq``."""
    words = [word for word in re.split(r"[^0-9A-Za-z]+", model) if word]
    name = "".join(word[0].upper() + word[1:] for word in words) or "Model"
    name = f"Model{name}" if name[0].isdigit() else name
    return f"{name}Model" if name in CLASSES_IN_USE or keyword.iskeyword(name) else name


CLASSES_IN_USE = frozenset(
    {
        "Any", "AsyncClient", "AsyncIterator", "AsyncTextStream", "ChatTemplate", "Classification", "ClassVar", "Client",
        "Generation", "InferResult", "Iterator", "Message", "ModelMetadata", "RankedDocument", "Sequence",
        "TensorMetadata", "TextStream",
    }
)  # fmt: skip
"""What generated modules import."""


def refuse_collisions(identifiers: Mapping[str, str], *, what: str, become: str) -> None:
    """Return if no two names have the same identifier.

    Raises:
        SourceError: names those that have.
    """
    owners: dict[str, list[str]] = {}
    for name, identifier in identifiers.items():
        owners.setdefault(identifier, []).append(name)
    clashes = [
        f"{', '.join(map(repr, names))} ({identifier})"
        for identifier, names in owners.items()
        if len(names) > 1
    ]
    if clashes:
        raise SourceError(
            f"{what} would have the same {become} in Python: {'; '.join(clashes)}",
            hint="rename them, or generate the client of each model into a file of its own",
        )


def literal(text: str) -> str:
    """``text`` as a Python literal in double quotes and ASCII that has no quote and no line end inside."""
    return f'"{escaped(text)}"'


def docstring_text(text: str) -> str:
    """``text`` for inside of a docstring; lone surrogates, which no docstring may have, as their escapes."""
    return escaped(text.encode("utf-8", "backslashreplace").decode())


def escaped(text: str) -> str:
    """``text`` as it stands between the quotes of a literal."""
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if character == "\\":
        return "\\\\"
    if 0x20 <= code < 0x7F and character != '"':
        return character
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
