"""The ``assemble`` step: the Triton repository of a TensorRT-LLM deployment, complete but for the engines.

Reads the checkpoint's tokenizer and the converted checkpoint's ``config.json``; writes five model directories. What
the models rely on is in ``limits.json`` beside them, which the ``package`` step holds against the engines. Needs no GPU.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.engines.tensorrt_llm.arguments import effective_max_num_tokens
from enginesmith.errors import SourceError, SpecError
from enginesmith.spec import Serving
from enginesmith.steps import StepContext
from enginesmith.targets import TensorRtLlmTarget
from enginesmith.triton.config import config_text, parse_config
from enginesmith.triton.launch import deployment_of, write_deployment
from enginesmith.triton.placement import place_file, tree_files
from enginesmith.triton.trtllm.configs import (
    DEFAULT_REPOSITORY_PATH,
    Deployment,
    deployment_configs,
)
from enginesmith.triton.trtllm.placeholders import placeholders

LIMITS_FILE = "limits.json"
DEPLOYMENT_FILE = "deployment.json"
_CODE = {
    "preprocessing": ("trtllm_preprocessing", "trtllm_text"),
    "postprocessing": ("trtllm_postprocessing", "trtllm_text"),
    "tensorrt_llm_bls": ("trtllm_bls", "trtllm_text"),
}
_TOKENIZER_USERS = ("preprocessing", "postprocessing")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the repository. Facts: ``models``, ``files``, ``repository_path``.

    The parameter ``repository_path`` (default ``/models``) is where the repository will be inside the container.

    Raises:
        SpecError: the limits do not fit the model, or a value holds ``${``.
        SourceError: the checkpoint has no tokenizer, or the converted checkpoint cannot be served.
    """
    params = context.params
    target = TensorRtLlmTarget.model_validate_json(json.dumps(params["target"]))
    serving = Serving.model_validate_json(json.dumps(params["serving"]))
    repository_path = str(params.get("repository_path") or DEFAULT_REPOSITORY_PATH)
    if not repository_path.startswith("/"):
        raise SpecError(
            f"repository_path {repository_path!r} is not absolute; the backend opens it as it is",
            hint="give the place of the model repository inside the container, e.g. /models",
        )
    converted = _read_json(context.inputs["converted"] / "config.json")
    checkpoint = context.inputs["checkpoint"]
    limits = _limits(checkpoint, converted, serving, target)
    deployment = Deployment(target, serving, str(converted.get("dtype")), repository_path)
    described = {
        "format": 1,
        "deployment": params["model_name"],
        "variant": params["variant"],
        "scheme": params["scheme"],
        "toolchain": target.toolchain,
        "quantization": converted.get("quantization", {}),
    }
    configs = deployment_configs(deployment)
    for part, config in configs.items():
        version = context.out / config.name / "1"
        version.mkdir(parents=True)
        text = config_text(config)
        assert parse_config(text) == config
        (context.out / config.name / "config.pbtxt").write_text(text, encoding="utf-8")
        _fill_version(part, version, checkpoint=checkpoint, limits=limits, described=described)
        if part == "tensorrt_llm":
            write_deployment(version, deployment_of(target))
    if found := placeholders(context.out):
        raise SpecError(
            f"a placeholder is left in the repository: {'; '.join(found)}",
            hint="no value of the spec may hold ${: Triton and the backend do not fill it in",
        )
    return {
        "models": [config.name for config in configs.values()],
        "files": sum(1 for _ in tree_files(context.out)),
        "repository_path": repository_path,
    }


def _fill_version(
    part: str,
    version: Path,
    *,
    checkpoint: Path,
    limits: Mapping[str, Any],
    described: Mapping[str, Any],
) -> None:
    _write_code(part, version)
    if part in _TOKENIZER_USERS:
        _place_tokenizer(checkpoint, version)
    if part in ("preprocessing", "tensorrt_llm"):
        _write_json(version / LIMITS_FILE, limits)
    if part == "ensemble":
        _write_json(version / DEPLOYMENT_FILE, described)


