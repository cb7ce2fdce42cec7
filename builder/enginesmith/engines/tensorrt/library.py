"""The two libraries that build TensorRT engines, and whether the one that a target needs is on this machine.

Owns what differs between them: module, version, which GPU a build needs, builder configuration. Imports neither of them
before ``load``, so that a plan can ask; the rest of the package sees one module object, which has the same API in both.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from packaging.version import Version

from enginesmith.engines.tensorrt_llm.toolchain import SeenGpu, describe_gpu, visible_gpus
from enginesmith.errors import ToolchainError
from enginesmith.platforms import TRITON_IMAGES, TritonImage

RTX_DISTRIBUTION = "tensorrt-rtx-cu12"
MISSING = "missing"
"""The version of a library that is not there."""
EXTRA = "pip install 'enginesmith[tensorrt]'"
_CHOICE_VARIABLE = "POLYGRAPHY_USE_TENSORRT_RTX"
# NVIDIA names the wheel after the CUDA that it is built for; its containers have the plain name.
_TENSORRT_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")

ConfigLoader = Callable[[Any, Any], Any]
"""From a builder and a network to a builder configuration, as Polygraphy's loaders."""


class Library(Protocol):
    """What builds engines: TensorRT, or TensorRT for RTX."""

    @property
    def runtime(self) -> str:
        """The runtime of the targets that it builds for."""

    @property
    def module(self) -> str:
        """The Python module with its API."""

    @property
    def times_kernels(self) -> bool:
        """Whether it measures kernels while it builds, so that a timing cache helps."""

    def installed_version(self) -> str | None:
        """The version that this Python environment has, or None. Imports nothing."""

    def require(self, version: str, capabilities: Sequence[int], *, image: TritonImage | None = None) -> None:
        """Return if this machine can build with this version for GPUs of these compute capabilities.

        Args:
            version: that of the plan; ``MISSING`` where there was none when it was made.
            image: the one that will serve, for the message.

        Raises:
            ToolchainError: it cannot; says all that is missing, what to install or which image has it.
        """

    def config(self, settings: Mapping[str, Any], capabilities: Sequence[int]) -> ConfigLoader:
        """Polygraphy's configuration loader for it, after ``load``."""


class TensorRt:
    """TensorRT 10.x and 11.x of NVIDIA's containers. Builds on a GPU of the kind that the plan is for."""

    runtime = "tensorrt"
    module = "tensorrt"
    times_kernels = True

    def installed_version(self) -> str | None:
        return _version_of(_TENSORRT_DISTRIBUTIONS) if _is_there(self.module) else None

    def require(self, version: str, capabilities: Sequence[int], *, image: TritonImage | None = None) -> None:
        problems, seen = [], self.installed_version()
        if seen is None:
            problems.append(f"this Python environment has no {self.module}")
        # Plans are read by exactly the version that wrote them.
        elif not same_version(seen, version):
            problems.append(f"TensorRT is {seen}{_image_with(seen)}")
        problems += _polygraphy_problems()
        gpus = visible_gpus()
        if not gpus:
            problems.append("nvidia-smi shows no GPU")
        elif gpus[0].compute_capability not in capabilities:
            problems.append(f"its GPU is {describe_gpu(gpus[0])}")
        if problems:
            names = ", ".join(f"SM{capability}" for capability in capabilities)
            wanted = "TensorRT" if version == MISSING else f"TensorRT {version}"
            raise ToolchainError(
                f"a plan needs {wanted} and a GPU of {names} to be built; on this machine: {'; '.join(problems)}",
                hint=f"{_where(version, image)}; `{EXTRA}` in it brings Polygraphy. Without a GPU, `enginesmith rehearse` "
                "runs all but the plan, and a target of runtime tensorrt_rtx builds ahead of time",
            )

    def config(self, settings: Mapping[str, Any], capabilities: Sequence[int]) -> ConfigLoader:  # noqa: ARG002 - its GPU
        from polygraphy.backend.trt import CreateConfig

        loader: ConfigLoader = CreateConfig(**settings)
        return loader


class TensorRtRtx:
    """TensorRT for RTX. Builds ahead of time for GPUs that need not be there; kernels are chosen on the user's GPU."""

    runtime = "tensorrt_rtx"
    module = "tensorrt_rtx"
    times_kernels = False

    def installed_version(self) -> str | None:
        return _version_of((RTX_DISTRIBUTION,)) if _is_there(self.module) else None

    def require(
        self,
        version: str,
        capabilities: Sequence[int],  # noqa: ARG002 - no GPU is needed.
        *,
        image: TritonImage | None = None,  # noqa: ARG002 - no image has it.
    ) -> None:
        seen, problems = self.installed_version(), []
        if seen is None:
            problems.append(f"this Python environment has no {RTX_DISTRIBUTION}")
        elif not same_version(seen, version):
            problems.append(f"it is {seen}, but the plan was made with {version}")
        problems += _polygraphy_problems()
        if problems:
            raise ToolchainError(
                f"an engine of TensorRT for RTX cannot be built here: {'; '.join(problems)}",
                hint=f"{EXTRA} (Linux on x86-64; no GPU is needed)",
            )

    def config(self, settings: Mapping[str, Any], capabilities: Sequence[int]) -> ConfigLoader:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        pairs = [divmod(capability, 10) for capability in capabilities]
        loader: ConfigLoader = CreateConfigRTX(compute_capabilities=pairs, **settings)
        return loader


LIBRARIES: Mapping[str, Library] = {library.runtime: library for library in (TensorRt(), TensorRtRtx())}
"""By the runtime of a target."""


def load(library: Library, version: str) -> Any:
    """The module of ``library``. Afterwards Polygraphy uses it in this process, which must not have used the other one.

    Raises:
        ToolchainError: it or Polygraphy does not load here, or is another version than ``version``.
    """
    wanted = library.runtime == TensorRtRtx.runtime
    os.environ[_CHOICE_VARIABLE] = str(int(wanted))
    try:
        import polygraphy.config

        module = importlib.import_module(library.module)
    except (ImportError, OSError) as error:  # OSError: its shared objects are missing or broken.
        raise ToolchainError(f"{library.module} does not load: {error}", hint=_where(version)) from error
    assert wanted == polygraphy.config.USE_TENSORRT_RTX, "Polygraphy was imported for the other library"
    if not same_version(module.__version__, version):
        raise ToolchainError(
            f"{library.module} is {module.__version__}, but version {version} is to build",
            hint=_where(version),
        )
    return module


def device_for(capabilities: Sequence[int]) -> SeenGpu | None:
    """The first GPU of this machine, if an engine for ``capabilities`` runs on it."""
    gpus = visible_gpus()
    return gpus[0] if gpus and gpus[0].compute_capability in capabilities else None


def same_version(first: str, second: str) -> bool:
    """Whether two versions are the same release; suffixes such as ``.post1`` do not count."""
    return MISSING not in (first, second) and Version(first).release == Version(second).release


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version_of(distributions: Sequence[str]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _polygraphy_problems() -> list[str]:
    return [] if _is_there("polygraphy") else ["this Python environment has no polygraphy"]


def _with_version(version: str) -> TritonImage | None:
    rows = (row for row in TRITON_IMAGES.values() if row.tensorrt and same_version(row.tensorrt, version))
    return next(rows, None)


def _image_with(version: str) -> str:
    row = _with_version(version)
    return f" (that of {row.image})" if row else ""


def _where(version: str, image: TritonImage | None = None) -> str:
    row = image or _with_version(version)
    return f"the image {row.image} has the right TensorRT" if row else EXTRA
