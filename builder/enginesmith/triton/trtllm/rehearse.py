"""The ``rehearse_trtllm`` step: the assembled repository in a real tritonserver, with the engine played on the CPU.

The copy that is served differs from the repository in one model: ``tensorrt_llm`` keeps its configuration, except that
the Python backend runs it on the CPU, and is played by the ONNX Runtime engine of the same integers; where an
architecture has none, by an echo. ``rehearsal.json`` says which bytes were rehearsed and what was not.
"""

from __future__ import annotations

import importlib.resources
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.grpc.model_config_pb2 import ModelConfig

import enginesmith
from enginesmith.errors import GateError
from enginesmith.spec import Serving
from enginesmith.steps import StepContext
from enginesmith.targets import TensorRtLlmTarget
from enginesmith.triton.config import config_text
from enginesmith.triton.launch import deployment_of, read_deployments
from enginesmith.triton.placement import contents_digest, place_file, place_tree, tree_contents, tree_files
from enginesmith.triton.rehearsal_report import Check, require_passed
from enginesmith.triton.server import TritonServer, find_server
from enginesmith.triton.trtllm.asking import Asking
from enginesmith.triton.trtllm.backend_rules import backend_problems
from enginesmith.triton.trtllm.configs import PARTS
from enginesmith.triton.trtllm.placeholders import placeholders
from enginesmith.triton.trtllm.scenarios import Stage, run_checks
from enginesmith.triton.trtllm.subject import PROMPTS, Subject, read_limits
from enginesmith.triton.trtllm.wiring import read_configs, wiring_problems

ENGINE_FILES = ("rank*.engine", "config.json")
"""What the ``package`` step adds to ``tensorrt_llm`` and no rehearsal on a CPU can run."""
TWIN, ECHO = "onnxruntime twin", "echo"
# tritonserver 2.51 counts a cancelled request of an ensemble as running for ever and waits for it when it ends.
_EXIT_TIMEOUT_S = 2
_PATIENCE_S = 30.0
_PATIENCE_FACTOR = 50
_ENTRIES = ("ensemble", "tensorrt_llm_bls")
_TWIN_FILES = ("model.onnx", "weights.bin", "engine.json")


