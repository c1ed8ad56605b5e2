"""A conversion in place, killed before each of its changes to the disk: the old checkpoint or the
new one is there and whole, a resume and `ls` find it, and the next command puts the rest right.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from retool.checkpoint import latest
from retool.checkpoint.__main__ import main
from retool.checkpoint.convert import convert
from retool.checkpoint.format.folder import MARK, world_size
from retool.checkpoint.verify import verify
from retool.files.lock import sole_user
from tests.checkpoint import states
from tests.faults import contents

STEP = "global_step_5"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    states.source_model(folder / "source")
    assert states.save(str(folder / "run")) == [None]
    return folder / "run"


def _watch_changes(at_each: Callable[[str], object]) -> None:
    """Call `at_each` with the event before each change of this process to the disk, for good."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        opened_to_write = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        )
        if event in CHANGES or opened_to_write:
            at_each(event)

    sys.addaudithook(watch)


def _convert_in_child(run: Path, at_each: Callable[[str], object]) -> int:
    """Convert to three ranks in a process of its own: its exit status, or minus a signal."""
    child = os.fork()
    if child == 0:
        _watch_changes(at_each)
        convert(run / STEP, 3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _changes(run: Path) -> list[str]:
    """The changes to the disk that a conversion makes, in order."""
    reader, writer = os.pipe()
    assert _convert_in_child(run, lambda event: os.write(writer, f"{event}\n".encode())) == 0
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return pipe.read().split()


def _kill_before(run: Path, change: int) -> None:
    """Convert in a process that is killed before its change number `change`."""
    numbers = count()

    def at_each(_event: str) -> None:
        if next(numbers) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    assert _convert_in_child(run, at_each) == -signal.SIGKILL


def _names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file, but for the mark of a conversion that was cut off after its last file."""
    return {k: value for k, value in contents(folder).items() if k != MARK}


@pytest.mark.parametrize("stride", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_is_lost_wherever_a_conversion_is_killed(
    saved: Path, tmp_path: Path, stride: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _names(saved)
    whole = {1: _contents(saved / STEP)}
    for ranks in (2, 3):
        calm = tmp_path / f"to {ranks}"
        shutil.copytree(saved, calm)
        convert(calm / STEP, ranks)
        assert verify(calm / STEP, lambda *_: None) == []
        whole[ranks] = _contents(calm / STEP)
    shutil.copytree(saved, tmp_path / "watched")
    changes = _changes(tmp_path / "watched")
    aside = 0
    for change, event in enumerate(changes):
        named = "os.rename" in (event, *changes[max(0, change - 1) : change])
        if change % stride and not named:
            continue
        run = tmp_path / str(change)
        shutil.copytree(saved, run)
        _kill_before(run, change)
        found = latest(run)
        assert found is not None and found.name in (STEP, f"{STEP}.old"), change
        assert _contents(found) == whole[world_size(found)], change
        capsys.readouterr()
        assert main(["ls", str(run)]) == 0
        listed = capsys.readouterr().out
        assert "*" in listed and "complete" in listed, (change, listed)
        aside += found.name != STEP
        if found.name != STEP:
            assert f"named {found.name}" in listed

        assert main(["convert", str(run / STEP), "--world-size", "2"]) == 0, change
        assert _names(run) == before, (change, "something was left over")
        assert world_size(run / STEP) == 2 and not (run / STEP / MARK).exists()
        assert _contents(run / STEP) == whole[2], change
        shutil.rmtree(run)
    assert len(changes) > 20 and aside, "the kills missed what they are for"


def test_a_conversion_in_progress_is_not_taken_for_a_dead_one(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    other = run / f"{STEP}.converting"
    other.mkdir()
    (other / MARK).touch()
    with sole_user(other):
        assert main(["convert", str(run / STEP), "--world-size", "2"]) == 0
        assert (other / MARK).is_file()
    assert main(["convert", str(run / STEP), "--world-size", "3"]) == 0
    assert not other.exists()


def test_steps_count_and_not_the_clock(saved: Path, tmp_path: Path) -> None:
    """A clock that goes back between saves makes the newer folder the older one by its times."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    shutil.copytree(run / STEP, run / "global_step_4")
    os.utime(run / STEP, (10**9, 10**9))
    assert latest(run) == run / STEP
