"""The main job through the command line: a checkpoint becomes engines that a real tritonserver answers with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_project import MODELS, VARIANTS, Built, Finished, Served

from enginesmith.triton.config import parse_config, serve_only_version
from enginesmith.triton.placement import contents_digest, tree_contents
from enginesmith.triton.ports import claim_ports
from enginesmith.triton.server import find_server
from enginesmith_client import Client, InvalidInput

pytestmark = [pytest.mark.model, pytest.mark.server]

SHARED_STEPS = {("fetch", "-"), ("reference", "-")}
UNQUANTIZED_STEPS = ("lower", "measure", "verify", "package", "rehearse")
STEPS = SHARED_STEPS | {
    (kind, variant)
    for variant in VARIANTS
    for kind in (*UNQUANTIZED_STEPS, *(() if variant == "bf16" else ("quantize", "reference")))
}


def test_one_command_builds_verifies_and_publishes_every_scheme(built: Built) -> None:
    assert built.first_build.steps == dict.fromkeys(STEPS, "built")
    document = json.loads(built.first_build.out)
    (report,) = document["reports"]
    assert [variant["variant"] for variant in report["variants"]] == list(VARIANTS)
    for variant in report["variants"]:
        assert variant["passed"]
        assert variant["rehearsed"]
        assert variant["lowering_top1_agreement"] >= 0.995
    assert [(one["model"], one["version"]) for one in document["published"]] == [
        (model, 1) for model in MODELS
    ]
    assert sorted(path.name for path in built.project.repository.iterdir()) == sorted(
        [".publish.lock", *MODELS]
    )
    assert built.project.leftovers() == []


def test_published_bytes_are_the_rehearsed_ones(built: Built) -> None:
    for model in MODELS:
        directory = built.project.repository / model
        release = json.loads((directory / "1" / "release.json").read_text())
        published = tree_contents(directory / "1")
        del published["release.json"]
        assert published == release["files"]
        package = built.project.entry(release["evidence"]["steps"]["package"]["key"]) / "files" / model
        rehearsed = tree_contents(package)
        assert contents_digest(rehearsed) == release["evidence"]["rehearsal"]["package_digest"]
        assert {f"1/{name}": digest for name, digest in published.items()} == {
            name: digest for name, digest in rehearsed.items() if name != "config.pbtxt"
        }
        served, tested = (
            parse_config((place / "config.pbtxt").read_text(), origin=model) for place in (directory, package)
        )
        assert served == serve_only_version(tested, 1)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_every_variant_answers_as_it_was_rehearsed(built: Built, served: Served, protocol: str) -> None:
    url = served.grpc_url if protocol == "grpc" else served.http_url
    for model in MODELS:
        release = json.loads((built.project.repository / model / "1" / "release.json").read_text())
        greedy = release["evidence"]["rehearsal"]["checks"][0]
        asked = built.project.run("ask", model, greedy["asked"], "--raw", "--url", url, "--json").assert_ok()
        answer = json.loads(asked.out)
        assert answer["text"] == greedy["seen"]
        assert 1 <= answer["output_tokens"] <= 16


def test_ask_waits_for_the_model_and_prints_the_answer_alone(built: Built, served: Served) -> None:
    arguments = ("--wait-s", 30, "--max-tokens", 4, "--url", served.grpc_url)
    asked = built.project.run("ask", "tiny-fp8", "-", *arguments, stdin="Wie heißt du?".encode()).assert_ok()
    assert asked.err == ""
    assert asked.out.endswith("\n")
    never = built.project.run("ask", "tiny-nope", "Hello", "--wait-s", 0.5, "--url", served.grpc_url)
    never.assert_one_error(1, "model 'tiny-nope' at", "is not ready after 0.5 s of waiting")


def test_prompt_over_the_limit_is_refused_with_both_lengths(built: Built, served: Served) -> None:
    asked = built.project.run("ask", "tiny-bf16", "word " * 300, "--raw", "--url", served.http_url)
    asked.assert_one_error(1, "tokens; this model accepts at most 255")


def test_unknown_model_is_answered_with_the_nearest_name(built: Built, served: Served) -> None:
    asked = built.project.run("ask", "tiny-int4-aqw", "Hello", "--url", served.grpc_url)
    asked.assert_one_error(1, "tiny-int4-aqw", "did you mean 'tiny-int4-awq'?")


def test_prompt_that_is_not_utf8_is_refused_and_hurts_nobody(served: Served) -> None:
    with Client(served.grpc_url, timeout_s=60) as client:
        prompt: np.ndarray[tuple[int, ...], np.dtype[np.object_]] = np.array([[b"caf\xe9"]], dtype=object)
        with pytest.raises(
            InvalidInput, match="text_input is not valid UTF-8: unexpected end of data at byte 3"
        ):
            list(client.infer_stream("tiny-bf16", {"text_input": prompt}))
        assert client.generate("tiny-bf16", "Once upon a time", max_tokens=2).output_tokens


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_pieces_of_a_stream_are_the_answer_and_streams_run_beside_each_other(
    served: Served, protocol: str
) -> None:
    url = served.grpc_url if protocol == "grpc" else served.http_url
    with Client(url, timeout_s=60) as client:
        whole = client.generate("tiny-bf16", "Once upon a time", max_tokens=12)

        def pieces(_: int) -> list[str]:
            return [delta.text for delta in client.stream("tiny-bf16", "Once upon a time", max_tokens=12)]

        with ThreadPoolExecutor(6) as pool:  # More than the model has slots.
            answers = list(pool.map(pieces, range(6)))
    assert all(len(answer) > 1 for answer in answers)
    assert {"".join(answer) for answer in answers} == {whole.text}


def test_one_seed_gives_one_answer(served: Served) -> None:
    with Client(served.grpc_url, timeout_s=60) as client:
        options = {"max_tokens": 8, "temperature": 0.9, "seed": 11}
        first, second = (client.generate("tiny-bf16", "Once upon", **options).text for _ in range(2))
    assert first == second


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_cleanly_on_a_signal(built: Built, number: signal.Signals) -> None:
    ports = ("--http-port", 0, "--grpc-port", 0, "--metrics-port", 0)
    with built.project.running("serve", built.project.repository, *ports) as serve:
        said = serve.read_until("metrics")
        assert all(model in said for model in MODELS)
        assert len(serve.family()) > len(MODELS), "the server and one process for each model"
        (grpc_line,) = [line for line in said.splitlines() if line.strip().startswith("gRPC")]
        built.project.run("ask", "tiny-bf16", "Hello", "--url", grpc_line.split()[-1]).assert_ok()
        os.kill(serve.pid, number)
        assert serve.finish() == Finished(0, "", "")
        serve.assert_alone()


def test_stock_command_line_loads_the_repository(built: Built, tmp_path: Path) -> None:
    installation = find_server()
    ports = claim_ports({"http": 0, "grpc": 0, "metrics": 0})
    command = [str(installation.executable), f"--model-repository={built.project.repository}"]
    for endpoint, port in ports.items():
        command += [f"--{endpoint}-port={port}", f"--{endpoint}-address=127.0.0.1"]
    if installation.backend_directory:  # The wheel's program does not know where its backends are.
        command += [f"--backend-directory={installation.backend_directory}"]
    command += [f"--backend-config=python,shm-region-prefix-name=stock-{os.getpid()}-"]
    with (tmp_path / "log").open("wb") as log:
        environment = installation.environment(built.project.environment)
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        with Client(f"http://127.0.0.1:{ports['http']}", timeout_s=120) as client:
            client.wait_ready()
            ready = {status.name for status in client.models() if status.state == "READY"}
            answers = [client.generate(model, "Once upon a time", max_tokens=4) for model in MODELS]
    finally:
        server.terminate()
        status = server.wait(60)
    assert ready == set(MODELS), (tmp_path / "log").read_text()
    assert all(answer.output_tokens for answer in answers)
    assert status == 0
    assert not list(Path("/dev/shm").glob(f"stock-{os.getpid()}-*"))


def test_demo_shows_an_answer_and_the_figures_of_every_variant(built: Built) -> None:
    demo = built.project.run("demo", built.project.spec, "--repository", built.project.repository).assert_ok()
    assert demo.built == set()
    assert "Question: What is the difference between a compiler and an interpreter?" in demo.out
    answers, _, comparison = demo.out.partition("what each variant gained and lost, measured in this run")
    assert all(f"{model}:\n" in answers for model in MODELS)
    rows = [line.replace("│", " ").split() for line in comparison.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == list(VARIANTS)
    assert all(float(row[-5]) > 0 for row in rows)
    assert "not measured" not in comparison
