"""What is sent to a model: decided by its metadata, so that one profile serves for any model.

A model that generates text gets prompts (``_text``), one whose only required input is text gets texts
(``_embed``), any other tensors (``_tensors``). The model is asked a few questions first, so that a
profile which it cannot serve is an error before the measurement, in words.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from enginesmith_client._client import Client
from enginesmith_client._dialects import TEXT_INPUT, TEXT_OUTPUT
from enginesmith_client._messages import ModelMetadata
from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile import RequestsPart
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._prepared import Due
from enginesmith_client.perf.workload._embed import embed_workload, text_inputs
from enginesmith_client.perf.workload._payload import Kind, Subject, Workload
from enginesmith_client.perf.workload._tensors import tensor_workload
from enginesmith_client.perf.workload._text import KEPT_OF_TRACE, text_workload

_MAKERS = {"text": text_workload, "embed": embed_workload, "tensors": tensor_workload}


def make_workload(
    client: Client,
    target: Target,
    requests: RequestsPart,
    *,
    seed: int,
    timeout_s: float = 60.0,
    trace: Iterable[Due] = (),
) -> Workload:
    """The requests of a run: the same for the same model, profile and seed.

    Args:
        timeout_s: of one request; it is written into each, as ``Client`` does.
        trace: what is due, if its lengths are known; the first requests are made ahead, the others when they are due.

    Raises:
        ProfileError: the model cannot be asked what the profile asks for.
        TritonClientError: the server is not there, or does not serve the model.
    """
    subject = subject_of(client, target, requests, seed=seed, timeout_s=timeout_s)
    kind = kind_of(subject.metadata) if requests.kind == "auto" else requests.kind
    if kind == "text" and not _generates_text(subject.metadata):
        raise ProfileError(
            f"requests.kind is text, but model {target.model!r} does not have the tensors {TEXT_INPUT} and {TEXT_OUTPUT}",
            hint="leave out requests.kind",
        )
    workload = _MAKERS[kind](subject)
    for number, due in enumerate(islice(trace, KEPT_OF_TRACE)):
        workload.request(number, due)
    return workload


def kind_of(metadata: ModelMetadata) -> Kind:
    """What a model is, by its tensors."""
    if _generates_text(metadata):
        return "text"
    return "embed" if text_inputs(metadata) else "tensors"


def subject_of(
    client: Client, target: Target, requests: RequestsPart, *, seed: int = 0, timeout_s: float = 60.0
) -> Subject:
    """The model with its metadata.

    Raises:
        ProfileError: it keeps state between requests, which profiles have no words for.
    """
    metadata = client.metadata(target.model, version=target.version)
    if client.config(target.model, version=target.version).get("sequence_batching"):
        raise ProfileError(
            f"model {target.model!r} keeps state between the requests of a sequence; profiles make single requests",
            hint="measure it with perf_analyzer itself (--sequence-length)",
        )
    return Subject(client, target, metadata, requests, seed, timeout_s)


def _generates_text(metadata: ModelMetadata) -> bool:
    return metadata.input(TEXT_INPUT) is not None and metadata.output(TEXT_OUTPUT) is not None
