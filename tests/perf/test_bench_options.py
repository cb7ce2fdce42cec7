"""Options of ``bench`` and ``compare`` together: what they mean for sweeps and suites, for directories, and for an SLO."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench_command import SHORT, Bench
from perf_models import MODELS, PerfServer

from enginesmith.cli_bench_profile import LoadFlags, profile_from_flags
from enginesmith_client.perf import Profile, load_run, read_records
from enginesmith_client.perf._saved_files import KINDS, only_writer
from enginesmith_client.perf.report._report import _REPORTS

SPECS = Path(__file__).parents[2] / "models"
SWEEP = ("--sweep", "concurrency=16,32", "--out", "kept")


@pytest.fixture
def bench(
    perf_server: PerfServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    profile = tmp_path / "short.yaml"
    profile.write_text(SHORT)
    monkeypatch.chdir(tmp_path)
    return Bench(perf_server, capsys, profile)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sweep", "rate=1,2", "--open", "3"), "--sweep says which loads are measured: leave out --open"),
        (("--sweep", "concurrency=1", "--closed", "3"), "leave out --closed"),
        (("--sweep", "concurrency=1", "--arrivals", "burst"), "--arrivals is about an open loop: sweep rate"),
        (
            ("--sweep", "rate=1", "--generator", "perf_analyzer"),
            "perf_analyzer measures closed loops here: sweep concurrency",
        ),
        (("--suite", "standard", "--generator", "perf_analyzer"), "leave out --generator"),
        (("--slo", "ttft_ms=nan"), "--slo ttft_ms=nan: 'nan' is no finite number"),
        (("--open", "inf"), "inf is no finite number"),
        (("--duration-s", "nan"), "nan is no finite number"),
        (("--slo", str(SPECS / "minilm-l6.yaml")), "this spec has no slo, so nothing is promised"),
    ],
)
def test_an_option_that_has_no_effect_or_no_meaning_is_refused(
    bench: Bench, arguments: tuple[str, ...], words: str
) -> None:
    said = bench("bench", "steady20", *arguments)
    assert (said.status, said.out) == (2, "")
    assert words in said.err


def test_no_errors_can_be_the_only_promise() -> None:
    assert profile_from_flags(LoadFlags(slo=("max_error_percent=0",))).slo.max_error_percent == 0
    assert profile_from_flags(LoadFlags()).slo.max_error_percent is None


@pytest.mark.server
def test_the_arrivals_of_a_sweep_over_rates_can_be_chosen(bench: Bench) -> None:
    said = bench.measure("steady20", "--sweep", "rate=100", "--arrivals", "constant", "--out", "kept")
    assert said.status in (0, 1), said.err
    load = load_run(Path("kept", "rate-100")).run.profile["load"]
    assert (load["rate_per_s"], load["arrivals"]) == (100, {"kind": "constant"})


@pytest.mark.server
def test_every_run_of_a_sweep_is_kept_as_parquet(bench: Bench) -> None:
    said = bench.measure("steady20", *SWEEP, "--parquet")
    assert said.status in (0, 1), said.err
    tables = {path.parent.name for path in Path("kept").rglob("records.parquet")}
    assert tables == {"concurrency-16", "concurrency-32"}


@pytest.mark.server
def test_a_directory_holds_one_kind_of_results(bench: Bench) -> None:
    assert bench.measure("steady20", *SWEEP).status in (0, 1)
    alone = bench.measure("steady20", "--out", "kept")
    assert (alone.status, alone.out) == (1, "")
    assert "error: kept holds a sweep already, and cannot hold a run too" in alone.err
    run = Path("kept", "concurrency-16")
    compared = bench("compare", run, run, "--out", run)
    assert (compared.status, compared.out) == (1, "")
    assert "holds a run already, and cannot hold a comparison too" in compared.err


@pytest.mark.parametrize("there", [name for name in KINDS if name != "suite.json"])
def test_results_of_another_kind_are_not_mixed_with(tmp_path: Path, there: str) -> None:
    from enginesmith_client.perf import ResultsError

    (tmp_path / there).write_text("{}")
    with (
        pytest.raises(ResultsError, match=f"holds {KINDS[there]} already, and cannot hold a suite too"),
        only_writer(tmp_path, results_file="suite.json"),
    ):
        pass


def test_every_kind_of_results_that_has_a_report_is_known() -> None:
    assert _REPORTS.keys() <= KINDS.keys()


@pytest.mark.server
@pytest.mark.parametrize(
    "arguments",
    [("bench", "stedy20", *SWEEP), ("compare", "steady20", "stedy20", "--out", "kept")],
    ids=["sweep", "compare"],
)
def test_a_model_that_is_not_there_leaves_no_directory(bench: Bench, arguments: tuple[str, ...]) -> None:
    said = bench(*arguments, *bench.at_server())
    assert (said.status, said.out) == (1, "")
    assert "does not serve model 'stedy20'" in said.err
    assert not Path("kept").exists()


@pytest.mark.server
def test_a_directory_that_cannot_be_written_is_told(bench: Bench) -> None:
    Path("file").touch()
    for arguments in ((), ("--sweep", "concurrency=16")):
        said = bench.measure("steady20", *arguments, "--out", "file/kept")
        assert (said.status, said.out) == (1, "")
        assert "error: file/kept cannot be written: Not a directory" in said.err


@pytest.mark.server
def test_records_that_find_no_room_end_the_run_in_words(bench: Bench) -> None:
    Path("long.yaml").write_text(
        SHORT.replace("max_s: 0.5", "max_s: 30").replace("windows: 1", "windows: 60")
    )
    command = [
        sys.executable, "-m", "enginesmith.cli", "bench", "steady20", *bench.at_server(),
        "--profile", "long.yaml", "--out", "kept",
    ]  # fmt: skip
    done = subprocess.run(
        # In KiB: the file of records is full after some hundreds of them.
        ["bash", "-c", 'ulimit -f 64; exec "$@"', "bench", *command],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "error: kept/records.jsonl cannot be written: File too large" in done.stderr
    assert len(read_records(Path("kept", "records.jsonl"))) > 100


@pytest.mark.server
def test_values_of_headers_are_in_no_result(bench: Bench) -> None:
    Path("secret.yaml").write_text(SHORT + "requests: {headers: {authorization: Bearer hunter2}}\n")
    arguments = ("--profile", "secret.yaml", *bench.at_server())
    assert bench("bench", "steady20", *arguments, "--out", "kept/run").status in (0, 1)
    assert bench("bench", "steady20", *arguments, "--sweep", "concurrency=16", "--out", "kept/sweep").status in (0, 1)  # fmt: skip
    again = bench("bench", "steady20", *arguments, "--sweep", "concurrency=16", "--out", "kept/sweep")
    assert again.status in (0, 1), again.err
    for path in Path("kept").rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    assert "authorization" in Path("kept/run/run.json").read_text()
    assert Profile.model_validate_json(
        json.dumps(load_run(Path("kept/run")).run.profile)
    ).requests.headers == {"authorization": "not kept"}


@pytest.mark.server
def test_a_cold_start_of_a_version_measures_that_version(bench: Bench, tmp_path: Path) -> None:
    model = shutil.copytree(MODELS / "steady20", tmp_path / "repository" / "steady20")
    shutil.copytree(model / "1", model / "2")
    Path("cold.yaml").write_text(SHORT + "start: cold\n")
    said = bench(
        "bench", "steady20:1", "--repository", "repository", "--profile", "cold.yaml", "--out", "kept"
    )
    assert said.status in (0, 1), said.err
    run = load_run(Path("kept")).run
    assert (run.model_version, run.figures.errors) == ("1", {})
    assert run.figures.latency_ms
