"""When requests are due: arrivals as processes, and traces as files that people write."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile import OpenLoad
from enginesmith_client.perf.load._arrivals import due_times, read_trace
from enginesmith_client.perf.load._prepared import Due

NS = 1_000_000_000


def open_load(arrivals: dict[str, Any], **options: Any) -> OpenLoad:
    return OpenLoad.model_validate({"loop": "open", "arrivals": arrivals} | options)


def first_ns(count: int, arrivals: dict[str, Any], rate_per_s: float, seed: int = 0) -> list[int]:
    load = open_load(arrivals, rate_per_s=rate_per_s)
    return [due.at_ns for due in itertools.islice(due_times(load, rate_per_s=None, seed=seed), count)]


def test_constant_arrivals_do_not_drift() -> None:
    times_ns = first_ns(3001, {"kind": "constant"}, 3)
    assert times_ns[:4] == [0, 333_333_333, 666_666_667, NS]
    assert times_ns[3000] == 1000 * NS


def test_poisson_gaps_are_exponential() -> None:
    gaps_s = np.diff(first_ns(50_000, {"kind": "poisson"}, 100)) / NS
    assert np.mean(gaps_s) == pytest.approx(0.01, rel=0.02)
    assert np.std(gaps_s) == pytest.approx(0.01, rel=0.02)
    assert np.mean(gaps_s > 0.02) == pytest.approx(np.exp(-2), rel=0.05)


def test_bursts_keep_the_rate_in_the_mean() -> None:
    times_ns = first_ns(50_000, {"kind": "burst", "size": 10}, 100)
    _, sizes = np.unique(times_ns, return_counts=True)
    assert set(sizes.tolist()) == {10}
    assert 50_000 / (times_ns[-1] / NS) == pytest.approx(100, rel=0.05)


@given(seed=st.integers(0, 2**32), rate_per_s=st.floats(0.1, 1e5))
def test_a_seed_gives_the_same_times_and_another_one_others(seed: int, rate_per_s: float) -> None:
    times_ns = first_ns(20, {"kind": "poisson"}, rate_per_s, seed)
    assert times_ns == first_ns(20, {"kind": "poisson"}, rate_per_s, seed)
    assert times_ns != first_ns(20, {"kind": "poisson"}, rate_per_s, seed + 1)
    assert times_ns == sorted(times_ns)


def test_a_rate_that_is_given_takes_the_place_of_the_loads() -> None:
    load = open_load({"kind": "constant"}, capacity_factor=2)
    assert [due.at_ns for due in itertools.islice(due_times(load, rate_per_s=4, seed=0), 2)] == [0, NS // 4]
    with pytest.raises(ProfileError, match="constant arrivals need a rate"):
        due_times(load, rate_per_s=None, seed=0)


def trace(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines),
        encoding="utf-8",
    )
    return path


def test_a_trace_gives_its_times_and_lengths_faster_if_asked(tmp_path: Path) -> None:
    path = trace(tmp_path, {"at_s": 0.5, "prompt_tokens": 7}, "", {"at_s": 1, "output_tokens": 9})
    assert read_trace(path) == (Due(NS // 2, 7, None), Due(NS, None, 9))
    load = open_load({"kind": "trace", "file": str(path), "speed": 2})
    assert list(due_times(load, rate_per_s=None, seed=0)) == [Due(NS // 4, 7, None), Due(NS // 2, None, 9)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "holds no request"),
        (["", "  "], "holds no request"),
        ([{"at_s": 1}, {"at_s": 0.5}], r"line 2: at_s is 0\.5, before the 1 of the line above"),
        (["{"], "line 1 is not JSON"),
        (["[1]"], r"line 1 is not an object; seen: \[1\]"),
        ([{}], r"line 1: at_s must be a number from 0 to 1e\+09; seen: None"),
        ([{"at_s": 1e300}], r"seen: 1e\+300"),
        ([{"at_s": -1}], "seen: -1"),
        ([{"at_s": True}], "seen: True"),
        (['{"at_s": NaN}'], "seen: nan"),
        (['{"at_s": Infinity}'], "seen: inf"),
        ([{"at_s": 1, "prompt_tokens": 0}], "prompt_tokens must be a whole number of at least 1; seen: 0"),
        ([{"at_s": 1, "output_tokens": 1.5}], r"output_tokens must be .*; seen: 1\.5"),
        ([{"at_s": 1, "tokens": 5}], "unknown key 'tokens'; allowed: at_s, prompt_tokens, output_tokens"),
    ],
)
def test_a_bad_trace_is_an_error_that_names_the_line(tmp_path: Path, lines: list[Any], words: str) -> None:
    path = trace(tmp_path, *lines)
    with pytest.raises(ProfileError, match=words) as caught:
        # At once, not when the first request would be sent.
        due_times(open_load({"kind": "trace", "file": str(path)}), rate_per_s=None, seed=0)
    assert str(path) in str(caught.value)


def test_a_trace_that_is_missing_or_binary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        read_trace(tmp_path / "nothing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="cannot be read"):
        read_trace(tmp_path / "binary")
