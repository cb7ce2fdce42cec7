"""The ``package`` step: a verified engine becomes a directory that Triton serves.

Reads the engine, its verdict and the checkpoint's tokenizer; writes ``<model>/config.pbtxt`` and one complete
version directory. Big files are hard links to the engine's artifact. What has no passed verdict is not packaged.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.errors import GateError, SourceError, SpecError, StoreError
from enginesmith.spec import Serving
from enginesmith.steps import StepContext
from enginesmith.triton.config import LLM_INPUTS, LLM_OUTPUTS, config_text, model_config, parse_config
from enginesmith.triton.placement import place_file, tree_files

ENGINE_FILES = ("model.onnx", "weights.bin", "engine.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_REQUIRED_TOKENIZER_FILES = ("tokenizer.json",)


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the package. Facts: ``model_name``, ``config_bytes``, ``package_bytes``.

    Raises:
        GateError: the engine has no passed verdict.
        SpecError: the serving limits do not fit the model.
        SourceError: the checkpoint has no tokenizer.
    """
    params = context.params
    serving = Serving.model_validate(params["serving"])
    require_passed(context.inputs["verdict"])
    require_positions(context.inputs["checkpoint"], serving)

    model = context.out / str(params["model_name"])
    version = model / "1"
    version.mkdir(parents=True)
    _place(ENGINE_FILES, context.inputs["engine"], version, required=ENGINE_FILES)
    _place(TOKENIZER_FILES, context.inputs["checkpoint"], version, required=_REQUIRED_TOKENIZER_FILES)
    _write_runtime(version)
    _write_serving(version / "serving.json", serving, threads=int(params["threads"]))
    config = _write_config(model / "config.pbtxt", params, serving)
    return {
        "model_name": params["model_name"],
        "config_bytes": config.stat().st_size,
        "package_bytes": sum(file.stat().st_size for file in tree_files(context.out)),
    }


def require_passed(verdict_directory: Path) -> None:
    """Return when the verdict in ``verdict_directory`` says passed.

    Raises:
        GateError: it says otherwise, and which checks are broken, or there is none.
    """
    path = verdict_directory / "verdict.json"
    try:
        verdict = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GateError(
            "the engine has no verdict and cannot be packaged", hint="build again: the verify step writes it"
        ) from error
    if verdict.get("passed") is not True:
        broken = [check["name"] for check in verdict.get("checks", ()) if not check.get("passed")]
        raise GateError(
            f"the engine did not pass its verification and cannot be packaged; broken: {', '.join(broken) or 'not recorded'}",
            hint="see verdict.json of the verify step; loosen a limit in the spec only if the loss is acceptable",
        )


def require_positions(checkpoint: Path, serving: Serving) -> None:
    """Return when the model of ``checkpoint`` knows as many positions as ``serving`` wants to serve.

    Raises:
        SpecError: it knows fewer.
    """
    positions = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))[
        "max_position_embeddings"
    ]
    if serving.max_sequence_length > positions:
        raise SpecError(
            f"serving.max_sequence_length is {serving.max_sequence_length}, but the model knows only {positions} positions",
            hint=f"set serving.max_sequence_length to {positions} or less",
        )


def _place(names: tuple[str, ...], source: Path, target: Path, *, required: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            place_file(source / name, target / name)
        elif name in required:
            kind = StoreError if name in ENGINE_FILES else SourceError
            raise kind(
                f"{name} is missing in {source}",
                hint="build the step that makes it again, or check the checkpoint",
            )


def _write_runtime(version: Path) -> None:
    """The code that Triton's Python backend runs: the files of one folder, which import nothing of enginesmith."""
    with importlib.resources.as_file(
        importlib.resources.files("enginesmith.triton.models") / "llm_onnxruntime"
    ) as folder:
        for file in tree_files(folder):
            if file.name != "__init__.py":
                (version / file.name).write_bytes(file.read_bytes())


def _write_serving(path: Path, serving: Serving, *, threads: int) -> None:
    limits = {
        "max_sequence_length": serving.max_sequence_length,
        "max_prompt_length": serving.prompt_limit,
        "default_max_tokens": serving.default_max_tokens,
        "max_batch_size": serving.max_batch_size,
        "threads": threads,
    }
    path.write_text(json.dumps(limits, indent=2) + "\n", encoding="utf-8")


def _write_config(path: Path, params: Mapping[str, Any], serving: Serving) -> Path:
    config = model_config(
        str(params["model_name"]),
        inputs=LLM_INPUTS,
        outputs=LLM_OUTPUTS,
        max_batch_size=serving.max_batch_size,
        dynamic_batching=serving.dynamic_batching,
        instances=serving.instances,
        parameters={"scheme": str(params["scheme"]), "variant": str(params["variant"])},
    )
    path.write_text(config_text(config), encoding="utf-8")
    assert parse_config(path.read_text(encoding="utf-8"), origin=str(path)) == config
    return path
