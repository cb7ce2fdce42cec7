"""The ``package_llmapi`` step: a checkpoint becomes a model that TensorRT-LLM's LLM API serves behind Triton.

Reads the checkpoint and, where the variant has a twin, the twin's verdict. Writes ``config.pbtxt`` and one version
directory: our ``model.py``, ``model.yaml``, the checkpoint as hard links, and ``launch.json``. Starts nothing.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from enginesmith.errors import SourceError
from enginesmith.spec import Serving
from enginesmith.steps import StepContext
from enginesmith.targets import LlmApiTarget
from enginesmith.triton.config import config_text, parse_config
from enginesmith.triton.launch import deployment_of, write_deployment
from enginesmith.triton.llmapi.config import llmapi_config
from enginesmith.triton.llmapi.options import CHECKPOINT_DIRECTORY, model_yaml
from enginesmith.triton.package_checks import require_passed, require_positions
from enginesmith.triton.placement import place_tree, tree_files

_REQUIRED_FILES = ("config.json", "tokenizer.json")


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the package. Facts: ``triton_model``, ``checkpoint_bytes``, ``package_bytes``.

    Raises:
        GateError: the checkpoint's twin has no passed verdict.
        SpecError: an option of ``llm_options`` is wrong, the limits do not fit the model, or the LLM API cannot run
            this quantization.
        SourceError: the checkpoint is incomplete.
    """
    params, checkpoint = context.params, context.inputs["checkpoint"]
    target = LlmApiTarget.model_validate(params["target"])
    serving = Serving.model_validate(params["serving"])
    if "verdict" in context.inputs:
        require_passed(context.inputs["verdict"])
    _require_files(checkpoint)
    require_positions(checkpoint, serving)
    document = model_yaml(target, serving, checkpoint)

    model = context.out / target.triton_model("tensorrt_llm")
    version = model / "1"
    version.mkdir(parents=True)
    place_tree(checkpoint, version / CHECKPOINT_DIRECTORY)
    _write_runtime(version)
    (version / "model.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    write_deployment(version, deployment_of(target))
    config = llmapi_config(target, variant=str(params["variant"]), scheme=str(params["scheme"]))
    path = model / "config.pbtxt"
    path.write_text(config_text(config), encoding="utf-8")
    assert parse_config(path.read_text(encoding="utf-8"), origin=str(path)) == config
    return {
        "triton_model": model.name,
        "checkpoint_bytes": _bytes_below(version / CHECKPOINT_DIRECTORY),
        "package_bytes": _bytes_below(context.out),
    }


def _require_files(checkpoint: Path) -> None:
    missing = [name for name in _REQUIRED_FILES if not (checkpoint / name).is_file()]
    if not any(checkpoint.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise SourceError(
            f"{', '.join(missing)} missing in {checkpoint}; the LLM API needs a complete Hugging Face checkpoint",
            hint="build the step that makes it again, or check the source of the model",
        )


def _write_runtime(version: Path) -> None:
    with importlib.resources.as_file(
        importlib.resources.files("enginesmith.triton.models") / "llmapi"
    ) as folder:
        for file in tree_files(folder):
            if file.name != "__init__.py":
                (version / file.name).write_bytes(file.read_bytes())


def _bytes_below(directory: Path) -> int:
    return sum(file.stat().st_size for file in tree_files(directory))
