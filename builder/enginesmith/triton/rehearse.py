"""The ``rehearse`` step: the package, alone, in a real tritonserver, asked real questions.

Good requests must be answered exactly as the package's own runtime answers them in this process: alone, as the
rows of one request, and as requests that share a batch or not, as Triton likes. Bad ones must be refused with a
reason, and must not hurt the next. Anything else stops the build.

A prompt alone and the same prompt in company may get different answers, both right: kernels add in another order
for other batch sizes, and INT8 activations (mode "fast") turn the last bit of a sum into another integer. So what
is expected of requests that come at once is one of the answers that the prompt gets in any company.

``rehearsal.json`` says which bytes were rehearsed, so that nothing else can be published in their name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from enginesmith.steps import StepContext
from enginesmith.triton.config import LLM_INPUTS, parse_config
from enginesmith.triton.placement import contents_digest, place_tree, tree_contents
from enginesmith.triton.rehearsal_report import Check, require_passed
from enginesmith.triton.server import TritonServer, find_server

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils when",
)
MAX_TOKENS = 16
_REQUEST_TIMEOUT_S = 300.0
_WIRE_TYPES: Mapping[str, tuple[str, type]] = {
    "TYPE_STRING": ("BYTES", np.object_),
    "TYPE_INT32": ("INT32", np.int32),
    "TYPE_UINT64": ("UINT64", np.uint64),
    "TYPE_FP32": ("FP32", np.float32),
    "TYPE_BOOL": ("BOOL", np.bool_),
}
_INPUT_TYPES = {tensor.name: _WIRE_TYPES[tensor.data_type] for tensor in LLM_INPUTS}


@dataclass(frozen=True)
class Answer:
    """What the server said to one request: an answer (rows joined, tokens summed), or why it refused."""

    text: str = ""
    finish_reason: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    refusal: str | None = None
    status: str | None = None
    """The gRPC status of a refusal."""


Ask = Callable[..., Answer]


def run(context: StepContext) -> Mapping[str, Any]:
    """Rehearse the package. Facts: ``ready_s``, ``requests``, ``server_version``.

    Raises:
        GateError: an answer was wrong; says what was asked, what was expected and what was seen.
        ServerError: tritonserver could not load the package.
    """
    model = str(context.params["model_name"])
    package = context.inputs["package"] / model
    context.progress(None, "asking the engine without a server")
    subject = read_subject(package)
    repository = context.scratch / "repository"
    repository.mkdir()
    place_tree(package, repository / model)

    installation = find_server(str(context.params.get("server") or "auto"))
    started = time.monotonic()
    with TritonServer(repository, installation=installation) as server:
        server.wait_ready(on_progress=context.progress)
        ready_s = time.monotonic() - started
        context.progress(None, "asking tritonserver")
        with grpc.InferenceServerClient(server.grpc_url) as client:
            asking = _Asking(client, model)
            checks = run_checks(asking, subject)
            server.require_alive("while it was asked")
            largest_batch = _largest_batch(client, model)
        facts = {
            "ready_s": round(ready_s, 3),
            "requests": asking.requests,
            "server_version": server.server_version(),
        }
    require_passed(model, checks)
    rehearsal = {
        "format": 1,
        "passed": True,
        "model": model,
        "package_digest": contents_digest(tree_contents(package)),
        "largest_batch": largest_batch,
        "checks": [asdict(check) for check in checks],
        **facts,
    }
    (context.out / "rehearsal.json").write_text(json.dumps(rehearsal, indent=1) + "\n", encoding="utf-8")
    return facts


@dataclass(frozen=True)
class Subject:
    """What the rehearsed package should answer, greedily, as generated in this process."""

    prompts: tuple[str, ...]
    alone: tuple[str, ...]
    """The answer to each prompt when it runs by itself."""
    together: tuple[str, ...]
    """The answers when as many as fit a batch run together: the first prompts."""
    in_company: tuple[frozenset[str], ...]
    """For each prompt every answer that it gets in some company, or alone."""
    too_long: str
    prompt_limit: int
    may_turn_away: bool
    """The queue policy allows the server to refuse some of the requests that come at once."""


def read_subject(package: Path) -> Subject:
    """Ask the runtime in ``package`` directly."""
    from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Runtime, Sampling
    from enginesmith.triton.models.llm_onnxruntime.llm_text import Text

    version = package / "1"
    serving = json.loads((version / "serving.json").read_text(encoding="utf-8"))
    limit = int(serving["max_prompt_length"])
    text = Text(version)
    prompts = tuple(_shortened(prompt, limit, text.encode) for prompt in PROMPTS)
    slots = min(len(prompts), int(serving["max_batch_size"]))
    runtime = Runtime(
        version, slots=slots, capacity=serving["max_sequence_length"], threads=serving["threads"]
    )
    answers: dict[tuple[int, ...], tuple[str, ...]] = {}
    for size in range(1, slots + 1):
        for company in combinations(range(len(prompts)), size):
            done = runtime.generate(
                [text.encode(prompts[one]) for one in company], Sampling(max_tokens=MAX_TOKENS)
            )
            answers[company] = tuple(text.decode(generation.tokens) for generation in done)
    config = parse_config(
        (package / "config.pbtxt").read_text(encoding="utf-8"), origin=str(package / "config.pbtxt")
    )
    return Subject(
        prompts=prompts,
        alone=tuple(answers[one,][0] for one in range(len(prompts))),
        together=answers[tuple(range(slots))],
        in_company=tuple(
            frozenset(given[company.index(one)] for company, given in answers.items() if one in company)
            for one in range(len(prompts))
        ),
        too_long="word " * (limit + 1),
        prompt_limit=limit,
        may_turn_away=_may_turn_away(config),
    )


def run_checks(ask: Ask, subject: Subject) -> list[Check]:
    """Everything a rehearsal asks, in order; a check that fails does not stop the others."""
    return [
        _check_greedy("greedy", ask, subject),
        _check_rows(ask, subject),
        *_check_concurrent(ask, subject),
        _check_sampling(ask, subject),
        _check_refused("prompt too long", ask, subject.too_long.encode(), names=str(subject.prompt_limit)),
        _check_refused("invalid UTF-8", ask, b"caf\xe9 \xff", names="UTF-8"),
        _check_refused("max_tokens 0", ask, subject.prompts[0].encode(), names="max_tokens", max_tokens=[0]),
        _check_empty_prompt(ask),
        _check_greedy("greedy again, after the bad requests", ask, subject),
    ]


class _Asking:
    """Asks one model over gRPC and counts."""

    def __init__(self, client: grpc.InferenceServerClient, model: str) -> None:
        self._client = client
        self._model = model
        self.requests = 0

    def __call__(self, *prompts: bytes, **options: Sequence[object]) -> Answer:
        """The answer to one request; ``options`` are the other inputs, the same for every prompt."""
        self.requests += 1
        tensors = [_tensor("text_input", [[prompt] for prompt in prompts])]
        tensors += [_tensor(name, [list(values)] * len(prompts)) for name, values in options.items()]
        try:
            result = self._client.infer(self._model, tensors, client_timeout=_REQUEST_TIMEOUT_S)
        except InferenceServerException as error:
            return Answer(refusal=str(error.message()), status=str(error.status()))
        return Answer(
            text="\n".join(text.decode() for text in result.as_numpy("text_output")[:, 0]),
            finish_reason=" ".join(reason.decode() for reason in result.as_numpy("finish_reason")[:, 0]),
            input_tokens=int(result.as_numpy("num_input_tokens").sum()),
            output_tokens=int(result.as_numpy("num_output_tokens").sum()),
        )


def _tensor(name: str, rows: list[list[object]]) -> grpc.InferInput:
    datatype, dtype = _INPUT_TYPES[name]
    array: np.ndarray[Any, Any] = np.array(rows, dtype=dtype)
    return grpc.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


def _check_greedy(name: str, ask: Ask, subject: Subject) -> Check:
    prompt, expected = subject.prompts[0], subject.alone[0]
    seen = ask(prompt.encode(), max_tokens=[MAX_TOKENS])
    return Check(name, prompt, expected, _shown(seen), seen.refusal is None and seen.text == expected)


def _check_rows(ask: Ask, subject: Subject) -> Check:
    """One request with several prompts is a batch of known company."""
    prompts = subject.prompts[: len(subject.together)]
    seen = ask(*(prompt.encode() for prompt in prompts), max_tokens=[MAX_TOKENS])
    expected = "\n".join(subject.together)
    return Check(
        "rows of one request",
        " | ".join(prompts),
        expected,
        _shown(seen),
        seen.refusal is None and seen.text == expected,
    )


def _check_concurrent(ask: Ask, subject: Subject) -> list[Check]:
    """All prompts as requests of their own, at once."""
    with ThreadPoolExecutor(len(subject.prompts)) as pool:
        seen = list(pool.map(lambda prompt: ask(prompt.encode(), max_tokens=[MAX_TOKENS]), subject.prompts))
    checks = []
    for prompt, allowed, answer in zip(subject.prompts, subject.in_company, seen, strict=True):
        turned_away = subject.may_turn_away and "UNAVAILABLE" in str(answer.status)
        passed = turned_away or (answer.refusal is None and answer.text in allowed)
        checks.append(Check("at once", prompt, " or ".join(sorted(allowed)), _shown(answer), passed))
    return checks


def _check_sampling(ask: Ask, subject: Subject) -> Check:
    prompt = subject.prompts[1]
    options: dict[str, list[object]] = {
        "max_tokens": [MAX_TOKENS],
        "temperature": [0.8],
        "top_k": [50],
        "top_p": [0.95],
        "repetition_penalty": [1.1],
        "seed": [7],
        "stop_words": [b"\n\n", b"###"],
    }
    first, second = (ask(prompt.encode(), **options) for _ in range(2))
    passed = (
        first.refusal is None
        and first == second
        and 1 <= first.output_tokens <= MAX_TOKENS
        and first.finish_reason in ("stop", "length")
        and not any(word in first.text for word in ("\n\n", "###"))
    )
    expected = f"1 to {MAX_TOKENS} tokens without the stop words, the same twice for one seed"
    return Check("sampling", prompt, expected, f"{_shown(first)}, then {_shown(second)}", passed)


def _check_refused(name: str, ask: Ask, prompt: bytes, *, names: str, **options: Sequence[object]) -> Check:
    seen = ask(prompt, **options)
    shown = f"{len(prompt)} bytes: {prompt[:24]!r} {options or ''}".strip()
    passed = seen.refusal is not None and names in seen.refusal and "Traceback" not in seen.refusal
    return Check(name, shown, f"a refusal that names {names}", _shown(seen), passed)


def _check_empty_prompt(ask: Ask) -> Check:
    """A tokenizer that adds a first token can continue nothing; others cannot. Both are sane, a crash is not."""
    seen = ask(b"", max_tokens=[MAX_TOKENS])
    answered = seen.refusal is None and 1 <= seen.output_tokens <= MAX_TOKENS and seen.input_tokens >= 1
    refused = seen.refusal is not None and "INVALID_ARGUMENT" in str(seen.status)
    return Check(
        "empty prompt",
        "''",
        "an answer, or a refusal as an invalid argument",
        _shown(seen),
        answered or refused,
    )


def _shown(answer: Answer) -> str:
    if answer.refusal is not None:
        return f"refused ({answer.status}): {answer.refusal[:300]}"
    return answer.text


def _shortened(prompt: str, limit: int, encode: Callable[[str], Sequence[int]]) -> str:
    while len(encode(prompt)) > limit and prompt:
        prompt = prompt[: len(prompt) // 2]
    return prompt


def _may_turn_away(config: ModelConfig) -> bool:
    policy = config.dynamic_batching.default_queue_policy
    return bool(0 < policy.max_queue_size < len(PROMPTS) or policy.default_timeout_microseconds)


def _largest_batch(client: grpc.InferenceServerClient, model: str) -> int:
    """The largest number of requests that the server ran together."""
    statistics = client.get_inference_statistics(model, as_json=True)["model_stats"][0]
    return max((int(batch["batch_size"]) for batch in statistics.get("batch_stats", ())), default=0)
