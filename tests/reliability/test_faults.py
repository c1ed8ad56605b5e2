"""Two hundred runs of each command, each with one fault."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.bounded import bounded
from tests.reliability.campaign import FAULTS_OF, draw, play, prepare
from tests.reliability.commands import RL, SFT, Command
from tests.reliability.processes import children, left, orphans_adopted


@pytest.mark.slow
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("command", [SFT, RL], ids=["sft", "rl"])
def test_two_hundred_runs_with_a_fault_each(command: Command, tmp_path: Path) -> None:
    stage = prepare(command, tmp_path / "stage")
    outcomes = [
        play(stage, number, fault, 1_000_003 + number)
        for number, fault in enumerate(draw(command, runs=200, seed=1))
    ]
    assert len(outcomes) == 200
    assert not [f"{outcome.fault}: {outcome.broken}" for outcome in outcomes if outcome.broken]


@pytest.mark.parametrize("command", [SFT, RL], ids=["sft", "rl"])
def test_every_fault_is_drawn_and_has_a_name_of_its_own(command: Command) -> None:
    names = {fault.name for fault in FAULTS_OF[command.name]}
    drawn = draw(command, 2 * len(names), seed=3)
    assert len(names) == len(FAULTS_OF[command.name])
    assert {fault.name for fault in drawn[: len(names)]} == names


def _leave_one() -> list[str]:
    """A child ends and leaves one of its own, in a session of its own, running."""
    with orphans_adopted():
        before = children()
        child = os.fork()
        if child == 0:
            os.setsid()
            subprocess.Popen(["sleep", "77"], start_new_session=True)
            os._exit(0)
        os.waitpid(child, 0)
        found = [process.command for process in left(before, patience_s=0.2)]
        assert not left(before, patience_s=5.0)
    return found


def test_what_a_run_leaves_is_found_and_ended() -> None:
    assert bounded(_leave_one).value == ["sleep 77 "]
