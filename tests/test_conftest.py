"""Which GPUs each process of `make test-gpu` has, and what it says of a test."""

from __future__ import annotations

from typing import Literal

import pytest

from tests.conftest import gpus_of_worker, pytest_report_teststatus


def test_workers_share_the_gpus() -> None:
    workers = [f"gw{number}" for number in range(3)]
    shared = {"TEST_GPUS": "2"}
    assert [gpus_of_worker(worker, shared) for worker in workers] == ["0,1", "1,0", "0,1"]
    given = {**shared, "CUDA_VISIBLE_DEVICES": "3,6,7"}
    assert [gpus_of_worker(worker, given) for worker in workers] == ["3,6,7", "6,7,3", "7,3,6"]
    assert gpus_of_worker("gw2", {}) == "2,0,1"


def word_of(when: Literal["setup", "call"], seconds: float) -> str:
    report = pytest.TestReport("a", ("f", 1, "a"), {}, "passed", None, when, duration=seconds)
    status = pytest_report_teststatus(report)
    next(status)
    with pytest.raises(StopIteration) as end:
        status.send(("passed", ".", "" if when == "setup" else "PASSED"))
    return end.value.value[2]


def test_a_tests_line_has_its_seconds_and_those_of_its_fixtures() -> None:
    assert word_of("setup", 1.25) == ""
    assert word_of("call", 2.0) == "PASSED 3.2 s"
    assert word_of("call", 2.0) == "PASSED", "in the summary"
