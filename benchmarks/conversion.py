"""How fast a checkpoint becomes a TensorRT-LLM checkpoint, beside ``cp`` of the same bytes, and how much memory it takes.

Makes a sharded checkpoint with the geometry of Llama 7B and random BF16 bytes, converts it to four ranks and copies it,
in turn and each in a process of its own. Before every run the other's output is gone, the disk is quiet and the
source is out of the page cache; a run ends when its bytes are on the disk. Measured at one and at two times
``--layers``: time may grow with the size, memory must not. ModelOpt's exporter converts what it can within a limit of
memory, up to the layers that ``--modelopt-layers`` gives; it needs the model in memory, and that is part of its time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from figures import (
    Bar,
    Outcome,
    Spread,
    bar_of_spread,
    print_table,
    run_benchmark,
    say,
    spread_of,
    spread_of_ratios,
)

from enginesmith.checkpoints.tensors import INDEX_FILE
from enginesmith.checkpoints.validate import dimensions_of, expected_shapes
from enginesmith.checkpoints.writer import PlannedTensor, write_safetensors
from enginesmith.errors import OperatorError

MIN_THROUGHPUT = 0.7
MAX_PEAK_BYTES = 3 << 29
MAX_GROWTH_BYTES = 64 << 20
"""By how much the peak may differ at twice the size: the noise of an allocator, and a plan of twice as many lines."""
TENSOR_PARALLEL = 4
SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 64 << 20
GIB = 1 << 30

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}

_PRINT_PEAK = """
status = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")))
"""
_CONVERT = f"""
import sys
from pathlib import Path
from enginesmith.engines.tensorrt_llm.convert import convert_checkpoint
from enginesmith.engines.tensorrt_llm.mapping import Mapping
convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), mapping=Mapping({TENSOR_PARALLEL}), workers=int(sys.argv[3]))
{_PRINT_PEAK}"""
_MODELOPT = f"""
import contextlib, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from modelopt.torch.export import export_tensorrt_llm_checkpoint
with contextlib.redirect_stdout(sys.stderr):
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    export_tensorrt_llm_checkpoint(model, "llama", torch.bfloat16, sys.argv[2], inference_tensor_parallel={TENSOR_PARALLEL})
{_PRINT_PEAK}"""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    layers: int
    rounds: int
    workers: int
    directory: Path
    modelopt_layers: tuple[int, ...]
    modelopt_memory_gib: float


@dataclass(frozen=True)
class Run:
    """One run of one program."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Size:
    """What was found at one size of the model."""

    layers: int
    source_bytes: int
    copy_s: Spread
    convert_s: Spread
    throughput: Spread
    """Of the conversion, as a multiple of that of ``cp`` in the same round."""
    peak_bytes: int


def measure(settings: Settings) -> Outcome:
    """Both sizes, then ModelOpt's exporter."""
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=settings.directory) as scratch:
        sizes = [_measure_size(settings, Path(scratch), layers=factor * settings.layers) for factor in (1, 2)]
        modelopt = [_modelopt(settings, Path(scratch), layers=layers) for layers in settings.modelopt_layers]
    _show(sizes, modelopt)
    figures = {"sizes": [asdict(size) for size in sizes], "modelopt": modelopt}
    kept = {
        "layers": settings.layers,
        "rounds": settings.rounds,
        "workers": settings.workers,
        "tensor_parallel": TENSOR_PARALLEL,
        "modelopt_memory_gib": settings.modelopt_memory_gib,
    }
    return Outcome("conversion", kept, figures, _bars(sizes))


def _bars(sizes: Sequence[Size]) -> list[Bar]:
    bars = []
    for size in sizes:
        name = f"{size.source_bytes / 1e9:.1f} GB"
        bars.append(
            bar_of_spread(
                f"{name}: throughput beside cp", size.throughput, relation="at least", limit=MIN_THROUGHPUT
            )
        )
        peak_mib = round(size.peak_bytes / 2**20)
        bars.append(Bar(f"{name}: peak memory", "at most", MAX_PEAK_BYTES / 2**20, peak_mib, " MiB"))
    growth_mib = round((sizes[1].peak_bytes - sizes[0].peak_bytes) / 2**20)
    return [
        *bars,
        Bar(
            "growth of peak memory at twice the size", "at most", MAX_GROWTH_BYTES / 2**20, growth_mib, " MiB"
        ),
    ]


def _measure_size(settings: Settings, scratch: Path, *, layers: int) -> Size:
    source = make_checkpoint(scratch / "source", layers)
    source_bytes = sum(path.stat().st_size for path in source.iterdir())
    copies: list[Run] = []
    conversions: list[Run] = []
    for number in range(1, settings.rounds + 1):
        say(f"{layers} layers, {source_bytes / 1e9:.1f} GB: round {number}/{settings.rounds}")
        copies.append(_timed(["cp", "-r", str(source), str(scratch / "copy")], source, scratch / "copy"))
        command = [sys.executable, "-c", _CONVERT, str(source), str(scratch / "ranks"), str(settings.workers)]
        conversions.append(_timed(command, source, scratch / "ranks"))
    shutil.rmtree(source)
    return Size(
        layers,
        source_bytes,
        spread_of([run.seconds for run in copies]),
        spread_of([run.seconds for run in conversions]),
        spread_of_ratios([run.seconds for run in copies], [run.seconds for run in conversions]),
        max(run.peak_bytes for run in conversions),
    )


