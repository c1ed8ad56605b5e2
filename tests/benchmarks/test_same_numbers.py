"""The comparison of two revisions' runs: it sees the last bit, and nothing else."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_all import BENCHMARKS, benchmark


def test_one_bit_is_a_difference_and_times_are_none() -> None:
    same = benchmark("same_numbers")
    entry = {"step": 1, "train/loss": 0.1, "timing_s/step": 3.0, "nan": math.nan}
    before = dict(same.numbers(entry))
    assert set(before) == {"step", "train/loss", "nan"}
    assert same.differences([before], [dict(before)]) == []
    (told,) = same.differences([before], [before | {"train/loss": math.nextafter(0.1, 1)}])
    assert "line 0: train/loss was 0.1" in told
    assert same.differences([before], [{"step": 1}]) and same.differences([before], [])
    grown = [before | {"stop/done": 0}]
    assert same.differences([before], grown) == []
    assert same.new_names([before], grown) == ["stop/done"]


@pytest.mark.slow
def test_this_revision_computes_what_it_computes(repository: Path) -> None:
    """Two checkouts of one revision, each with its own run of both commands."""
    words = [sys.executable, BENCHMARKS / "same_numbers.py", "HEAD", "--only", "1 process"]
    done = subprocess.run([*map(str, words)], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| 0 |") == 2
