"""Makes the kit that ``gpu.py`` runs from on a machine with an NVIDIA GPU and no network: wheels and models.

Needs a package registry for the wheels and the project's own environment for the models; no GPU. The kit::

    wheels/            of Python 3.12 for x86-64, complete but for CUDA's libraries (--cuda-libraries adds them)
    models/PRECISION/  onnxruntime-genai's model with PagedAttention, fp16 and int4; cpu-int4 is for a rehearsal
    tokenizer/         of the checkpoint
    kit.json           every file with its size and SHA-256

``--parts DIR`` also cuts it into pieces of ``--part-mib`` that fit where only little can be carried at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from figures import exit_status, say

from enginesmith.build import build
from enginesmith.errors import OperatorError, ToolchainError
from enginesmith.plan import make_plan
from enginesmith.spec import ModelSpec
from enginesmith.spec_file import load_spec
from enginesmith.store import ArtifactStore
from enginesmith.triton.genai import GenaiLimits, Precision, export_model
from enginesmith.triton.package import TOKENIZER_FILES

PYTHON = "3.12"
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17)),
    *("manylinux2014_x86_64", "manylinux1_x86_64"),
)
"""What pip may take for the other machine; it matches each by its exact name."""
REQUIREMENTS = (
    "onnxruntime-genai-cuda==0.18.0",
    "onnxruntime-gpu==1.31.1",
    "numpy==1.26.4",
    *("click", "filelock", "grpcio", "jinja2", "ml-dtypes", "packaging", "protobuf", "psutil", "pydantic"),
    *("pyyaml", "rich", "safetensors", "tokenizers", "tritonclient[grpc,http]"),
)
"""What serving and measuring import; the versions of the rest are those of constraints.txt."""
WITHOUT_DEPENDENCIES = ("nvidia-pytriton==0.7.0",)
"""Only the tritonserver in it is run, which needs none of them."""
CUDA_LIBRARIES = (
    *("nvidia-cublas~=13.0", "nvidia-cuda-runtime~=13.0", "nvidia-cuda-nvrtc~=13.0"),
    *("nvidia-cufft~=12.0", "nvidia-curand~=10.0", "nvidia-cudnn-cu13~=9.0"),
)
"""What onnxruntime-gpu 1.31 asks for; a machine with PyTorch for CUDA 13 has them."""
MODELS: dict[str, Precision] = {"fp16": "fp16", "int4": "int4", "cpu-int4": "int4"}
LIMITS = GenaiLimits(slots=64, capacity=1024, reuse_tokens=16384)
_MIB = 1 << 20
_CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def fetch_wheels(directory: Path, *, cuda_libraries: bool) -> None:
    """Fill ``directory`` with wheels for the other machine.

    Raises:
        ToolchainError: pip found no such set of wheels.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _download(REQUIREMENTS, directory, "--constraint", str(_CONSTRAINTS))
    _download(WITHOUT_DEPENDENCIES, directory, "--no-deps")
    if cuda_libraries:
        _download(CUDA_LIBRARIES, directory)


def _download(requirements: Sequence[str], directory: Path, *options: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    command += ["--dest", str(directory), *options, *requirements]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ToolchainError(
            f"pip download ended with status {done.returncode}:\n{done.stderr.strip()}",
            hint="the wheels come from a package registry; this step needs one",
        )


def make_models(directory: Path, checkpoint: Path, names: Sequence[str]) -> None:
    """Fill ``models`` and ``tokenizer``; models that are there already stay.

    Raises:
        ToolchainError: onnxruntime-genai's model builder fails.
    """
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER_FILES:
        if (checkpoint / file).is_file():
            shutil.copyfile(checkpoint / file, tokenizer / file)
    for name in names:
        out = directory / "models" / name
        if (out / "genai_config.json").is_file():
            say(f"model {name}: there already")
            continue
        say(f"model {name}: exporting")
        export_model(
            checkpoint,
            out,
            precision=MODELS[name],
            provider="cpu" if name.startswith("cpu-") else "cuda",
            limits=LIMITS,
        )


def checkpoint_of(spec_path: Path, store_path: Path) -> Path:
    """The checkpoint of a spec; fetched if the store does not have it.

    Raises:
        EnginesmithError: it cannot be fetched.
    """
    spec = load_spec(spec_path)
    assert isinstance(spec, ModelSpec), "the demo model generates text"
    store = ArtifactStore(store_path, warn=say)
    plan = make_plan(spec, store, variants=(next(iter(spec.variants)),))
    (fetch,) = (step for step in plan.steps if step.kind == "fetch")
    return build([replace(plan, steps=(fetch,))], store).artifacts[fetch.key].path


def write_index(kit: Path) -> int:
    """Write ``kit.json``; returns the bytes of the kit."""
    files = sorted(file for file in kit.rglob("*") if file.is_file() and file.name != "kit.json")
    index = {
        str(file.relative_to(kit)): {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in files
    }
    (kit / "kit.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return sum(one["bytes"] for one in index.values() if isinstance(one["bytes"], int))


def cut(kit: Path, directory: Path, *, part_bytes: int, leave_out: Sequence[str]) -> int:
    """Cut a tar of the kit into ``directory/NN/part``; returns how many parts there are."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    left_out = [f"--exclude=./models/{name}" for name in leave_out]
    command = ["tar", "--create", "--directory", str(kit), *left_out, "."]
    count = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(part_bytes):
            count += 1
            folder = directory / f"{count:02}"
            folder.mkdir()
            (folder / "part").write_bytes(piece)
    if process.returncode != 0:
        raise OperatorError(f"tar ended with status {process.returncode}")
    return count


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def make(given: argparse.Namespace) -> int:
    """Make what the command line asks for, and say how big it is."""
    kit: Path = given.kit
    if not given.no_wheels:
        fetch_wheels(kit / "wheels", cuda_libraries=given.cuda_libraries)
    make_models(kit, checkpoint_of(given.spec, given.store), given.model)
    total = write_index(kit)
    for folder in sorted({file.relative_to(kit).parent for file in kit.rglob("*") if file.is_file()}):
        size = sum(file.stat().st_size for file in (kit / folder).iterdir() if file.is_file())
        say(f"{size / _MIB:8.1f} MiB  {folder}")
    say(f"{total / _MIB:8.1f} MiB  {kit} in all")
    if given.parts:
        count = cut(kit, given.parts, part_bytes=given.part_mib * _MIB, leave_out=given.leave_out)
        say(f"{count} parts of at most {given.part_mib} MiB in {given.parts}")
    return 0


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kit", type=Path, default=Path("build/gpu-kit"), metavar="DIR")
    parser.add_argument("--spec", type=Path, default=Path("models/smollm2-135m.yaml"), metavar="FILE")
    parser.add_argument("--store", type=Path, default=Path(".enginesmith"), metavar="DIR")
    parser.add_argument("--model", nargs="*", choices=tuple(MODELS), default=["fp16", "int4"])
    parser.add_argument("--no-wheels", action="store_true", help="only the models")
    parser.add_argument("--cuda-libraries", action="store_true", help="about 1 GB more")
    parser.add_argument("--parts", type=Path, metavar="DIR", help="cut the kit into pieces as well")
    parser.add_argument("--part-mib", type=int, default=58)
    parser.add_argument(
        "--leave-out", nargs="*", choices=tuple(MODELS), default=[], help="models that the pieces do not hold"
    )
    return exit_status(lambda: make(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
