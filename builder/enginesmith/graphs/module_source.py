"""A user's ``torch.nn.Module`` as a model to export: ``path.py:factory`` from the spec.

The file runs here, in the step's own process, as if it had been started itself: its directory is first on the import
path. Whatever it does wrong is told with the end of its own traceback.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from enginesmith.errors import SourceError, SpecError
from enginesmith.graphs.compare import GraphRunError
from enginesmith.graphs.original import Arrays, Original, axes_of
from enginesmith.graphs.signature import GraphTensor

_MODULE_NAME = "enginesmith_user_module"


def original_of_module(path: Path, params: Mapping[str, Any]) -> Original:
    """The module that ``params["factory"]`` of the file at ``path`` returns, with the spec's inputs and outputs.

    Raises:
        SourceError: the file or the factory raises, or what it returns is not a float32 module in evaluation mode.
        SpecError: the module's ``forward`` does not take the inputs.
    """
    what = f"{path.name}:{params['factory']}"
    module = _made(path, params["factory"], what)
    _check_module(module, what)
    inputs = tuple(
        GraphTensor(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in params["inputs"]
    )
    outputs = tuple(params["outputs"])
    graph = ModuleGraph(module, [tensor.name for tensor in inputs], outputs, what=what)

    def run(feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        arguments = [torch.from_numpy(feeds[tensor.name]) for tensor in inputs]
        try:
            with torch.no_grad():
                results = graph(*arguments)
            return {name: np.asarray(result.detach()) for name, result in zip(outputs, results, strict=True)}
        except (SourceError, SpecError):
            raise
        except (Exception, SystemExit) as error:  # The user's code raises whatever it likes.
            raise GraphRunError(f"{type(error).__name__}: {error}\n{_tail(error, path)}") from error

    return Original(
        inputs=inputs,
        outputs=outputs,
        axes=axes_of(params["axes"]),
        run=run,
        exportable=lambda: graph,
        what=what,
        facts={
            "module": type(module).__name__,
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
        },
    )


class ModuleGraph(nn.Module):  # type: ignore[misc]  # torch is not followed.
    """The user's module, called with positional inputs and answering with a tuple in the order of the spec's outputs."""

    def __init__(self, model: Any, inputs: Sequence[str], outputs: Sequence[str], *, what: str) -> None:
        super().__init__()
        self.model = model
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._what = what
        self._by_name = _takes_by_name(model, inputs, what)

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """One tensor per output.

        Raises:
            SpecError: the module answers with other outputs than the spec names.
        """
        if self._by_name:
            results = self.model(**dict(zip(self._inputs, inputs, strict=True)))
        else:
            results = self.model(*inputs)
        return self._in_order(results)

    def _in_order(self, results: Any) -> tuple[Any, ...]:
        if isinstance(results, torch.Tensor):
            results = (results,)
        if isinstance(results, Mapping):
            if set(results) != set(self._outputs):
                raise self._other_outputs(f"a mapping with {', '.join(map(str, results)) or 'nothing'}")
            results = tuple(results[name] for name in self._outputs)
        if not isinstance(results, (tuple, list)):
            raise self._other_outputs(f"a {type(results).__name__}")
        if len(results) != len(self._outputs):
            raise self._other_outputs(f"{len(results)} tensor{'s' if len(results) != 1 else ''}")
        for result in results:
            if not isinstance(result, torch.Tensor):
                raise self._other_outputs(f"a {type(result).__name__} among its outputs")
        return tuple(results)

    def _other_outputs(self, seen: str) -> SpecError:
        return SpecError(
            f"forward of {self._what} returns {seen}; the spec's outputs are {', '.join(self._outputs)}",
            hint="name in outputs what forward returns: a tensor, a tuple in that order, or a dict with those names",
        )


def _takes_by_name(model: Any, inputs: Sequence[str], what: str) -> bool:
    """Whether ``forward`` names all of its parameters as the spec names the inputs; else they are given in order."""
    signature = inspect.signature(model.forward)
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if set(inputs) <= set(names):
        arguments: Callable[[], Any] = lambda: signature.bind(**dict.fromkeys(inputs))  # noqa: E731
    else:
        arguments = lambda: signature.bind(*inputs)  # noqa: E731
    try:
        arguments()
    except TypeError as error:
        raise SpecError(
            f"forward{signature} of {what} does not take the spec's inputs {', '.join(inputs)}: {error}",
            hint="list the inputs in the order of forward's parameters, or call them by their names",
        ) from error
    return set(inputs) <= set(names)


def _made(path: Path, factory: str, what: str) -> Any:
    """What the factory returns."""
    sys.path.insert(0, str(path.parent))
    try:
        specification = importlib.util.spec_from_file_location(_MODULE_NAME, path)
        assert specification is not None, path
        assert specification.loader is not None, path
        loaded = importlib.util.module_from_spec(specification)
        sys.modules[_MODULE_NAME] = loaded  # Dataclasses and pickles look for the module of their class.
        specification.loader.exec_module(loaded)
        function = getattr(loaded, factory, None)
        if not callable(function):
            defined = sorted(
                name for name, value in vars(loaded).items() if callable(value) and not name.startswith("_")
            )
            raise SourceError(
                f"{path.name} has no function {factory}; it has {', '.join(defined) or 'none'}",
                hint="source.module is path.py:factory",
            )
        return function()
    except SourceError:
        raise
    except (Exception, SystemExit) as error:  # The user's code raises whatever it likes.
        raise SourceError(
            f"{what} raised {type(error).__name__}: {error}\n{_tail(error, path)}",
            hint="the factory is called without arguments, with its file's directory first on sys.path; build relative paths "
            "from __file__, and name what it reads in source.files",
        ) from error
    finally:
        with suppress(ValueError):  # The user's code may have put another list there.
            sys.path.remove(str(path.parent))


def _check_module(module: Any, what: str) -> None:
    if not isinstance(module, nn.Module):
        raise SourceError(
            f"{what} returned {_described(module)}, not a torch.nn.Module",
            hint="return the module itself, with its weights loaded",
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise SourceError(
            f"{what} returned a TorchScript module, which cannot be traced",
            hint="return the torch.nn.Module that it was made of",
        )
    if training := [name for name, part in module.named_modules() if part.training]:
        where = f"its part {training[0]}" if training[0] else "it"
        raise SourceError(
            f"{what} returned a module in training mode ({where}); dropout and batch norm would be exported so",
            hint="return module.eval()",
        )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise SourceError(
                f"{what}: {name} has no values (device meta)",
                hint="load the weights before you return the module",
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise SourceError(
                f"{what}: {name} is {str(tensor.dtype).removeprefix('torch.')}; graphs are exported in float32",
                hint="return module.float(); the scheme of a variant decides what it is built in",
            )
        if tensor.device.type != "cpu":
            raise SourceError(f"{what}: {name} is on {tensor.device}", hint="return module.cpu()")
    module.requires_grad_(False)


def _described(value: Any) -> str:
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    return "None" if value is None else f"a {type(value).__name__}"


def _tail(error: BaseException, path: Path) -> str:
    """The innermost frames of the user's own file, then the error, as Python prints them."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(str(path.parent))
    ]
    lines = [
        f"  {Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames
    ]
    return "\n".join(lines[-3:])