def _modelopt(settings: Settings, scratch: Path, *, layers: int) -> dict[str, Any]:
    """ModelOpt's exporter once: seconds and peak memory, or how it ended."""
    say(f"ModelOpt: {layers} layers")
    source = make_checkpoint(scratch / "source", layers)
    limit_bytes = int(settings.modelopt_memory_gib * GIB)
    command = [sys.executable, "-c", _MODELOPT, str(source), str(scratch / "ranks")]
    source_bytes = sum(path.stat().st_size for path in source.iterdir())
    found: dict[str, Any] = {"layers": layers, "source_bytes": source_bytes}
    try:
        found |= asdict(_timed(command, source, scratch / "ranks", memory_bytes=limit_bytes))
    except OperatorError as error:
        found["failed"] = error.message.strip().splitlines()[-1]
    shutil.rmtree(source)
    return found


def _timed(command: Sequence[str], source: Path, out: Path, *, memory_bytes: int | None = None) -> Run:
    """``command`` until its output is on the disk; the output is removed afterwards.

    Raises:
        OperatorError: it failed; the message is the end of its stderr.
    """

    def limit_memory() -> None:
        if memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))

    os.sync()
    _evict(source)
    started_s = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit_memory)
    _sync(out)
    seconds = time.perf_counter() - started_s
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode != 0:
        raise OperatorError(f"{command[0]} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return Run(seconds, int(done.stdout.split()[-1]) if done.stdout.strip() else 0)


def _evict(directory: Path) -> None:
    """Take the files of ``directory`` out of the page cache, so that every run reads them from the disk."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(directory: Path) -> None:
    for path in directory.glob("*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def make_checkpoint(directory: Path, layers: int) -> Path:
    """``directory``, filled with a sharded checkpoint of random bytes."""
    directory.mkdir()
    config = CONFIG | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes("LlamaForCausalLM", dimensions_of(config, "LlamaForCausalLM", directory))
    shards: list[list[PlannedTensor]] = [[]]
    for tensor in (PlannedTensor(name, "BF16", shape) for name, shape in shapes.items()):
        if sum(held.nbytes for held in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(
            directory / file, shard, pieces=_random_pieces(shard, random), metadata={"format": "pt"}
        )
        weight_map |= {tensor.name: file for tensor in shard}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def _random_pieces(
    shard: Sequence[PlannedTensor], random: np.random.Generator
) -> Iterator[npt.NDArray[np.uint8]]:
    left = sum(tensor.nbytes for tensor in shard)
    while left:
        piece = random.integers(0, 256, min(left, PIECE_BYTES), dtype=np.uint8)
        left -= piece.size
        yield piece


def _show(sizes: Sequence[Size], modelopt: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            f"{size.layers} layers",
            f"{size.source_bytes / 1e9:.1f} GB",
            str(size.copy_s),
            str(size.convert_s),
            str(size.throughput),
            f"{size.peak_bytes / 2**20:.0f} MiB",
        )
        for size in sizes
    ]
    headings = ("model", "source", "cp, s", "conversion, s", "throughput / cp", "peak memory")
    print_table(f"conversion to tensor parallelism {TENSOR_PARALLEL}", headings, rows)
    if modelopt:
        print_table(
            "ModelOpt's exporter (with loading the model)",
            ("model", "source", "seconds", "peak memory"),
            [_modelopt_cells(found) for found in modelopt],
        )


def _modelopt_cells(found: dict[str, Any]) -> tuple[str, str, str, str]:
    name, source = f"{found['layers']} layers", f"{found['source_bytes'] / 1e9:.1f} GB"
    if "failed" in found:
        return name, source, "failed", found["failed"]
    return name, source, f"{found['seconds']:.1f}", f"{found['peak_bytes'] / 2**20:.0f} MiB"


def _settings() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32, help="layers of the smaller model; 32 are 13.5 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="threads of the conversion")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="where four models fit"
    )
    parser.add_argument(
        "--modelopt-layers", type=int, action="append", default=[], metavar="N", help="repeatable"
    )
    parser.add_argument(
        "--modelopt-memory-gib", type=float, default=16.0, help="what its process may allocate"
    )
    given = parser.parse_args()
    return Settings(
        given.layers,
        given.rounds,
        given.workers,
        given.directory,
        tuple(given.modelopt_layers),
        given.modelopt_memory_gib,
    )


def main() -> int:
    """Measure what the command line asks for."""
    settings = _settings()
    return run_benchmark(lambda: measure(settings))


if __name__ == "__main__":
    sys.exit(main())
