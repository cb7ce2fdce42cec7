"""Conversations: what a message may be, and a model's chat template rendered by the client.

Templates are Jinja programs out of a model's files, so they run in Jinja's sandbox. Jinja is imported when the first
template is made (the extra ``chat``).

Format: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from enginesmith_client._codec import text_bytes
from enginesmith_client._errors import InvalidInput

ROLES = ("system", "user", "assistant", "tool")
Message: TypeAlias = "Mapping[str, str | Sequence[Mapping[str, str]]]"
"""``{"role": ..., "content": ...}``; the content is a str, or a list of ``{"type": "text", "text": ...}``."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def checked_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The conversation with every content as one str; the parts of a content are joined as they are.

    Raises:
        InvalidInput: it is empty, or a message is not one.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidInput(
            f"messages must be a non-empty list; seen: {_shown(messages)}",
            hint='one message: [{"role": "user", "content": text}]',
        )
    return [_checked_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def messages_json(messages: Sequence[Message]) -> str:
    """The conversation as served models of enginesmith take it."""
    return json.dumps(checked_messages(messages), ensure_ascii=False)


@dataclass(frozen=True)
class ChatTemplate:
    """A model's own chat template, for models that take a prompt and no messages."""

    source: str = field(repr=False)
    """Jinja, as in ``chat_template`` of a Hugging Face ``tokenizer_config.json``."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """``bos_token`` and its like, which templates refer to by these names."""
    _compiled: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiled", _compiled(self.source))

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate:
        """The template in a model's directory: ``chat_template.jinja``, else that of ``tokenizer_config.json``.

        Raises:
            InvalidInput: there is none, it cannot be read, or it is no Jinja.
        """
        directory = Path(path)
        config = _read_config(directory / "tokenizer_config.json")
        special = {name: _token_text(config.get(name)) for name in _SPECIAL_TOKENS if config.get(name)}
        file = directory / "chat_template.jinja"
        source = _read(file) if file.is_file() else _default_template(config.get("chat_template"))
        if not isinstance(source, str) or not source:
            raise InvalidInput(
                f"{directory} has no chat template",
                hint="it must hold chat_template.jinja or a tokenizer_config.json with chat_template",
            )
        return cls(source, special)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the next message of the assistant.

        Raises:
            InvalidInput: a message is none, or the template refuses the conversation.
        """
        import jinja2

        conversation = checked_messages(messages)
        try:
            text: str = self._compiled.render(
                messages=conversation, add_generation_prompt=True, **self.special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidInput(
                f"the chat template cannot render this conversation: {error}",
                hint="roles seen: " + ", ".join(message["role"] for message in conversation),
            ) from error
        return text


def _checked_message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        seen = sorted(map(str, message)) if isinstance(message, Mapping) else _shown(message)
        raise InvalidInput(f'{where} must have the keys "role" and "content" and no others; seen: {seen}')
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InvalidInput(f"{where} has the role {role!r}; allowed: {', '.join(ROLES)}")
    text = content if isinstance(content, str) else _joined(where, content)
    text_bytes(text, what=f"the content of {where}")
    return {"role": role, "content": text}


def _joined(where: str, content: Any) -> str:
    texts: list[str] = []
    for part in content if isinstance(content, Sequence) and not isinstance(content, bytes) else [content]:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise InvalidInput(
                f'the content of {where} must be a str or a list of {{"type": "text", "text": str}}; seen: {_shown(part)}'
            )
        texts.append(part["text"])
    return "".join(texts)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _compiled(source: str) -> Any:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise InvalidInput(
            "rendering a chat template here needs Jinja", hint="pip install 'enginesmith-client[chat]'"
        ) from error

    # Block trimming, loop controls and the names below are what templates of Hugging Face models expect.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise InvalidInput(f"the chat template is not valid: {error}") from error


def _to_json(value: object, indent: int | None = None) -> str:
    # Jinja's own tojson escapes for HTML, which would put \u003c into prompts.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file} cannot be read: {error}") from error


def _read_config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(_read(file))
    except ValueError as error:
        raise InvalidInput(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"{file} must hold a JSON object; seen: {type(config).__name__}")
    return config


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) and "content" in token else str(token)


def _default_template(templates: Any) -> Any:
    """A model may have several templates, one of them the default."""
    if not isinstance(templates, list):
        return templates
    return next((entry.get("template") for entry in templates if entry.get("name") == "default"), None)
