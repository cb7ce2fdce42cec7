"""The methods of models that write or read text, with exactly the options that the model has. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from enginesmith.client_stub.layout import Code, Flavour
from enginesmith.client_stub.names import literal
from enginesmith_client import ModelMetadata
from enginesmith_client._dialects import MESSAGES, TEXT_INPUT, TEXT_OUTPUT, TOKENS, dialect_of

_OPTION_TYPES = {
    "max_tokens": "int", "min_tokens": "int", "temperature": "float", "top_k": "int", "top_p": "float",
    "repetition_penalty": "float", "presence_penalty": "float", "frequency_penalty": "float", "seed": "int",
    "stop": "str | Sequence[str]", "chat": "bool", "logprobs": "bool",
}  # fmt: skip
_ENCODER_TASKS = {"embedding": "embed", "logits": "classify", "probabilities": "classify", "score": "rerank"}
_ENCODER_TASKS = {"embedding": "embed", "logits": "classify", "probabilities": "classify", "score": "rerank"}


def is_text_model(metadata: ModelMetadata) -> bool:
    """Whether ``Client.generate`` can ask it: what it must be given is the text and options."""
    if metadata.input(TEXT_INPUT) is None or metadata.output(TEXT_OUTPUT) is None:
        return False
    required = {tensor.name for tensor in metadata.inputs if not tensor.optional}
    return required <= {TEXT_INPUT, *_options(metadata).values()}


def _options(metadata: ModelMetadata) -> Mapping[str, str]:
    """The options that the model has, and the inputs that carry them."""
    return {
        option: name
        for option, name in dialect_of(metadata).options.items()
        if metadata.input(name) is not None and (option != "logprobs" or metadata.output(TOKENS) is not None)
    }


def used_part(metadata: ModelMetadata) -> ModelMetadata:
    """The part of an interface that a client of texts depends on."""
    inputs: set[str] = {tensor.name for tensor in metadata.inputs if not tensor.optional}
    if is_text_model(metadata):
        dialect = dialect_of(metadata)
        inputs |= {TEXT_INPUT, MESSAGES, dialect.stream, *_options(metadata).values()}
        outputs = {TEXT_OUTPUT, "finish_reason", "num_input_tokens", "num_output_tokens"}
    else:
        outputs = set(_ENCODER_TASKS)
    return replace(
        metadata,
        inputs=tuple(tensor for tensor in metadata.inputs if tensor.name in inputs),
        outputs=tuple(tensor for tensor in metadata.outputs if tensor.name in outputs),
    )


def write_text_method(code: Code, flavour: Flavour, metadata: ModelMetadata, method: str) -> None:
    streams, chats = "stream" in method, "chat" in method
    returns = f"{flavour.prefix}TextStream" if streams else "Generation"
    options = [option for option in _options(metadata) if not (chats and option == "chat")]
    required = {tensor.name for tensor in metadata.inputs if not tensor.optional}
    parameters = ["self", "messages: Sequence[Message]" if chats else "prompt: str", "*"]
    template = chats and metadata.input(MESSAGES) is None
    parameters += ["template: ChatTemplate"] if template else []
    for option in sorted(options, key=lambda one: _options(metadata)[one] not in required):
        kind = _OPTION_TYPES[option]
        default = " = False" if kind == "bool" else " | None = None"
        parameters.append(f"{option}: {kind}" + ("" if _options(metadata)[option] in required else default))
    parameters += ["priority: int | None = None", 'request_id: str = ""', "timeout_s: float | None = None"]
    code.uses |= {returns} | ({"Sequence", "Message"} if chats else set())
    code.uses |= {"Sequence"} if "stop" in options else set()
    code.uses |= {"ChatTemplate"} if template else set()
    code.define(f"{'def' if streams else flavour.define} {method}(", parameters, returns)
    code.add(f'        """As ``{flavour.client}.{method}``; an option left out is the model\'s default."""')
    given = [*(["template"] if template else []), *options, "priority", "request_id", "timeout_s"]
    code.exploded(
        f"return {'' if streams else flavour.wait}self._client.{method}(",
        [
            literal(metadata.name),
            "messages" if chats else "prompt",
            *(f"{name}={name}" for name in given),
            "version=self._version",
        ],
        ")",
        indent=8,
    )


def encoder_task(metadata: ModelMetadata) -> str | None:
    """The method of ``Client`` that can ask it, or None."""
    text, required = metadata.input("TEXT"), {one.name for one in metadata.inputs if not one.optional}
    tasks = {_ENCODER_TASKS[one.name] for one in metadata.outputs if one.name in _ENCODER_TASKS}
    wanted = {"TEXT", "TEXT_PAIR"} if tasks == {"rerank"} else {"TEXT"}
    if text is None or text.datatype != "BYTES" or len(tasks) != 1 or metadata.decoupled:
        return None
    return tasks.pop() if required == wanted else None


def write_encoder_method(code: Code, flavour: Flavour, metadata: ModelMetadata, method: str) -> None:
    ranks = method == "rerank"
    returns = {
        "embed": "npt.NDArray[np.float32]",
        "classify": "list[Classification]",
        "rerank": "list[RankedDocument]",
    }[method]
    code.uses |= {"embed": {"np"}, "classify": {"Classification"}, "rerank": {"RankedDocument"}}[method]
    code.uses |= {"Sequence"}
    texts = ("query: str", "documents: Sequence[str]") if ranks else ("texts: Sequence[str]",)
    parameters = ("self", *texts, "*", "timeout_s: float | None = None")
    code.define(f"{flavour.define} {method}(", parameters, returns)
    (output,) = [tensor for tensor in metadata.outputs if _ENCODER_TASKS.get(tensor.name) == method][:1]
    said = {
        "embed": f"The vectors of ``texts``: float32 [texts, {output.shape[-1]}].",
        "classify": "The classes of each text.",
        "rerank": "``documents`` by their relevance to ``query``, the most relevant first.",
    }[method]
    code.add(f'        """{said} ``timeout_s``: seconds; None: the client\'s."""')
    given = ("query", "documents") if ranks else ("texts",)
    items = (literal(metadata.name), *given, "timeout_s=timeout_s", "version=self._version")
    code.exploded(f"return {flavour.wait}self._client.{method}(", items, ")", indent=8)
