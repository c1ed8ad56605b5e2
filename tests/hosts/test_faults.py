"""A machine that goes away: the others end in bounded time and say which one it was, or, where
torchrun may start them again, go on without it and take it back.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from retool.checkpoint import latest
from tests.hosts.launch import Ended, fixed, start, wait
from tests.hosts.network import Host
from tests.sft.test_command import steps, words

WATCHDOG_S = 8
MANY = 400  # steps: more than are done before the fault


class Run:
    """A run on two machines that something happens to; `options` are torchrun's on each."""

    def __init__(self, hosts: list[Host], options: list[list[str]], folder: Path) -> None:
        self.hosts = hosts
        self.options = options
        self.folder = folder
        self.logs = list[Path]()
        self.processes = list[object]()
        folder.mkdir()

    def start(self, number: int, keys: list[str]) -> None:
        log = self.folder / f"{self.hosts[number].name}{len(self.logs)}.log"
        command = ["-m", "retool.sft", *keys]
        self.logs.append(log)
        self.processes.append(start(self.hosts[number], self.options[number], command, log))

    def wait(self, timeout: float = 120) -> list[Ended]:
        return wait(self.processes, self.logs, timeout)


def reach(out: Path, step: int, patience_s: float = 120) -> None:
    """Wait until a run has done a step."""
    end = time.monotonic() + patience_s
    while not (out / "metrics.jsonl").is_file() or not steps(out) or steps(out)[-1]["step"] < step:
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.05)


def begun(work: Path, hosts: list[Host], folder: Path, out: Path) -> Run:
    """A run of two machines in its twelfth step, saved at its tenth."""
    keys = words(work, out, trainer__total_training_steps=MANY, trainer__save_freq=5)
    run = Run(hosts, fixed(hosts, 2), folder)
    for number in range(len(hosts)):
        run.start(number, [*keys, f"trainer.watchdog_s={WATCHDOG_S}"])
    reach(out, 12)
    return run


@pytest.mark.slow
def test_a_machine_that_crashes_ends_the_run(work: Path, hosts: list[Host], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = begun(work, hosts, tmp_path / "logs", out)
    hosts[1].crash()
    left, gone = run.wait()
    assert left.seconds < 20 and gone.status == -9
    assert left.status == 1
    cause = f"ends because another rank on the machine at {hosts[1].address} is gone"
    assert cause in left.text and left.text.index(cause) < left.text.index("Traceback")
    assert latest(out) == out / "global_step_10"


@pytest.mark.slow
def test_a_cut_cable_ends_the_run_on_both_sides(
    work: Path, hosts: list[Host], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = begun(work, hosts, tmp_path / "logs", out)
    hosts[1].cut()
    ended = run.wait()
    assert all(one.status == 1 and one.seconds < WATCHDOG_S + 30 for one in ended), ended
    report = (out / "hang" / "report.txt").read_text().splitlines()
    assert f"no progress for {WATCHDOG_S} s" in report[0]
    assert "seen from host-a, host-b (10.77.0.2) does not answer any more" in report[1]
    assert "seen from host-b, host-a (10.77.0.1) does not answer any more" in report[2]
    assert latest(out) == out / "global_step_10"
