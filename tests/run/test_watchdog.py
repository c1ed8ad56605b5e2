"""The hang watchdog: a rank that hangs, in Python and outside of it, and a run that doesn't."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from retool.perf import StepTimer
from retool.run.watchdog import EXIT, Watchdog, last_collectives, stacks
from tests import warm
from tests.ranks import free_port

PROGRAM = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from retool.perf import StepTimer
from retool.run.watchdog import Watchdog

def stuck_in_a_tool():
    while True:
        time.sleep(0.05)

def train_for_ever():
    for step in range(10**6):
        if step == 3 and rank == 1:
            stuck_in_a_tool()
        with timer.phase("forward_backward"):
            dist.all_reduce(torch.ones(8))
        watchdog.beat()

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
timer = StepTimer(torch.device("cpu"))
with Watchdog(Path(sys.argv[1]), rank, 2, 1.5 if rank == 0 else float(sys.argv[2]), timer) as watchdog:
    train_for_ever()
"""


def start(program: str, folder: Path, rank: int, port: int, silence: float = 1.5) -> warm.Popen:
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return warm.Popen(
        [sys.executable, "-c", program, str(folder), str(silence)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "silence",
    [1.5, pytest.param(float("inf"), marks=pytest.mark.slow)],
    ids=["alike", "one-follows"],
)
def test_a_hang_ends_the_run_and_says_where_each_rank_was(tmp_path: Path, silence: float) -> None:
    (tmp_path / "hang").mkdir()
    # An earlier hang, which must neither end this run nor pass for its stacks
    for name in (
        "alarm",
        "rank_0.txt",
        "rank_1.txt",
    ):
        (tmp_path / "hang" / name).write_text("old")
    port = free_port()
    begun = time.monotonic()
    ranks = [start(PROGRAM, tmp_path, rank, port, silence) for rank in range(2)]
    said = [rank.communicate(timeout=150)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT, EXIT] and time.monotonic() - begun < 120
    report = (tmp_path / "hang" / "report.txt").read_text()
    assert report in said[0] and "no progress for 1.5 s (trainer.watchdog_s)" in report
    files = [(tmp_path / "hang" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert all(file in out for file, out in zip(files, said, strict=True))
    assert "in stuck_in_a_tool" in files[1].split("\n\n")[1] and "in train_for_ever" in files[1]
    assert "all_reduce" in files[0].split("\n\n")[1] and "stuck_in_a_tool" not in files[0]
    # A torch that records gloo's collectives too
    if hasattr(torch._C._distributed_c10d, "_dump_fr_trace_json"):
        assert (
            "all_reduce #4" in files[0]
            and "all_reduce #3" in files[1]
            and "all_reduce #4" not in files[1]
        )
    first = report.index("rank 1 of 2")
    assert (
        "rank 0 of 2: no beat for" in report[:first]
        and "4 before; in forward_backward" in report[:first]
    )
    assert (
        "in train_for_ever" in report[:first]
        and "in stuck_in_a_tool" in report[first:]
        and "4 before; in no timed phase" in report[first:]
    )


def test_a_rank_that_is_stuck_outside_python_is_ended_by_the_timer(tmp_path: Path) -> None:
    """`ctypes.PyDLL` keeps the interpreter's lock while it sleeps: no thread of Python's can run."""
    program = (
        "import ctypes, sys, retool.run.watchdog as w; from pathlib import Path; w.PATIENCE = 0.1\n"
        "def held():\n    ctypes.PyDLL(None).sleep(100)\n"
        "with w.Watchdog(Path(sys.argv[1]), 0, 1, 0.5):\n    held()"
    )
    rank = start(program, tmp_path, 0, 0)
    said = rank.communicate(timeout=120)[1]
    assert rank.returncode != 0 and "in held" in said


def test_beats_keep_it_quiet_and_stop_ends_it(tmp_path: Path) -> None:
    ended: list[int] = []
    timer = StepTimer(torch.device("cpu"))
    # A beat has 0.6 s more than it needs, for a busy machine
    with Watchdog(tmp_path, 0, 1, 0.8, timer, ended.append) as watchdog:
        for _ in watchdog.each(range(5)):
            time.sleep(0.2)
        with watchdog.saving(30, "as long as the disk needs"):
            time.sleep(1.0)
    time.sleep(1.0)
    assert ended == [] and not (tmp_path / "hang").exists()


STOPPED = """
import os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
import retool.run.watchdog as w

w.PATIENCE = 1.0
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
with w.Watchdog(Path(sys.argv[1]), rank, 2, float(sys.argv[2])) as watchdog:
    watchdog.beat()
    with watchdog.saving(1.0, "8 MB at 4 MB/s"):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize(
    "silence",
    [600.0, pytest.param(float("inf"), marks=pytest.mark.slow)],
    ids=["watched", "one-that-follows"],
)
def test_a_rank_that_is_stopped_in_a_save_is_noticed_by_the_others(
    tmp_path: Path, silence: float
) -> None:
    port = free_port()
    begun = time.monotonic()
    ranks = [start(STOPPED, tmp_path, rank, port, silence) for rank in range(2)]
    try:
        said = ranks[0].communicate(timeout=100)[1]
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == EXIT and time.monotonic() - begun < 60
    report = (tmp_path / "hang" / "report.txt").read_text()
    assert (
        report in said
        and "A save hung: it wasn't done after 1 s (8 MB at 4 MB/s). The checkpoint before it is complete."
        in report
    )
    assert (
        "in a save" in report
        and "nothing from rank 1: dead, on another machine, or stuck" in report
    )


def test_a_rank_that_only_waits_for_others_raises_no_alarm(tmp_path: Path) -> None:
    ended = list[int]()
    with Watchdog(tmp_path, 0, 1, 0.3, None, ended.append) as watchdog:
        with watchdog.following():
            time.sleep(0.8)
        assert not ended
        time.sleep(0.8)
    assert ended == [EXIT], "afterwards it does again"


def test_none_is_watched_when_it_is_off(tmp_path: Path) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 0, 1, 0, None, ended.append) as watchdog:
        watchdog.beat()
        time.sleep(0.3)
    assert ended == []


def test_an_unwritable_folder_still_ends_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hang").write_text("a file")
    ended: queue.Queue[int] = queue.Queue()
    with Watchdog(tmp_path, 0, 1, 0.2, None, ended.put):
        status = ended.get(timeout=60)
    said = capfd.readouterr().err
    assert status == EXIT and "watchdog:" in said and "test_an_unwritable_folder" in said


def test_stacks_begin_with_the_main_thread() -> None:
    assert "test_stacks_begin_with_the_main_thread" in stacks().split("\n\n")[0]
    assert isinstance(last_collectives(), list)
