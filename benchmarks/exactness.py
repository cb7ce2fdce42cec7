"""How exactly engines compute what PyTorch computes from the same integers, and what that exactness is worth.

First the figures that the build measured on every release: exact mode against PyTorch (the lowering), PyTorch against
itself under rounding noise, and fast mode against exact mode (what the runtime adds on its own). Then, for schemes that
round activations to a fixed grid, the model cut to its first layers: the engine and PyTorch, both in float32, against
PyTorch in float64. See benchmarks/README.md for how to read it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from figures import Bar, Outcome, print_table, run_benchmark, say
from releases import Project, Release, add_project_options, project_from, published_releases
from truncation import Noise, layer_count, write_truncated

from enginesmith.engines.onnxruntime import lower
from enginesmith.schemes import SCHEMES
from enginesmith.torch_models import load_model
from enginesmith.verify.gate import NOISE_FACTOR
from enginesmith.verify.measure import teacher_forced
from enginesmith.verify.reference import load_reference, scores_of_checkpoint
from enginesmith.verify.scores import Scores, scores_of_windows

MIN_TOP1 = 0.995
MAX_MEAN_LOGPROB_DELTA = 0.01
MAX_BASELINE_LOGIT_DELTA = 0.01
MIN_POSITIONS = 2000
FLOAT_BITS = 16
"""Schemes with narrower activations round them to a fixed grid."""
DEPTHS = (1, 2, 4, 12, 30)
NOISE = Noise(relative=1e-7)


@dataclass(frozen=True)
class Settings:
    """How much to compare."""

    depths: tuple[int, ...]
    windows: int


RECORD = Settings(depths=DEPTHS, windows=2)
QUICK = Settings(depths=(1, 2), windows=1)


@dataclass(frozen=True)
class Closeness:
    """How far two sets of scores are apart."""

    top1_agreement: float
    mean_logprob_delta: float
    median_logprob_delta: float
    """Plain float noise where fewer than half of the positions were touched by a changed rounding step."""


@dataclass(frozen=True)
class Depth:
    """One truncated model, computed four times; how far the results are apart."""

    layers: int
    engine_from_float64: Closeness
    """The exact-mode engine, against PyTorch in float64."""
    pytorch_from_float64: Closeness
    """PyTorch in float32, against PyTorch in float64."""
    engine_from_pytorch: Closeness
    """The exact-mode engine, against PyTorch in float32."""
    noisy_from_pytorch: Closeness
    """PyTorch in float32 with ``NOISE`` on its embeddings, against PyTorch in float32."""


@dataclass(frozen=True)
class _LowerContext:
    """What the ``lower`` step is given when it runs outside of a build."""

    inputs: Mapping[str, Path]
    out: Path
    scratch: Path
    params: Mapping[str, Any]

    def progress(self, fraction: float | None, note: str = "") -> None:
        """Nobody looks at it."""


def measure(project: Project) -> Outcome:
    """What the build measured, then the series over depth for every variant that rounds activations."""
    settings = QUICK if project.quick else RECORD
    releases = published_releases(project)
    measured = {release.variant: _measured(release) for release in releases}
    _show_measured(measured)
    series: dict[str, list[Depth]] = {}
    for release in releases:
        if SCHEMES[release.scheme].activation_bits < FLOAT_BITS:
            series[release.variant] = _depth_series(release, settings)
            _show_series(release.variant, series[release.variant])
    figures = {
        "variants": measured,
        "by_depth": {name: [asdict(depth) for depth in depths] for name, depths in series.items()},
    }
    positions = settings.windows * (_windows(releases[0]).shape[1] - 1)
    described = asdict(settings) | {
        "noise": asdict(NOISE),
        "positions_by_depth": positions,
    }
    return Outcome("exactness", described, figures, _bars(releases))


def _measured(release: Release) -> dict[str, Any]:
    facts = release.facts("measure")
    names = ("exact", "noise", "fast_cost", "quality", "perplexity", "baseline_perplexity")
    return {"scheme": release.scheme} | {name: facts.get(name) for name in names}


def _windows(release: Release) -> npt.NDArray[np.int64]:
    """Token windows int64 [n, length] of the build's own evaluation text."""
    windows, _ = load_reference(release.artifacts["shared reference"].path)
    return windows


def _depth_series(release: Release, settings: Settings) -> list[Depth]:
    checkpoint = release.artifacts["quantize"].path
    windows = _windows(release)[: settings.windows]
    whole = layer_count(checkpoint)
    depths = sorted({min(depth, whole) for depth in settings.depths})
    series = []
    for layers in depths:
        say(f"{release.variant}: first {layers} of {whole} layers")
        with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as directory, _quiet():
            series.append(_depth(checkpoint, windows, Path(directory), layers=layers))
    return series


