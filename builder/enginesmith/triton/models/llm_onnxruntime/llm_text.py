"""Text to tokens and back, with the checkpoint's own tokenizer and chat template.

Self-contained like ``llm_runtime``: it reads ``tokenizer.json``, ``tokenizer_config.json`` and
``chat_template.jinja`` from one directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
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
        return self.render([{"role": "user", "content": question}])

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of a conversation, up to where the assistant answers.

        Raises:
            ValueError: there is no chat template, it is broken, or it refuses the conversation.
        """
        if not self.has_chat_template:
            raise ValueError("this model has no chat template; send the prompt as it is")
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=self._special("bos_token"),
                eos_token=self._special("eos_token"),
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the model's chat template cannot be used: {error}") from error

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids. A chat prompt already holds its special tokens, so none are added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not chat).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens`` without special tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def word_ids(self, word: str) -> tuple[tuple[int, ...], ...]:
        """The token sequences that ``word`` becomes at the beginning of a text and after a space."""
        written = {tuple(self.encode(text, chat=True)) for text in (word, f" {word}")}
        return tuple(sorted(ids for ids in written if ids))

    def token_bytes(self, token: int) -> bytes:
        """What ``token`` adds to a text: possibly a part of a character; the name of a special token."""
        read: bytes = self._token_bytes(token)
        return read

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are, special ones included."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    @cached_property
    def longest_token_bytes(self) -> int:
        """No token stands for more bytes of text than this."""
        return max(len(name.encode()) for name in self._tokenizer.get_vocab(with_added_tokens=True))

    @cached_property
    def _token_bytes(self) -> Callable[[int], bytes]:
        """A token's bytes, by the way in which the tokenizer writes bytes as characters."""
        added: dict[int, bytes] = {
            number: str(token.content).encode()
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
        }
        byte_level = "ByteLevel" in json.dumps(json.loads(self._tokenizer.to_str()).get("decoder"))

        @lru_cache(maxsize=8192)
        def read(token: int) -> bytes:
            if token in added:
                return added[token]
            name: str = self._tokenizer.id_to_token(token) or ""
            if byte_level:
                return b"".join(_BYTES_OF_CHARACTERS.get(one, one.encode()) for one in name)
            if _BYTE_TOKEN.fullmatch(name):
                return bytes([int(name[3:5], 16)])
            return name.replace("\u2581", " ").encode()

        return read

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


def _bytes_of_characters() -> dict[str, bytes]:
    """The printable character that byte-level BPE writes for each byte (GPT-2, ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): bytes([byte]) for byte in printable},
        **{chr(256 + place): bytes([byte]) for place, byte in enumerate(others)},
    }


_BYTES_OF_CHARACTERS = _bytes_of_characters()
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"the chat template refuses this conversation: {message}")
