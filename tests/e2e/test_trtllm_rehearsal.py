"""Rehearsals of TensorRT-LLM repositories in a real tritonserver: what passes, and each fault that must stop a build."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "builder"))

from trtllm_deployment import Context, assembled, deployment, step_params

import enginesmith
from enginesmith.engines.onnxruntime import lower
from enginesmith.errors import EnginesmithError, GateError, ServerError
from enginesmith.triton.config import config_text, parse_config
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


def test_streams_that_accumulate_pass_with_few_places_and_several_postprocessors(
    tmp_path: Path, built: Built
) -> None:
    """Two instances of postprocessing end the pieces of a stream in any order; they must arrive in the right one."""
    target = {"accumulate_tokens": True, "postprocessing_instances": 2, "bls_instances": 1}
    queue = {"dynamic_batching": {"queue_policy": {"max_queue_size": 1}}}
    params = step_params({**target, "model_prefix": "grow-"}, queue)
    repository = assembled(tmp_path, built.checkpoint, params)
    document = run_rehearsal(tmp_path / "rehearse", built, repository=repository, **params)
    streams = [check for check in document["checks"] if "responses that grow" in check["expected"]]
    assert len(streams) == 3


def test_a_deployment_of_single_requests_without_streams_passes_and_refuses_others(
    tmp_path: Path, built: Built
) -> None:
    params = step_params({"streaming": False}, {"max_batch_size": 1})
    repository = assembled(tmp_path, built.checkpoint, params)
    document = run_rehearsal(tmp_path / "rehearse", built, repository=repository, **params)
    (stream,) = [check for check in document["checks"] if check["name"] == "tensorrt_llm_bls: stream"]
    assert "decoupled" in stream["seen"]
    (rows,) = [
        check for check in document["checks"] if check["name"] == "tensorrt_llm_bls: rows of one request"
    ]
    assert "batch-size must be <= 1" in rows["seen"]


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
        ask = Asking(server, entries=configs, decoupled=True)

        def one(number: int) -> str | None:
            # NVIDIA's clients say that they want no drafts.
            none = {"num_draft_tokens": (0,), "use_draft_logits": (False,)} if number % 3 else {}
            inputs = {"max_tokens": (2,), "stream": (number % 2 == 0,), **none}
            prompt = b"hello" if number % 5 else b"\xff"
            return ask("tensorrt_llm_bls", prompt, inputs=inputs).refusal

        with ThreadPoolExecutor(6) as pool:
            refusals = list(pool.map(one, range(200)))
        drafts = ask("tensorrt_llm_bls", b"hello", inputs={"max_tokens": (2,), "num_draft_tokens": (4,)})
        assert "num_draft_tokens: not served" in str(drafts.refusal)
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


def without_parameter(model: str, name: str) -> Callable[[Path], None]:
    def edit(repository: Path) -> None:
        file = repository / model / "config.pbtxt"
        config = parse_config(file.read_text())
        del config.parameters[name]
        file.unlink()
        file.write_text(config_text(config))

    return edit


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
    "a parameter without which the backend does not load": (
        without_parameter("tensorrt_llm", "tokenizer_dir"),
        GateError,
        "tensorrt_llm: the parameter tokenizer_dir is missing",
    ),
    "a value that the backend would replace by its default": (
        edited("tensorrt_llm/config.pbtxt", '"guaranteed_no_evict"', '"guaranteed_no_evct"'),
        GateError,
        "batch_scheduler_policy is 'guaranteed_no_evct'; allowed: guaranteed_no_evict",
    ),
    "engines looked for elsewhere": (
        edited("tensorrt_llm/config.pbtxt", '"/models/tensorrt_llm/1"', '"/models/other/1"'),
        GateError,
        "gpt_model_path is '/models/other/1', which is no version directory of tensorrt_llm",
    ),
    "a limit that the spec does not have": (
        edited("preprocessing/1/limits.json", '"max_input_len": 64', '"max_input_len": 40'),
        GateError,
        "preprocessing/1/limits.json: max_input_len is 40, wanted is 64",
    ),
    "an end token that the checkpoint does not have": (
        edited("preprocessing/1/limits.json", '"end_id": 2', '"end_id": 5'),
        GateError,
        "end_id is 5, wanted is 2",
    ),
    "streams switched off in one model": (
        edited("tensorrt_llm_bls/config.pbtxt", "decoupled: true", "decoupled: false"),
        GateError,
        r"tensorrt_llm_bls: model_transaction_policy.decoupled is false, but the target may stream",
    ),
    "fewer rows than the ensemble takes": (
        edited("postprocessing/config.pbtxt", "max_batch_size: 4", "max_batch_size: 1"),
        GateError,
        "ensemble takes 4 rows at once, but postprocessing only 1",
    ),
    "a launch of another target": (
        edited("tensorrt_llm/1/launch.json", '"world_size": 1', '"world_size": 2'),
        GateError,
        "tensorrt_llm/1/launch.json does not say how this target is started",
    ),
    "no tokenizer": (without_tokenizer, ServerError, "tokenizer.json is missing"),
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


# One server shows them all: none of them is seen by the check of another.
PLANTED: dict[str, Callable[[Path], None]] = {
    "ensemble: bad word": edited(
        "preprocessing/1/model.py",
        '"BAD_WORDS_IDS": word_lists(self._words(inputs, "BAD_WORDS_DICT"',
        '"BAD_WORDS_IDS": word_lists(self._words(inputs, "STOP_WORDS_DICT"',
    ),
    "tensorrt_llm_bls: stream of characters of many bytes": edited(
        "tensorrt_llm_bls/1/text_pieces.py", "after.endswith(UNFINISHED)", "False"
    ),
    "tensorrt_llm_bls: cancelled": edited(
        "tensorrt_llm_bls/1/model.py", "self._ended.wait(period_s)", "self._ended.wait(1e6)"
    ),
    "tensorrt_llm_bls: without the prompt": edited(
        "tensorrt_llm_bls/1/bls_tensors.py", '            "exclude_input_in_output",\n', ""
    ),
    "tensorrt_llm_bls: token counts": edited(
        "tensorrt_llm_bls/1/bls_tensors.py", '            "return_num_output_tokens",\n', ""
    ),
    "tensorrt_llm_bls: rows of one stream": edited(
        "tensorrt_llm_bls/1/bls_tensors.py", '    "batch_index",\n', ""
    ),
    "ensemble: end token": edited(
        "preprocessing/1/model.py",
        '"END_ID", rows, default=self._limits["end_id"]',
        '"END_ID", rows, default=-1',
    ),
    "beside a bad request": edited(
        "preprocessing/1/model.py", "except RefusedError as error:", "except KeyError as error:"
    ),
}


@pytest.fixture(scope="module")
def complaint(tmp_path_factory: pytest.TempPathFactory, built: Built) -> str:
    """What the rehearsal of a repository with everything in ``PLANTED`` says."""
    root = tmp_path_factory.mktemp("planted")
    shutil.copytree(built.repository, root / "repository")
    for break_it in PLANTED.values():
        break_it(root / "repository")
    with pytest.raises(GateError) as caught:
        run_rehearsal(root / "rehearse", built, repository=root / "repository")
    return str(caught.value)


@pytest.mark.parametrize("check", PLANTED)
def test_a_wrong_answer_is_named_with_what_was_asked_expected_and_seen(complaint: str, check: str) -> None:
    assert re.search(rf"{re.escape(check)}: asked .+\n    expected .+\n    seen     .+", complaint)


def test_what_was_not_planted_is_not_complained_about(complaint: str) -> None:
    for check in ("ensemble: plain:", "ensemble: bias", "ensemble: token counts", "HTTP generate:"):
        assert check not in complaint


def test_a_model_that_never_ends_its_answers_is_waited_for_once(
    tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearse, "_PATIENCE_S", 2.0)
    repository = tmp_path / "repository"
    shutil.copytree(built.repository, repository)
    edited("tensorrt_llm_bls/1/model.py", "self._sender.send(flags=_FINAL)", "pass")(repository)
    with pytest.raises(GateError) as caught:
        run_rehearsal(tmp_path / "rehearse", built, repository=repository)
    assert str(caught.value).count("no final response in") <= 4
    assert "tensorrt_llm_bls: plain: asked" in str(caught.value)
    assert "ensemble: plain" not in str(caught.value)


def descendants() -> frozenset[psutil.Process]:
    """Processes below this one; other tests' servers may be among them."""
    return frozenset(psutil.Process().children(recursive=True))


