"""Text to tokens and back, with the checkpoint's own tokenizer and chat template.

Self-contained like ``llm_runtime``: it reads ``tokenizer.json``, ``tokenizer_config.json`` and
``chat_template.jinja`` from one directory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer


class Text:
    """The tokenizer and chat template of one checkpoint directory."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = directory / "tokenizer_config.json"
        self._config: dict[str, Any] = (
            json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        )
        template = directory / "chat_template.jinja"
        self._source = (
            template.read_text(encoding="utf-8") if template.exists() else self._config.get("chat_template")
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts can be wrapped as chat messages."""
        return isinstance(self._source, str)

    def as_chat(self, question: str) -> str:
        """The prompt text of a conversation that consists of one user message.

        Raises:
            ValueError: there is no chat template, it is broken, or it refuses the conversation.
        """
        if not self.has_chat_template:
            raise ValueError("this model has no chat template; send the prompt as it is")
        try:
            return self._template.render(
                messages=[{"role": "user", "content": question}],
                add_generation_prompt=True,
                bos_token=self._special("bos_token"),
                eos_token=self._special("eos_token"),
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template cannot be used: {error}") from error

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids. A chat prompt already holds its special tokens, so none are added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not chat).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens`` without special tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(str(self._source))

    def _special(self, name: str) -> str:
        value = self._config.get(name) or ""
        return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"the chat template refuses this conversation: {message}")