def run(context: StepContext) -> Mapping[str, Any]:
    """Rehearse the repository. Facts: ``ready_s``, ``requests``, ``server_version``, ``played_by``.

    Raises:
        GateError: an answer was wrong, or a placeholder is left; says what was asked, expected and seen.
        ServerError: tritonserver could not load the repository.
    """
    params, repository = context.params, context.inputs["repository"]
    target = TensorRtLlmTarget.model_validate_json(json.dumps(params["target"]))
    serving = Serving.model_validate_json(json.dumps(params["serving"]))
    configs = read_configs(repository)
    engine = context.inputs.get("engine")
    context.progress(None, "asking the engine without a server")
    limits = read_limits(repository, context.inputs["checkpoint"], target, serving)
    stand_in = _require_sound(repository, configs, target)
    subject = Subject(context.inputs["checkpoint"], limits, target, _player(engine, limits))
    served, played = context.scratch / "repository", context.scratch / "played.jsonl"
    place_with_stand_in(repository, served, stand_in, engine=engine, played=played)
    patience_s = _patience_s(subject)
    started = time.monotonic()
    with _server(served, str(params.get("server") or "auto")) as server:
        server.wait_ready(on_progress=context.progress)
        ready_s = time.monotonic() - started
        entries = {target.triton_model(part): configs[target.triton_model(part)] for part in _ENTRIES}
        ask = Asking(server, entries=entries, decoupled=target.streaming, patience_s=patience_s)
        checks: list[Check] = []
        for part in _ENTRIES:
            context.progress(None, f"asking {part} in tritonserver")
            checks += run_checks(_stage(part, ask, subject, target=target, serving=serving, played=played))
            server.require_alive(f"while {target.triton_model(part)} was asked")
        facts = {
            "ready_s": round(ready_s, 3),
            "requests": ask.requests,
            "server_version": server.server_version(),
            "played_by": TWIN if engine else ECHO,
        }
    require_passed(str(params["model_name"]), checks)
    document = _report(params, target, repository, checks) | facts
    (context.out / "rehearsal.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return facts


def _report(
    params: Mapping[str, Any], target: TensorRtLlmTarget, repository: Path, checks: Sequence[Check]
) -> dict[str, Any]:
    return {
        "format": 1,
        "passed": True,
        "model": str(params["model_name"]),
        "models": [target.triton_model(part) for part in PARTS],
        "package_digest": contents_digest(tree_contents(repository)),
        "not_rehearsed": [f"{target.triton_model('tensorrt_llm')}/1/{name}" for name in ENGINE_FILES],
        "checks": [asdict(check) for check in checks],
    }


def _patience_s(subject: Subject) -> float:
    """How long a response may take: it waits for others, each of which takes about as long as one without a server."""
    started = time.monotonic()
    subject.answer(subject.prompts[0])
    return _PATIENCE_S + _PATIENCE_FACTOR * (time.monotonic() - started)


def _require_sound(
    repository: Path, configs: Mapping[str, ModelConfig], target: TensorRtLlmTarget
) -> ModelConfig:
    """The configuration of ``tensorrt_llm``, when all is right that can be known without a server."""
    if missing := [name for name in map(target.triton_model, PARTS) if name not in configs]:
        raise GateError(
            f"models are missing in the repository: {', '.join(missing)}; it has: {', '.join(configs) or 'none'}",
            hint="build the assemble step again",
        )
    if found := placeholders(repository):
        raise GateError(
            f"a placeholder is left in the repository: {'; '.join(found)}",
            hint="build the assemble step again",
        )
    engine = configs[target.triton_model("tensorrt_llm")]
    problems = [*wiring_problems(configs), *backend_problems(engine), *_policy_problems(configs, target)]
    if read_deployments(repository) != (deployment_of(target),):
        problems.append(f"{engine.name}/1/launch.json does not say how this target is started")
    if problems:
        raise GateError(
            f"the models of the repository do not fit together: {'; '.join(problems)}",
            hint="build the assemble step again",
        )
    return engine


def _policy_problems(configs: Mapping[str, ModelConfig], target: TensorRtLlmTarget) -> list[str]:
    """Models that stream where the target does not, or the other way round."""
    asked = "may stream (streaming: true)" if target.streaming else "never streams (streaming: false)"
    return [
        f"{name}: model_transaction_policy.decoupled is {str(not target.streaming).lower()}, but the target {asked}"
        for name in map(target.triton_model, ("tensorrt_llm", "tensorrt_llm_bls"))
        if configs[name].model_transaction_policy.decoupled != target.streaming
    ]


def _server(served: Path, wanted: str) -> TritonServer:
    # The stand-in imports enginesmith; nothing else in the repository may need it.
    sources = Path(enginesmith.__file__).parents[1]
    return TritonServer(
        served,
        installation=find_server(wanted),
        python_path=[sources],
        extra_args=[f"--exit-timeout-secs={_EXIT_TIMEOUT_S}"],
    )


def _stage(
    part: str, ask: Asking, subject: Subject, *, target: TensorRtLlmTarget, serving: Serving, played: Path
) -> Stage:
    return Stage(
        model=target.triton_model(part),
        ask=ask,
        subject=subject,
        whole_characters=part == "tensorrt_llm_bls",
        accumulates=target.accumulate_tokens,
        may_turn_away=_may_turn_away(serving),
        max_batch_size=serving.max_batch_size,
        played=played,
        cancellation_period_s=target.cancellation_check_period_ms / 1000,
    )


def _player(engine: Path | None, limits: Mapping[str, Any]) -> Any:
    from enginesmith.triton.models.trtllm_twin.play import Echo, Twin

    return Twin(engine, capacity=int(limits["max_seq_len"])) if engine else Echo()


def place_with_stand_in(
    repository: Path, served: Path, config: ModelConfig, *, engine: Path | None, played: Path
) -> None:
    """Put the repository in ``served``, with a model of ``config`` that plays the engine.

    ``engine`` is the artifact of the ``lower`` step, None for an echo. How each generation ended is appended to
    ``played``, one JSON object a line: ``id``, ``tokens``, ``ended``.
    """
    place_tree(repository, served)
    model = served / config.name
    # The file is a link to the rehearsed one, which must stay as it is.
    (model / "config.pbtxt").unlink()
    (model / "config.pbtxt").write_text(config_text(stand_in_config(config)), encoding="utf-8")
    folder = importlib.resources.files("enginesmith.triton.models") / "trtllm_twin"
    with importlib.resources.as_file(folder) as sources:
        for file in tree_files(sources):
            if file.name == "model.py":
                (model / "1" / file.name).write_bytes(file.read_bytes())
    for name in _TWIN_FILES if engine else ():
        assert engine is not None
        if (engine / name).is_file():
            place_file(engine / name, model / "1" / name)
    settings = {"played_by": TWIN if engine else ECHO, "threads": 0, "log": str(played)}
    (model / "1" / "twin.json").write_text(json.dumps(settings), encoding="utf-8")


def stand_in_config(config: ModelConfig) -> ModelConfig:
    """``config`` with only that changed which says how the model runs: one instance, in Python, on the CPU."""
    played = ModelConfig()
    played.CopyFrom(config)
    played.backend = "python"
    del played.instance_group[:]
    played.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    return played


def _may_turn_away(serving: Serving) -> bool:
    policy = serving.dynamic_batching.queue_policy if serving.dynamic_batching else None
    return policy is not None and bool(0 < policy.max_queue_size < len(PROMPTS) or policy.default_timeout_us)