def _depth(checkpoint: Path, windows: npt.NDArray[np.int64], directory: Path, *, layers: int) -> Depth:
    plain = write_truncated(checkpoint, directory / "plain", layers=layers)
    noisy = write_truncated(checkpoint, directory / "noisy", layers=layers, noise=NOISE)
    engine = _engine_scores(plain, windows, directory)
    pytorch = scores_of_checkpoint(plain, windows)
    exact = _float64_scores(plain, windows)
    return Depth(
        layers,
        engine_from_float64=_closeness(exact, engine),
        pytorch_from_float64=_closeness(exact, pytorch),
        engine_from_pytorch=_closeness(pytorch, engine),
        noisy_from_pytorch=_closeness(pytorch, scores_of_checkpoint(noisy, windows)),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt announces every quantizer it inserts; shown only when something fails."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    except BaseException:
        say(said.getvalue())
        raise


def _engine_scores(checkpoint: Path, windows: npt.NDArray[np.int64], directory: Path) -> Scores:
    """The scores of the exact-mode engine that is lowered from ``checkpoint``."""
    out, scratch = directory / "engine", directory / "scratch"
    out.mkdir()
    scratch.mkdir()
    lower.run(_LowerContext({"checkpoint": checkpoint}, out, scratch, {"mode": "exact"}))
    engine = json.loads((out / "engine.json").read_text(encoding="utf-8"))
    return scores_of_windows(windows, teacher_forced(out / "exact.onnx", engine))


def _float64_scores(checkpoint: Path, windows: npt.NDArray[np.int64]) -> Scores:
    """The scores of PyTorch computing everything in float64, with ModelOpt's quantizers."""
    import modelopt.torch.quantization as mtq
    import torch

    model = load_model(checkpoint)
    mtq.fold_weight(model)
    model = model.double()

    def logits_of_tokens(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        output = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
        logits: npt.NDArray[np.float32] = output.logits[0].float().numpy()
        return logits

    with torch.inference_mode():
        return scores_of_windows(windows, logits_of_tokens)


def _closeness(reference: Scores, candidate: Scores) -> Closeness:
    deltas = np.abs(reference.logprob - candidate.logprob)
    return Closeness(
        top1_agreement=float(np.mean(reference.top1 == candidate.top1)),
        mean_logprob_delta=float(deltas.mean()),
        median_logprob_delta=float(np.median(deltas)),
    )


def _bars(releases: Sequence[Release]) -> list[Bar]:
    bars = []
    for release in releases:
        exact = release.facts("measure")["exact"]
        name = release.variant
        if release.scheme == "none":
            largest = exact["max_logit_delta"]
            bars.append(Bar(f"{name}: max |delta logit|", "at most", MAX_BASELINE_LOGIT_DELTA, largest))
            bars.append(Bar(f"{name}: token positions", "at least", MIN_POSITIONS, exact["positions"]))
            continue
        top1, delta = exact["top1_agreement"], exact["mean_logprob_delta"]
        bars.append(Bar(f"{name}: lowering, top-1 agreement", "at least", MIN_TOP1, top1))
        bars.append(Bar(f"{name}: lowering, mean |delta log-prob|", "at most", MAX_MEAN_LOGPROB_DELTA, delta))
        if noise := release.facts("measure").get("noise"):
            bars += _noise_bars(name, exact, noise)
    return bars


def _noise_bars(name: str, exact: Mapping[str, float], noise: Mapping[str, float]) -> list[Bar]:
    """The engine's distance from PyTorch in multiples of PyTorch's distance from itself under rounding noise."""
    figures = (
        ("top-1 disagreement", 1 - exact["top1_agreement"], 1 - noise["top1_agreement"]),
        ("mean |delta log-prob|", exact["mean_logprob_delta"], noise["mean_logprob_delta"]),
    )
    return [
        Bar(
            f"{name}: {figure} against PyTorch's own noise",
            "at most",
            NOISE_FACTOR,
            engine / own if own else None,
            "x",
        )
        for figure, engine, own in figures
    ]


def _show_measured(measured: Mapping[str, Mapping[str, Any]]) -> None:
    headings = (
        "variant",
        "positions",
        "lowering top-1",
        "mean |dlogp|",
        "max |dlogit|",
        "own noise top-1",
        "own |dlogp|",
        "fast top-1",
        "fast mean |dlogp|",
        "perplexity",
        "unquantized",
    )
    rows = []
    for name, figure in measured.items():
        exact, noise, fast = figure["exact"], figure["noise"], figure["fast_cost"]
        rows.append(
            (
                name,
                str(exact["positions"]),
                f"{exact['top1_agreement']:.2%}",
                f"{exact['mean_logprob_delta']:.2g}",
                f"{exact['max_logit_delta']:.2g}",
                f"{noise['top1_agreement']:.2%}" if noise else "-",
                f"{noise['mean_logprob_delta']:.2g}" if noise else "-",
                f"{fast['top1_agreement']:.2%}" if fast else "-",
                f"{fast['mean_logprob_delta']:.2g}" if fast else "-",
                f"{figure['perplexity']:.2f}",
                f"{figure['baseline_perplexity']:.2f}",
            )
        )
    print_table("measured by the build", headings, rows)


def _show_series(variant: str, series: Sequence[Depth]) -> None:
    columns = {
        "engine / float64": [depth.engine_from_float64 for depth in series],
        "PyTorch / float64": [depth.pytorch_from_float64 for depth in series],
        "engine / PyTorch": [depth.engine_from_pytorch for depth in series],
        "PyTorch / noise": [depth.noisy_from_pytorch for depth in series],
    }
    rows = [
        [
            str(depth.layers),
            *(
                f"{column[index].top1_agreement:.2%}  {column[index].mean_logprob_delta:.2g}"
                for column in columns.values()
            ),
        ]
        for index, depth in enumerate(series)
    ]
    print_table(f"{variant}, first layers only: top-1 agreement, mean |dlogp|", ["layers", *columns], rows)


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_project_options(parser)
    given = parser.parse_args()
    return run_benchmark(lambda: measure(project_from(given)))


if __name__ == "__main__":
    sys.exit(main())
