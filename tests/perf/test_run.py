"""One run, whole, on a real server: what it keeps, what is taken from an earlier one, and what becomes of it when things go wrong."""

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from loads import closed, profile
from perf_models import PerfServer
from test_saved_files import files_of_at_most

from enginesmith.triton.server import TritonServer
from enginesmith_client import Client, ConnectError, InvalidInput
from enginesmith_client.perf._errors import MeasurementError, ProfileError, ResultsError
from enginesmith_client.perf._profile import Profile, RequestsPart
from enginesmith_client.perf._progress import Progress
from enginesmith_client.perf._records import read_records
from enginesmith_client.perf._run import CAPACITY_DIRECTORY, recompute, run_profile
from enginesmith_client.perf._run_files import RECORDS_FILE, RUN_FILE, load_run
from enginesmith_client.perf._saved_files import only_writer
from enginesmith_client.perf._target import Target

pytestmark = pytest.mark.server
Start = Callable[..., AbstractContextManager[TritonServer]]
QUICK = profile(closed(4))
AT_CAPACITY = profile({"loop": "open", "capacity_factor": 0.1}, max_s=1)


def when(wanted: Callable[[Progress], bool], act: Callable[[], object]) -> Callable[[Progress], None]:
    """Does ``act`` once, at the first progress that is ``wanted``."""
    left = [act]

    def look(progress: Progress) -> None:
        if left and wanted(progress):
            left.pop()()

    return look


def killer(server: TritonServer) -> Callable[[], None]:
    return lambda: os.kill(server.pid, signal.SIGKILL)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def of_capacity(progress: Progress) -> bool:
    return progress.title.endswith(": capacity") and progress.answered > 0


def target_of(server: TritonServer, model: str) -> Target:
    return Target(model, f"grpc://{server.grpc_url}", server_pid=server.pid)


