"""A network becomes engine bytes: builder configuration, timing cache, progress, and TensorRT's errors in our words.

Uses the library that ``library.load`` chose, so it is imported in the worker only.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginesmith.engines.tensorrt.library import Library
from enginesmith.engines.tensorrt.network import ParsedNetwork
from enginesmith.engines.tensorrt.profiles import ShapeRange
from enginesmith.engines.tensorrt.timing_cache import add_to_timing_cache, read_timing_cache
from enginesmith.errors import ToolchainError

OnProgress = Callable[[float | None, str], None]

# Said of a machine without a driver while it builds ahead of time, which needs none.
_NO_DRIVER = ("cudaError 35", "CUDA driver version is insufficient")


@dataclass(frozen=True)
class BuilderOptions:
    """What of a target reaches the builder; None leaves TensorRT's default."""

    optimization_level: int | None
    workspace_bytes: int | None


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine."""

    plan: Any
    """TensorRT's buffer."""
    seconds: float
    timing_cache: dict[str, Any]
    """``used``; ``reason`` where it is not, else ``bytes_before`` and ``bytes_after``."""


def build_engine(
    trt: Any,
    library: Library,
    parsed: ParsedNetwork,
    *,
    profile: Mapping[str, ShapeRange],
    capabilities: Sequence[int],
    options: BuilderOptions,
    timing_cache: Path,
    on_progress: OnProgress,
) -> BuiltEngine:
    """Build the engine, and add what was timed to ``timing_cache``.

    Raises:
        ToolchainError: TensorRT does not build it; says what TensorRT says.
    """
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.exception import PolygraphyException

    recorder = _error_recorder(trt)
    parsed.builder.error_recorder = recorder
    settings = _settings(trt, profile, options, monitor=_progress_monitor(trt, on_progress))
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # Polygraphy sets a timing cache in any case; TensorRT for RTX calls that deprecated.
            warnings.filterwarnings("ignore", message=".*Deprecated in TensorRT", category=DeprecationWarning)
            config = library.config(settings, capabilities)(parsed.builder, parsed.network)
            # FP32 means FP32, as on every other runtime: who wants less asks for fp16 or bf16.
            config.clear_flag(trt.BuilderFlag.TF32)
            known = _use_timing_cache(config, timing_cache) if library.times_kernels else b""
            plan = EngineBytesFromNetwork((parsed.builder, parsed.network, parsed.parser), config)()
    except PolygraphyException as error:
        said = [text for text in recorder.texts if not any(part in text for part in _NO_DRIVER)]
        raise ToolchainError(
            f"TensorRT {trt.__version__} does not build the engine: {'; '.join(said) or error}",
            hint="its log is the step's log; what a GPU cannot execute is refused by `enginesmith plan`",
        ) from error
    seconds = time.perf_counter() - started
    return BuiltEngine(plan, seconds, _keep_timings(config, library, timing_cache, known=known))


def _settings(
    trt: Any, profile: Mapping[str, ShapeRange], options: BuilderOptions, *, monitor: Any
) -> dict[str, Any]:
    from polygraphy.backend.trt import Profile

    shapes = Profile()
    for name, shape in profile.items():
        shapes.add(name, shape.min, shape.opt, shape.max)
    settings: dict[str, Any] = {
        "profiles": [shapes],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "progress_monitor": monitor,
    }
    if options.optimization_level is not None:
        settings["builder_optimization_level"] = options.optimization_level
    if options.workspace_bytes is not None:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace_bytes}
    return settings


def _use_timing_cache(config: Any, path: Path) -> bytes:
    known = read_timing_cache(path)
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return known


def _keep_timings(config: Any, library: Library, path: Path, *, known: bytes) -> dict[str, Any]:
    if not library.times_kernels:
        return {"used": False, "reason": f"{library.runtime} times no kernels while it builds"}

    def combine(fresh: bytes, kept: bytes) -> bytes:
        cache = config.create_timing_cache(fresh)
        cache.combine(config.create_timing_cache(kept), ignore_mismatch=False)
        return bytes(cache.serialize())

    size = add_to_timing_cache(path, bytes(config.get_timing_cache().serialize()), combine)
    return {"used": True, "bytes_before": len(known), "bytes_after": size}


class PhaseProgress:
    """The share of a build that is done, from nested phases of known length. Knows nothing of TensorRT."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        """Parent, steps, steps done."""
        self._reported = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self._phases[phase] = (parent, max(steps, 1), 0)
        self._report(phase)

    def step(self, phase: str, index: int) -> None:
        parent, steps, _ = self._phases[phase]
        self._phases[phase] = (parent, steps, min(index + 1, steps))
        self._report(phase)

    def finish(self, phase: str) -> None:
        self._phases.pop(phase, None)

    def _report(self, phase: str) -> None:
        fraction, name = 0.0, phase
        while True:
            parent, steps, done = self._phases[name]
            fraction = min((done + fraction) / steps, 1.0)
            if parent is None or parent not in self._phases:
                break
            name = parent
        # Phases run side by side on several threads; a bar that goes back tells nobody anything.
        if fraction - self._reported >= 0.01 or self._reported == 0.0:
            self._reported = max(fraction, self._reported)
            self._on_progress(self._reported, phase)


def _progress_monitor(trt: Any, on_progress: OnProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """TensorRT's view of ``PhaseProgress``."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._progress = PhaseProgress(on_progress)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._progress.step(phase_name, step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._progress.finish(phase_name)

    return Monitor()


def _error_recorder(trt: Any) -> Any:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        """Keeps what TensorRT reports; Polygraphy's exception says only that there is no engine."""

        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._errors: list[tuple[Any, str]] = []

        @property
        def texts(self) -> list[str]:
            return list(dict.fromkeys(text for _, text in self._errors))

        def report_error(self, code: Any, desc: str) -> bool:
            self._errors.append((code, desc))
            return False

        def num_errors(self) -> int:
            return len(self._errors)

        def get_error_code(self, index: int) -> Any:
            return self._errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self._errors.clear()

    return Recorder()
