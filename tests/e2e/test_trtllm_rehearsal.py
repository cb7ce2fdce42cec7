"""Rehearsals of TensorRT-LLM repositories in a real tritonserver: what passes, and each fault that must stop a build."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "builder"))

from trtllm_deployment import Context, assembled, deployment, step_params

import enginesmith
from enginesmith.engines.onnxruntime import lower
from enginesmith.errors import EnginesmithError, GateError, ServerError
from enginesmith.triton.placement import contents_digest, tree_contents
from enginesmith.triton.server import TritonServer
from enginesmith.triton.trtllm import rehearse
from enginesmith.triton.trtllm.asking import Asking
from enginesmith.triton.trtllm.wiring import read_configs

pytestmark = [pytest.mark.server, pytest.mark.model]


@dataclass(frozen=True)
class Built:
    """What a rehearsal reads."""

    checkpoint: Path
    repository: Path
    engine: Path
    params: dict[str, Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("built")
    checkpoint, repository, params = deployment(root)
    context = Context(root / "lower", {"mode": "exact"}, {"checkpoint": checkpoint})
    lower.run(context)
    return Built(checkpoint, repository, context.out, params)


def run_rehearsal(
    root: Path, built: Built, *, repository: Path | None = None, echo: bool = False, **params: Any
) -> dict[str, Any]:
    inputs = {"repository": repository or built.repository, "checkpoint": built.checkpoint}
    if not echo:
        inputs["engine"] = built.engine
    context = Context(root, built.params | params | {"server": None}, inputs)
    rehearse.run(context)
    return dict(json.loads((context.out / "rehearsal.json").read_text()))


def test_a_right_repository_passes_and_is_named_by_its_bytes(tmp_path: Path, built: Built) -> None:
    before = tree_contents(built.repository)
    document = run_rehearsal(tmp_path / "rehearse", built)
    assert document["passed"] is True
    assert document["played_by"] == "onnxruntime twin"
    assert document["package_digest"] == contents_digest(before)
    assert document["not_rehearsed"] == ["tensorrt_llm/1/rank*.engine", "tensorrt_llm/1/config.json"]
    checks = {check["name"]: check for check in document["checks"]}
    assert checks["tensorrt_llm_bls: cancelled"]["seen"] == "cancelled after 3 tokens"
    assert checks["ensemble: stop word"]["expected"] != checks["ensemble: without the prompt"]["expected"]
    assert checks["ensemble: bad word"]["expected"] != checks["ensemble: without the prompt"]["expected"]
    assert checks["ensemble: bias"]["expected"] != checks["ensemble: without the prompt"]["expected"]
    assert "👩‍🚀" in checks["tensorrt_llm_bls: stream of characters of many bytes"]["seen"]
    assert tree_contents(built.repository) == before


def test_an_echo_plays_where_there_is_no_twin_and_the_report_says_so(tmp_path: Path, built: Built) -> None:
    assert run_rehearsal(tmp_path / "rehearse", built, echo=True)["played_by"] == "echo"


def test_streams_that_accumulate_pass(tmp_path: Path, built: Built) -> None:
    params = step_params({"accumulate_tokens": True, "model_prefix": "grow-"})
    repository = assembled(tmp_path, built.checkpoint, params)
    document = run_rehearsal(tmp_path / "rehearse", built, repository=repository, **params)
    streams = [check for check in document["checks"] if "responses that grow" in check["expected"]]
    assert len(streams) == 2


def test_a_deployment_without_streams_passes_and_refuses_them(tmp_path: Path, built: Built) -> None:
    params = step_params({"streaming": False})
    repository = assembled(tmp_path, built.checkpoint, params)
    document = run_rehearsal(tmp_path / "rehearse", built, repository=repository, **params)
    (stream,) = [check for check in document["checks"] if check["name"] == "tensorrt_llm_bls: stream"]
    assert "decoupled" in stream["seen"]


def test_watching_for_clients_that_go_away_never_touches_a_request_that_ended(
    tmp_path: Path, built: Built
) -> None:
    """Asking tritonserver 2.51 whether an ended request was cancelled crashes it; here BLS asks all the time."""
    params = step_params({"cancellation_check_period_ms": 1})
    repository = assembled(tmp_path, built.checkpoint, params)
    configs = read_configs(repository)
    served = tmp_path / "served"
    rehearse.place_with_stand_in(
        repository, served, configs["tensorrt_llm"], engine=built.engine, played=tmp_path / "played"
    )
    sources = Path(enginesmith.__file__).parents[1]
    with TritonServer(served, python_path=[sources]) as server:
        server.wait_ready()
        ask = Asking(server.grpc_url, server.http_url, entries=configs, decoupled=True)

        def one(number: int) -> str | None:
            inputs = {"max_tokens": (2,), "stream": (number % 2 == 0,)}
            prompt = b"hello" if number % 5 else b"\xff"
            return ask("tensorrt_llm_bls", prompt, inputs=inputs).refusal

        with ThreadPoolExecutor(6) as pool:
            refusals = list(pool.map(one, range(200)))
        assert server.server_version()
    assert [number for number, refusal in enumerate(refusals) if refusal] == list(range(0, 200, 5))


def edited(path: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(repository: Path) -> None:
        file = repository / path
        text = file.read_text()
        assert old in text
        file.unlink()
        file.write_text(text.replace(old, new))

    return edit


def without_tokenizer(repository: Path) -> None:
    (repository / "postprocessing" / "1" / "tokenizer.json").unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], type[EnginesmithError], str]] = {
    "a tensor of another type in a step of the ensemble": (
        edited(
            "postprocessing/config.pbtxt",
            'name: "TOKENS_BATCH"\n  data_type: TYPE_INT32',
            'name: "TOKENS_BATCH"\n  data_type: TYPE_INT64',
        ),
        GateError,
        "_TOKENS_BATCH is TYPE_INT32 of tensorrt_llm, but postprocessing takes TOKENS_BATCH as TYPE_INT64",
    ),
    "a placeholder": (
        edited(
            "tensorrt_llm/config.pbtxt",
            'string_value: "/models/tensorrt_llm/1"',
            'string_value: "${engine_dir}"',
        ),
        GateError,
        r"tensorrt_llm/config.pbtxt:\d+: string_value: \"\$\{engine_dir\}\"",
    ),
    "no tokenizer": (without_tokenizer, ServerError, "tokenizer.json is missing"),
    "stop words and bad words exchanged": (
        edited(
            "preprocessing/1/model.py",
            '"BAD_WORDS_IDS": word_lists(self._words(inputs, "BAD_WORDS_DICT"',
            '"BAD_WORDS_IDS": word_lists(self._words(inputs, "STOP_WORDS_DICT"',
        ),
        GateError,
        "ensemble: bad word",
    ),
    "the last character cut": (
        edited("postprocessing/1/model.py", "next(texts).encode()", "next(texts).encode()[:-1]"),
        GateError,
        "characters of many bytes",
    ),
    "pieces cut inside characters": (
        edited("tensorrt_llm_bls/1/text_pieces.py", "after.endswith(UNFINISHED)", "False"),
        GateError,
        "stream of characters of many bytes",
    ),
    "generations that go on without a client": (
        edited("tensorrt_llm_bls/1/model.py", "self._ended.wait(period_s)", "self._ended.wait(1e6)"),
        GateError,
        "tensorrt_llm_bls: cancelled",
    ),
    "a bad request that takes its batch along": (
        edited("preprocessing/1/model.py", "except RefusedError as error:", "except KeyError as error:"),
        GateError,
        "beside a bad request",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_build_and_is_named(tmp_path: Path, built: Built, fault: str) -> None:
    break_it, kind, names = FAULTS[fault]
    repository = tmp_path / "repository"
    shutil.copytree(built.repository, repository)
    break_it(repository)
    with pytest.raises(kind, match=names):
        run_rehearsal(tmp_path / "rehearse", built, repository=repository)
    assert not list((tmp_path / "rehearse" / "out").iterdir())
