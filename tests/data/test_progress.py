"""What a reading of many rows says where there is no terminal, and how many processes do it."""

import os

from retool.data import progress
from retool.data.progress import ProgressLines
from retool.data.tokenise import MOST_USUAL_WORKERS, usual_workers


def test_a_line_every_ten_seconds(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    said = []
    tell = ProgressLines(said.append, "audited", 9_000)
    for seconds, rows in ((4.0, 300), (9.9, 900), (10.0, 1_000), (15.0, 1_500), (20.0, 4_000)):
        clock[0] = 100.0 + seconds
        tell(rows)
    assert said == [
        "1,000 of 9,000 rows audited, 100 a second",
        "4,000 of 9,000 rows audited, 200 a second",
    ]


def test_as_many_processes_as_cores(monkeypatch):
    for cores, workers in ((1, 0), (2, 2), (6, 6), (128, MOST_USUAL_WORKERS)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert usual_workers() == workers
