"""TensorRT that is missing, of another version or beside another GPU: one error, before anything is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tensorrt_standin as standin
from graph_project import write_graph_project
from tensorrt_cases import compile_graph, tiny_graph

from enginesmith.build import build
from enginesmith.engines.tensorrt.library import LIBRARIES, same_version
from enginesmith.engines.tensorrt.timing_cache import read_timing_cache
from enginesmith.errors import ToolchainError
from enginesmith.plan import make_plan
from enginesmith.platforms import TRITON_IMAGES
from enginesmith.spec_file import load_spec
from enginesmith.store import ArtifactStore

H100 = "NVIDIA H100 80GB HBM3, 9.0, 81559, 610.43.02"
L4 = "NVIDIA L4, 8.9, 23034, 610.43.02"
IN_IMAGE = "11.1.0.106"
TENSORRT: dict[str, Any] = {"runtime": "tensorrt", "version": IN_IMAGE, "compute_capabilities": [89]}


@pytest.fixture
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No nvidia-smi."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))


def on_python_path(monkeypatch: pytest.MonkeyPatch, *directories: Path) -> None:
    """For this process and for workers."""
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, directories)))
    for directory in directories:
        monkeypatch.syspath_prepend(str(directory))


def test_worker_without_tensorrt_for_rtx_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(standin.hide(tmp_path / "hide", "tensorrt_rtx")))
    with pytest.raises(ToolchainError, match="has no tensorrt-rtx-cu12") as caught:
        compile_graph(tmp_path / "step", tiny_graph("fp32"))
    assert "pip install 'enginesmith[tensorrt]'" in (caught.value.hint or "")


def test_worker_without_polygraphy_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(standin.hide(tmp_path / "hide", "polygraphy")))
    with pytest.raises(ToolchainError, match="this Python environment has no polygraphy") as caught:
        compile_graph(tmp_path / "step", tiny_graph("fp32"))
    assert "pip install 'enginesmith[tensorrt]'" in (caught.value.hint or "")


def test_library_that_does_not_load_is_an_error_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(standin.hide(tmp_path / "hide", "tensorrt_rtx_bindings")))
    with pytest.raises(ToolchainError, match="tensorrt_rtx does not load: No module named"):
        compile_graph(tmp_path / "step", tiny_graph("fp32"))


@pytest.mark.usefixtures("no_programs")
def test_machine_with_nothing_is_told_the_image_and_both_ways_out() -> None:
    with pytest.raises(ToolchainError) as caught:
        LIBRARIES["tensorrt"].require(IN_IMAGE, [90], image=TRITON_IMAGES["26.07"])
    assert caught.value.message == (
        "a plan needs TensorRT 11.1.0.106 and a GPU of SM90 to be built; on this machine: "
        "this Python environment has no tensorrt; nvidia-smi shows no GPU"
    )
    hint = caught.value.hint or ""
    for part in ("nvcr.io/nvidia/tritonserver:26.07-py3", "enginesmith rehearse", "tensorrt_rtx"):
        assert part in hint


def test_another_version_and_another_gpu_are_said_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_python_path(monkeypatch, standin.install(tmp_path / "site", version="10.14.1.48"))
    monkeypatch.setenv("PATH", str(standin.show_gpu(tmp_path / "bin", L4)))
    with pytest.raises(ToolchainError) as caught:
        LIBRARIES["tensorrt"].require(IN_IMAGE, [90])
    assert "TensorRT is 10.14.1.48; its GPU is NVIDIA L4 (SM89, 22 GiB)" in caught.value.message
    LIBRARIES["tensorrt"].require("10.14.1.48", [89])


def test_version_of_an_image_is_named_where_another_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_python_path(monkeypatch, standin.install(tmp_path / "site", version=IN_IMAGE))
    monkeypatch.setenv("PATH", str(standin.show_gpu(tmp_path / "bin", H100)))
    with pytest.raises(ToolchainError, match=r"TensorRT is 11\.1\.0\.106 \(that of .*tritonserver:26.07-py3"):
        LIBRARIES["tensorrt"].require("10.13.3.9", [90])


def test_post_releases_are_the_same_tensorrt() -> None:
    assert same_version("10.14.1.48.post1", "10.14.1.48")
    assert not same_version("10.14.1.48", "10.14.1")
    assert not same_version("missing", "missing")


def test_path_of_standard_tensorrt_runs_up_to_the_engine_that_needs_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TensorRT for RTX as a stand-in: parsed, built, timed and cached; its engine cannot be read without a driver."""
    site = standin.install(tmp_path / "site", version=IN_IMAGE)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("PATH", f"{standin.show_gpu(tmp_path / 'bin', L4)}:{Path(sys.executable).parent}")
    cache = tmp_path / "caches" / "tensorrt.cache"
    for attempt in ("first", "second"):
        with pytest.raises(ToolchainError, match="just built cannot be read on this GPU"):
            compile_graph(tmp_path / attempt, tiny_graph("fp16"), timing_cache=cache, **TENSORRT)
        assert (tmp_path / attempt / "out" / "model.plan").stat().st_size > 0
        assert read_timing_cache(cache).startswith(b"ptrt")


def test_damaged_timing_cache_costs_a_warning_and_no_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = standin.install(tmp_path / "site", version=IN_IMAGE)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("PATH", f"{standin.show_gpu(tmp_path / 'bin', L4)}:{Path(sys.executable).parent}")
    cache = tmp_path / "tensorrt.cache"
    cache.write_bytes(b"half a cache")
    with pytest.raises(ToolchainError, match="just built"):
        compile_graph(tmp_path / "step", tiny_graph("fp32"), timing_cache=cache, **TENSORRT)
    assert f"the timing cache {cache} is damaged" in (tmp_path / "step" / "log").read_text()
    assert read_timing_cache(cache).startswith(b"ptrt")


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("toolchain", ["26.07", "25.10"])
def test_build_is_refused_before_its_first_step(toolchain: str, tmp_path: Path) -> None:
    targets = [{"runtime": "tensorrt", "toolchain": toolchain, "gpu": "l4"}]
    spec = load_spec(write_graph_project(tmp_path, scheme="fp16", targets=targets))
    store = ArtifactStore(tmp_path / "store")
    try:
        plan = make_plan(spec, store)
        assert plan.step("compile_tensorrt", "fp16", "tensorrt").params["version"] == (
            TRITON_IMAGES[toolchain].tensorrt or "missing"
        )
        with pytest.raises(ToolchainError, match="a plan needs TensorRT") as caught:
            build([plan], store)
        assert f"tritonserver:{toolchain}-py3" in (caught.value.hint or "")
        assert not [step for step in plan.steps if store.get(step.key)]
    finally:
        store.digests.close()
