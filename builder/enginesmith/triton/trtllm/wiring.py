"""Whether the models of a repository fit together: the tensors that ensembles connect, and the models that are named.

tritonserver refuses an ensemble whose tensors do not fit, but says why only in its log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.grpc.model_config_pb2 import ModelConfig

from enginesmith.triton.config import parse_config


def read_configs(repository: Path) -> dict[str, ModelConfig]:
    """The configuration of every model in ``repository``, by name."""
    return {
        path.parent.name: parse_config(path.read_text(encoding="utf-8"), origin=str(path))
        for path in sorted(repository.glob("*/config.pbtxt"))
    }


def wiring_problems(configs: Mapping[str, ModelConfig]) -> list[str]:
    """What does not fit, for people; empty when all does."""
    ensembles = [config for config in configs.values() if config.platform == "ensemble"]
    return [problem for ensemble in ensembles for problem in _problems(ensemble, configs)]


def _problems(ensemble: ModelConfig, configs: Mapping[str, ModelConfig]) -> Iterator[str]:
    known = {tensor.name: (tensor.data_type, ensemble.name) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        if step.model_name not in configs:
            yield f"{ensemble.name} refers to the model {step.model_name}, which is not in the repository"
            continue
        model = configs[step.model_name]
        if model.max_batch_size < ensemble.max_batch_size:
            yield f"{ensemble.name} takes {ensemble.max_batch_size} rows at once, but {model.name} only {model.max_batch_size}"
        yield from _input_problems(ensemble.name, model, step.input_map, known)
        types = {tensor.name: tensor.data_type for tensor in model.output}
        for name, tensor in step.output_map.items():
            if name in types:
                known[tensor] = (types[name], model.name)
            else:
                yield f"{ensemble.name}: {model.name} has no output {name}"
    for output in ensemble.output:
        kind, source = known.get(output.name, (None, None))
        if kind != output.data_type:
            seen = "nothing gives it" if kind is None else f"{source} gives {_type(kind)}"
            yield f"{ensemble.name}: output {output.name} is {_type(output.data_type)}, {seen}"


def _input_problems(
    ensemble: str, model: ModelConfig, input_map: Mapping[str, str], known: Mapping[str, tuple[int, str]]
) -> Iterator[str]:
    inputs = {tensor.name: tensor for tensor in model.input}
    for name, tensor in input_map.items():
        if name not in inputs:
            yield f"{ensemble}: {model.name} has no input {name}"
        elif tensor not in known:
            yield f"{ensemble}: nothing gives {tensor}, which {model.name} takes as {name}"
        elif inputs[name].data_type != known[tensor][0]:
            kind, source = known[tensor]
            yield f"{ensemble}: {tensor} is {_type(kind)} of {source}, but {model.name} takes {name} as {_type(inputs[name].data_type)}"
    for name, needed in inputs.items():
        if not needed.optional and name not in input_map:
            yield f"{ensemble}: {model.name} needs {name} and gets none"


def _type(value: int | None) -> str:
    return "nothing" if value is None else str(pb.DataType.Name(value))