class Killer(Context):
    """A step's context that kills a process of its own when the step says a certain thing."""

    note = "asking tensorrt_llm_bls in tritonserver"
    command = ""
    before: frozenset[psutil.Process] = frozenset()

    def progress(self, fraction: float | None, note: str = "") -> None:
        super().progress(fraction, note)
        if note == self.note:
            children = descendants() - self.before
            (victim,) = [child for child in children if self.command in " ".join(child.cmdline())]
            victim.kill()


@pytest.mark.parametrize(
    ("command", "kind", "names"),
    [
        (
            "bin/tritonserver",
            ServerError,
            "tritonserver was killed by SIGKILL while .*tensorrt_llm_bls was asked",
        ),
        ("tensorrt_llm_bls/1/model.py", GateError, "tensorrt_llm_bls: plain: asked"),
    ],
)
def test_a_process_that_dies_while_it_is_asked_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path,
    built: Built,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    kind: type[EnginesmithError],
    names: str,
) -> None:
    monkeypatch.setattr(rehearse, "_PATIENCE_S", 2.0)
    inputs = {"repository": built.repository, "checkpoint": built.checkpoint, "engine": built.engine}
    context = Killer(tmp_path / "rehearse", built.params | {"server": None}, inputs)
    context.command = command
    context.before = descendants()
    before = set(Path("/dev/shm").glob(f"enginesmith-{os.getpid()}-*"))
    with pytest.raises(kind, match=names):
        rehearse.run(context)
    assert set(Path("/dev/shm").glob(f"enginesmith-{os.getpid()}-*")) == before
    assert not [one for one in descendants() - context.before if "triton" in one.name()]
    assert not list(context.out.iterdir())