def _limits(
    checkpoint: Path, converted: Mapping[str, Any], serving: Serving, target: TensorRtLlmTarget
) -> dict[str, Any]:
    """What the repository relies on: the engine's limits, and the tokens that end and pad."""
    positions = converted.get("max_position_embeddings")
    if positions and serving.max_sequence_length > positions:
        raise SpecError(
            f"serving.max_sequence_length is {serving.max_sequence_length}, but the model knows only {positions} positions",
            hint=f"set serving.max_sequence_length to {positions} or less",
        )
    parallelism = target.parallelism
    mapping = converted.get("mapping", {})
    seen = {key: mapping.get(key, 1) for key in ("tp_size", "pp_size")}
    wanted = {"tp_size": parallelism.tensor, "pp_size": parallelism.pipeline}
    if seen != wanted:
        raise SourceError(
            f"the converted checkpoint has the mapping {seen}, the target has {wanted}",
            hint="convert the checkpoint for this target",
        )
    return {
        "format": 1,
        "max_batch_size": serving.max_batch_size,
        "max_input_len": serving.prompt_limit,
        "max_seq_len": serving.max_sequence_length,
        "max_num_tokens": effective_max_num_tokens(target, serving),
        "max_beam_width": target.max_beam_width,
        **wanted,
        "dtype": converted.get("dtype"),
        "logits_dtype": target.logits_dtype,
        "paged_context": target.chunked_context or target.kv_cache.reuse,
        "vocab_size": int(converted["vocab_size"]),
        **end_tokens(checkpoint),
    }


def end_tokens(checkpoint: Path) -> dict[str, Any]:
    """The token that ends an answer (-1: none), further ones that do, and the token that pads.

    TensorRT-LLM knows one end token. It is the tokenizer's, as in NVIDIA's preprocessing, unless the model's own
    configuration names others only; what else it names is sent along as stop words.
    """
    tokenizer_config = _read_json(checkpoint / "tokenizer_config.json", missing={})
    ids = _added_tokens(checkpoint)
    eos = ids.get(_token_text(tokenizer_config.get("eos_token")))
    pad = ids.get(_token_text(tokenizer_config.get("pad_token")))
    generation = _read_json(checkpoint / "generation_config.json", missing={})
    named = generation.get("eos_token_id", _read_json(checkpoint / "config.json").get("eos_token_id"))
    enders = [] if named is None else named if isinstance(named, list) else [named]
    end_id = eos if eos is not None and (eos in enders or not enders) else next(iter(enders), -1)
    return {
        "end_id": end_id,
        "pad_id": pad if pad is not None else end_id,
        "further_end_ids": sorted({int(token) for token in enders} - {end_id}),
    }


def _added_tokens(checkpoint: Path) -> dict[str, int]:
    tokenizer = _read_json(checkpoint / "tokenizer.json", missing=None)
    if tokenizer is None:
        raise _no_tokenizer(checkpoint)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}


def _token_text(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _write_code(part: str, version: Path) -> None:
    """The code that Triton's Python backend runs; it imports nothing of enginesmith."""
    for folder_name in _CODE.get(part, ()):
        folder = importlib.resources.files("enginesmith.triton.models") / folder_name
        with importlib.resources.as_file(folder) as sources:
            for file in tree_files(sources):
                if file.name != "__init__.py":
                    (version / file.name).write_bytes(file.read_bytes())


def _place_tokenizer(checkpoint: Path, version: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            place_file(checkpoint / name, version / name)


def _no_tokenizer(checkpoint: Path) -> SourceError:
    return SourceError(
        f"tokenizer.json is missing in {checkpoint}",
        hint="the checkpoint must bring its tokenizer: save it with tokenizer.save_pretrained()",
    )


def _read_json(path: Path, **default: Any) -> Any:
    """The JSON in ``path``; with ``missing=``, that value where there is no such file."""
    if "missing" in default and not path.exists():
        return default["missing"]
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}", hint="build the step that made it again") from error


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