def test_a_run_is_kept_whole_and_every_figure_can_be_computed_again(
    perf_server: PerfServer, tmp_path: Path
) -> None:
    saved = run_profile(perf_server.target("steady20"), QUICK, directory=tmp_path)
    assert load_run(tmp_path) == saved
    assert recompute(saved) == saved.run.figures
    assert (saved.run.status, saved.run.model_version, saved.run.interrupted) == ("complete", "1", False)
    assert (saved.run.workload["kind"], saved.run.workload["shapes"]) == ("tensors", {"in": [1, 4]})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"requests": {"tensors_file": "no.json"}}, "requests.tensors_file no.json cannot be read: No such file"),
        ({"requests": {"prompts_file": "no.jsonl"}}, "requests.prompts_file no.jsonl cannot be read: No such file"),
        (
            {"load": {"loop": "open", "arrivals": {"kind": "trace", "file": "no.jsonl"}}},
            "the trace no.jsonl cannot be read: No such file",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_missing_is_an_error_of_the_profile_before_anything_is_written(
    perf_server: PerfServer, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    wanted = Profile.model_validate(QUICK.model_dump() | changed)
    with pytest.raises(ProfileError, match=words):
        run_profile(perf_server.target("tiny"), wanted, directory=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_complete_run_is_taken_and_never_written_over(perf_server: PerfServer, tmp_path: Path) -> None:
    target = perf_server.target("tiny")
    first = run_profile(target, QUICK, directory=tmp_path)
    assert run_profile(target, QUICK, directory=tmp_path, reuse=True) == first
    with pytest.raises(ResultsError, match="holds a run already"):
        run_profile(target, QUICK, directory=tmp_path)
    other = QUICK.model_copy(update={"seed": 1})
    with pytest.raises(ResultsError, match="holds a run of another profile, model or version"):
        run_profile(target, other, directory=tmp_path, reuse=True)
    assert load_run(tmp_path) == first


def test_a_run_that_was_ended_early_is_made_again(perf_server: PerfServer, tmp_path: Path) -> None:
    target, long = perf_server.target("steady20"), profile(closed(2), max_s=60, window_s=60, max_requests=40)
    stop = when(lambda progress: progress.answered > 5, interrupt)
    early = run_profile(target, long, directory=tmp_path, on_progress=stop).run
    assert (early.status, early.interrupted) == ("partial", True)
    again = run_profile(target, long, directory=tmp_path, reuse=True).run
    assert (again.status, again.figures.requests) == ("complete", 40)


def test_nobody_else_measures_into_the_same_directory_meanwhile(
    perf_server: PerfServer, tmp_path: Path
) -> None:
    with only_writer(tmp_path), pytest.raises(ResultsError, match="something else is measuring into"):
        run_profile(perf_server.target("tiny"), QUICK, directory=tmp_path)


def test_a_rate_at_a_part_of_the_capacity_is_found_by_a_run_that_is_kept(
    perf_server: PerfServer, tmp_path: Path
) -> None:
    target = perf_server.target("steady20")
    stop = when(
        lambda progress: not progress.title.endswith(": capacity") and progress.answered > 0, interrupt
    )
    early = run_profile(target, AT_CAPACITY, directory=tmp_path, on_progress=stop).run
    capacity = load_run(tmp_path / CAPACITY_DIRECTORY)
    assert early.interrupted
    assert early.workload["capacity_per_s"] == capacity.run.figures.requests_per_s
    again = run_profile(target, AT_CAPACITY, directory=tmp_path, reuse=True).run
    assert again.workload["capacity_per_s"] == capacity.run.figures.requests_per_s
    assert load_run(tmp_path / CAPACITY_DIRECTORY) == capacity


def test_an_interrupt_while_the_capacity_is_measured_ends_all(
    perf_server: PerfServer, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_profile(
            perf_server.target("steady20"),
            AT_CAPACITY,
            directory=tmp_path,
            on_progress=when(of_capacity, interrupt),
        )
    assert not (tmp_path / RUN_FILE).exists()
    assert load_run(tmp_path / CAPACITY_DIRECTORY).run.interrupted


def test_a_server_that_dies_while_the_capacity_is_measured_leaves_no_rate(
    own_server: Start, tmp_path: Path
) -> None:
    with (
        own_server("tiny") as server,
        pytest.raises(
            MeasurementError, match=r"capacity of model 'tiny' is unknown: .* ended early \(server lost"
        ),
    ):
        run_profile(
            target_of(server, "tiny"),
            AT_CAPACITY,
            directory=tmp_path / "out",
            on_progress=when(of_capacity, killer(server)),
        )


def test_a_server_that_dies_while_requests_are_made_is_a_connect_error(
    own_server: Start, tmp_path: Path
) -> None:
    with own_server("tiny") as server, pytest.raises(ConnectError):
        run_profile(
            target_of(server, "tiny"),
            QUICK.model_copy(update={"requests": RequestsPart(different=2)}),
            directory=tmp_path / "out",
            on_progress=when(lambda progress: progress.phase == "preparing", killer(server)),
        )
    assert not (tmp_path / "out" / RUN_FILE).exists()


def test_a_cold_start_needs_a_server_that_lets_clients_load_models(own_server: Start, tmp_path: Path) -> None:
    cold = profile(closed(1), start="cold")
    with (
        own_server("tiny") as server,
        pytest.raises(InvalidInput, match=r"is not allowed(.|\n)*--model-control-mode=explicit"),
    ):
        run_profile(target_of(server, "tiny"), cold, directory=tmp_path / "out")


def test_a_cold_start_that_is_interrupted_leaves_the_model_loaded(
    own_server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unload = Client.unload

    def interrupted(client: Client, model: str, **options: Any) -> None:
        unload(client, model, **options)
        interrupt()

    monkeypatch.setattr(Client, "unload", interrupted)
    cold = profile(closed(1), start="cold")
    with own_server("tiny", clients_load=True) as server, Client(f"grpc://{server.grpc_url}") as client:
        with pytest.raises(KeyboardInterrupt):
            run_profile(target_of(server, "tiny"), cold, directory=tmp_path / "out")
        client.wait_ready("tiny", timeout_s=10)


def test_a_disk_that_is_full_is_one_error_and_what_was_measured_is_kept(
    perf_server: PerfServer, tmp_path: Path
) -> None:
    long = profile(closed(8), max_s=60, window_s=60)
    with files_of_at_most(20_000), pytest.raises(ResultsError, match=r"records\.jsonl cannot be written"):
        run_profile(perf_server.target("tiny"), long, directory=tmp_path)
    assert len(read_records(tmp_path / RECORDS_FILE)) > 100
    assert not (tmp_path / RUN_FILE).exists()
