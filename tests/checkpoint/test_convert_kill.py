"""A conversion in place, killed before each of its changes to the disk: the old checkpoint or the
new one is there and whole, a resume and `ls` find it, and the next command puts the rest right.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
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


def _die_at(change: int) -> None:
    """Kill this process before its change number `change` to the disk."""
    done = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        opened_to_write = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        )
        if event in CHANGES or opened_to_write:
            if done == change:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    sys.addaudithook(watch)


def _killed_conversion(run: Path, change: int) -> bool:
    """Convert to three ranks in a process of its own; False where it was done before `change`."""
    child = os.fork()
    if child == 0:
        _die_at(change)
        convert(run / STEP, 3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def _names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file, but for the mark of a conversion that was cut off after its last file."""
    return {k: value for k, value in contents(folder).items() if k != MARK}


def test_nothing_is_lost_wherever_a_conversion_is_killed(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _names(saved)
    whole = {1: _contents(saved / STEP)}
    for ranks in (2, 3):
        calm = tmp_path / f"to {ranks}"
        shutil.copytree(saved, calm)
        convert(calm / STEP, ranks)
        assert verify(calm / STEP, lambda *_: None) == []
        whole[ranks] = _contents(calm / STEP)
    aside = 0
    change = 0
    while True:
        run = tmp_path / str(change)
        shutil.copytree(saved, run)
        if not _killed_conversion(run, change):
            break
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
        change += 1
    assert change > 20 and aside, "the kills missed what they are for"


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
