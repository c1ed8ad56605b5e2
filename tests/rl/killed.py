"""A run of two ranks that is killed in mid-step, and what its steps told."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retool.metrics.jsonl import read_jsonl

# Of a step's numbers: they are never the same twice
OF_TIME = ("timing_s", "perf/", "time", "eta")


def steps(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_jsonl(folder / "metrics.jsonl") if "timing_s/step" in entry]


def kill_all(process: subprocess.Popen[Any]) -> int:
    """End a launcher and its ranks at once, as a machine that goes down does; how many ranks."""
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    return len(ranks)


def kill_in_mid_step(
    command: Sequence[str],
    out: Path,
    after: Sequence[int],
    pause: float = 0.1,
    patience: float = 150,
) -> None:
    """Start the command and kill -9 it, for each number of steps in `after` once it has done so many;
    `pause` seconds later a step, so at another moment each time.
    """
    for done in after:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + patience
        while not (out / "metrics.jsonl").exists() or len(steps(out)) < done:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        time.sleep(pause * done)
        assert kill_all(process) == 2
        time.sleep(2)


def told(folder: Path, *left_out: str) -> list[dict[str, Any]]:
    """A run's steps without times, and without what begins with one of `left_out`."""
    names = (*OF_TIME, *left_out)
    return [
        {name: value for name, value in entry.items() if not name.startswith(names)}
        for entry in steps(folder)
    ]
