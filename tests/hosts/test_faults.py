"""A machine that goes away: the others end in bounded time and say which one it was, or, where
torchrun may start them again, go on without it and take it back.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from retool.checkpoint import latest
from tests import warm
from tests.hosts.launch import Ended, elastic, fixed, start, wait
from tests.hosts.network import Host, network
from tests.sft.test_command import steps, words
from tests.sft.test_dead_rank import FAULTY

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


FEW = 60  # steps of a run that goes on to its end


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ["crash", "cut"])
def test_an_elastic_run_goes_on_with_what_is_left_and_grows_again(
    work: Path, tmp_path: Path, fault: str
) -> None:
    """The samples and their order are those of a run that nothing happened to."""
    keys = ["trainer.save_freq=5", f"trainer.watchdog_s={WATCHDOG_S}"]
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    with network(2, tmp_path / "machines", named=True) as hosts:
        alone = Run(hosts, fixed(hosts[:1], 2), tmp_path / "logs of one")
        alone.start(0, words(work, whole, *keys, trainer__total_training_steps=FEW))
        assert [one.status for one in alone.wait()] == [0]
        run = Run(hosts, [elastic(hosts, 2)] * 2, tmp_path / "logs")
        command = words(work, out, *keys, trainer__total_training_steps=FEW)
        run.start(0, command)
        run.start(1, command)
        reach(out, 12)
        getattr(hosts[1], fault)()
        reach(out, 30)
        hosts[1].crash()
        hosts[1].mend()
        run.start(1, command)
        first, _, again = run.wait(200)
    assert first.status == 0 and again.status == 0, (first.text[-3000:], again.text[-3000:])
    said = "".join(log.read_text() for log in run.logs)
    assert "processes: 4 on 2" in said and "processes: 2 on 1" in said
    mine = [(entry["step"], entry["train/loss"]) for entry in steps(out)]
    theirs = [(entry["step"], entry["train/loss"]) for entry in steps(whole)]
    assert [step for step, _ in mine] == [*range(1, FEW + 1)]
    np.testing.assert_allclose(mine, theirs, rtol=1e-3)


# Says when the first step after a restart is done
WENT_ON = """
import os, time
from retool.sft import train

real = train.log_pending

def log_pending(session, state):
    told = bool(state.pending) and session.mesh.rank == 0
    real(session, state)
    if told and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        print(f"went on at {time.time()}", flush=True)

train.log_pending = log_pending
"""


@pytest.mark.slow
def test_ranks_of_one_machine_are_started_again(work: Path, tmp_path: Path) -> None:
    """torchrun's own store still has what the ranks before wrote."""
    once = (
        "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.kill(os.getpid(), signal.SIGKILL)"
    )
    script = tmp_path / "faulty.py"
    script.write_text(WENT_ON + FAULTY.replace("{ACCIDENT}", once))
    out = tmp_path / "run"
    keys = words(work, out, trainer__total_training_steps=6, trainer__save_freq=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = warm.run([*torchrun, "--nproc_per_node=2", "--max-restarts=2", script, *keys])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resumed from" in done.stdout and [e["step"] for e in steps(out)] == [*range(1, 7)]
    accident = float(done.stdout.split("accident at ")[1].split()[0])
    resumed = float(done.stdout.split("went on at ")[1].split()[0])
    print(f"--max-restarts: the first step after it was done {resumed - accident:.1f} s later")
    assert resumed - accident < 60
