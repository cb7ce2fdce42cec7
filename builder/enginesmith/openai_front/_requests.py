"""What callers send, checked: the requests of OpenAI's API that are served, as pydantic models.

Source: https://platform.openai.com/docs/api-reference and the parameter types of the ``openai`` package 3.54. A field
is served, ignored because it cannot change the answer, or refused; no field that would change the answer is dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

MAX_STOP_WORDS = 4
MAX_EMBEDDED_TEXTS = 2048
_INT32_MAX = 2**31 - 1

_IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls",
    }
)  # fmt: skip
"""Notes of the caller, which change no answer."""

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "tools are not supported"),
    "tool_choice": (("none", "auto"), "tools are not supported"),
    "functions": (([],), "functions are not supported"),
    "function_call": (("none", "auto"), "functions are not supported"),
    "response_format": (({"type": "text"},), "answers are text; no other format is supported"),
    "logit_bias": (({},), "biases of tokens are not supported"),
    "modalities": ((["text"],), "answers are text; no other modality is supported"),
    "audio": ((), "answers are text; audio is not supported"),
    "prediction": ((), "predicted output is not supported"),
    "web_search_options": ((), "web search is not supported"),
    "reasoning_effort": (("none",), "models have no levels of reasoning here"),
    "verbosity": (("medium",), "models have no levels of verbosity here"),
    "suffix": (("",), "text is continued, not filled in: suffix is not supported"),
    "best_of": ((1,), "best_of is not supported: ask for n answers and choose"),
    "dimensions": ((), "embeddings have the width of the model; dimensions is not supported"),
}
"""Fields that would change the answer: the values that ask for nothing, and why the others are refused."""


def _refusal(message: str, param: str = "") -> PydanticCustomError:
    # The text goes through a field of the context, because pydantic reads braces in it as places to fill in.
    return PydanticCustomError("refused", "{text}", {"text": message, "param": param})


def _texts(value: Any) -> Any:
    """A text or a list of texts, as a list."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, int | list) for one in value):
        raise _refusal("tokens are not supported: send texts")
    return value


def _stop_words(value: Any) -> Any:
    return [value] if isinstance(value, str) else ([] if value is None else value)


def _content(value: Any) -> Any:
    """The text of a message; of one in parts, their texts one after the other."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image_url", "input_audio", "file"):
            raise _refusal(f"messages are text: parts of the type {kind!r} are not supported")
        else:
            raise PydanticCustomError(
                "content_part", 'a part of a message must be {"type": "text", "text": a string}'
            )
    return "".join(texts)


Texts = Annotated[list[str], BeforeValidator(_texts), Field(min_length=1)]
StopWords = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_stop_words),
    Field(max_length=MAX_STOP_WORDS),
]
TokenCount = Annotated[int, Field(ge=1, le=_INT32_MAX)]


class _Body(BaseModel):
    """A JSON object in which every field is known and of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        kept = {}
        for name, value in fields.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in _REFUSED and value is not None:
                harmless, why = _REFUSED[name]
                if value not in harmless:
                    raise _refusal(f"Unsupported parameter: '{name}': {why}.", name)
            elif name not in _IGNORED and name not in _REFUSED:
                kept[name] = value
        return kept


class StreamOptions(_Body):
    """How a stream is sent."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against listeners; there is none here."""


class _Generating(_Body):
    """What completions and chats have in common. ``top_k``, ``min_tokens`` and ``repetition_penalty`` are ours, as vLLM's."""

    model: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: TokenCount | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT32_MAX)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0, le=_INT32_MAX)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: StopWords = Field(default_factory=list)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _options_of_streams_need_a_stream(self) -> _Generating:
        if self.stream_options is not None and not self.stream:
            raise _refusal("stream_options is only allowed when stream is true", "stream_options")
        return self


class CompletionRequest(_Generating):
    """``POST /v1/completions``."""

    prompt: Texts
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _alternatives_are_not_known(self) -> CompletionRequest:
        if self.logprobs:
            raise _refusal(
                "only the log-probabilities of chosen tokens are known, not of alternatives: send logprobs 0",
                "logprobs",
            )
        if self.logprobs is not None and self.echo:
            raise _refusal(
                "log-probabilities of the prompt are not known: send no logprobs with echo", "echo"
            )
        return self

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer; 16 when nothing is said, as at OpenAI."""
        return self.max_tokens or 16

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token comes with its log-probability."""
        return self.logprobs is not None


class ChatMessage(_Body):
    """One message. What assistants may say beside text is accepted when it is null, as the ``openai`` package sends it back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None

    @field_validator("role", mode="before")
    @classmethod
    def _tools_do_not_speak(cls, role: Any) -> Any:
        if role in ("tool", "function"):
            raise _refusal(f"messages of the role {role!r} are not supported: there are no tools")
        return role

    @property
    def rendered(self) -> dict[str, str]:
        """As templates take it; none of them knows developers."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatRequest(_Generating):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _refusal("max_tokens and max_completion_tokens are one limit: send one", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise _refusal("top_logprobs is only allowed when logprobs is true", "top_logprobs")
        if self.top_logprobs:
            raise _refusal(
                "only the log-probabilities of chosen tokens are known, not of alternatives: send top_logprobs 0",
                "top_logprobs",
            )
        return self

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer, or None: nothing is said."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token comes with its log-probability."""
        return bool(self.logprobs)


class EmbeddingRequest(_Body):
    """``POST /v1/embeddings``."""

    model: Annotated[str, Field(min_length=1)]
    input: Annotated[Texts, Field(max_length=MAX_EMBEDDED_TEXTS)]
    encoding_format: Literal["float", "base64"] | None = None
