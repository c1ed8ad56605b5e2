"""A fault that one rank sees ends all of them at once, and is said once, with whose it is."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from retool.config import Fault
from retool.preflight.ranks.verdict import merge, verdict
from tests.ranks import free_port, run_ranks
from tests.sft.test_command import words

A = Fault("a", "is wrong.", "Mend it.")
B = Fault("b", "is missing.")


def test_faults_say_whose_they_are_unless_everyone_has_them() -> None:
    hosts = ["one", "one", "two", "two"]
    assert merge(hosts, [[A, A], [A], [A], [A]]) == (A,) and merge(hosts, [[], [], [], []]) == ()
    assert [f.where for f in merge(hosts, [[], [B], [A], [A, B]])] == [
        "b (ranks 1, 3 on one, two)",
        "a (on two)",
    ]
    assert [f.where for f in merge(["one"] * 3, [[], [], [A]])] == ["a (rank 2 on one)"]


def test_one_process_judges_alone() -> None:
    shown: list[Sequence[Fault]] = []
    assert verdict([A], {}, shown.append) == ((A,), None) and verdict(
        [], {"WORLD_SIZE": "1"}, shown.append
    ) == ((), None)
    assert shown == [(A,)]


def judged() -> tuple[list[str], bool]:
    rank = int(os.environ["RANK"])
    shown: list[Sequence[Fault]] = []
    faults, _ = verdict([A, B] if rank == 2 else [A], os.environ, shown.append, 30)
    return [fault.where for fault in faults], shown == [faults]


def test_all_ranks_hear_the_same() -> None:
    found = ["a", f"b (rank 2 on {socket.gethostname()})"]
    assert run_ranks(judged, 3) == [(found, True), (found, False), (found, False)]


def test_a_peer_that_never_comes_is_a_fault_and_not_a_hang() -> None:
    shown: list[Sequence[Fault]] = []
    environment = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        faults, _ = verdict([A], environment, shown.append, 1)
    assert (
        shown == [faults]
        and faults[0] == A
        and faults[1].where == "rank 1"
        and "can't meet the other ranks" in faults[1].problem
    )


# Of rank 1's, `test_on_two_ranks` of tests/sft/test_api.py hears, too
@pytest.mark.parametrize("faulty", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fault_of_one_rank_ends_both(work: Path, tmp_path: Path, faulty: int) -> None:
    """The chat template lies at a place that only the other rank's environment knows."""
    (tmp_path / "template.jinja").write_text((work / "model" / "chat_template.jinja").read_text())
    places = [tmp_path / "template.jinja"] * 2
    places[faulty] = tmp_path / "missing.jinja"
    keys = [*words(work, tmp_path / "run"), "data.chat_template=${oc.env:TEMPLATE}"]
    begin = time.monotonic()
    heard = run_ranks(heard_by, 2, keys, places, tmp_path)
    said = [text for _, text in heard]
    assert [status for status, _ in heard] == [1, 1] and time.monotonic() - begin < 20, said
    assert (
        "1 fault, nothing started" in said[0]
        and f"(rank {faulty} on {socket.gethostname()}): no such file" in said[0]
    ), said
    assert "fault" not in said[1] and not (tmp_path / "run").exists()


def heard_by(keys: list[str], places: list[Path], folder: Path) -> tuple[int, str]:
    """The command's exit status on this rank, and all that it wrote."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TEMPLATE": str(places[rank])}
    said = folder / f"said by {rank}"
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = trained(keys)
    sys.stdout.flush()
    sys.stderr.flush()
    return status, said.read_text()


def test_without_a_fault_both_train(work: Path, tmp_path: Path) -> None:
    """Without torchrun's store, rank 0's own, at the port that the process group then uses too."""
    assert run_ranks(
        trained, 2, words(work, tmp_path / "run", trainer__total_training_steps=1)
    ) == [0, 0]
    assert (tmp_path / "run" / "global_step_1").is_dir()


def trained(keys: list[str]) -> int:
    from retool.sft.__main__ import main

    return main(keys)
