"""What every run does around its steps: its folder for itself alone, Ctrl-C, one error for all
ranks, the launcher's closing words.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from retool.files.lock import in_use, sole_user
from retool.files.own_folder import OwnFolder
from retool.parallel.mesh import make_mesh
from retool.run.preemption import SIGNALS, StopRequest
from retool.run.program import as_guest
from retool.run.session import seed_everything
from retool.run.start import ended_well, tell_launcher
from tests.sft.conftest import work
from tests.sft.test_command import words

__all__ = ["work"]
HOLDER = """
import sys, time
from pathlib import Path
from retool.files.lock import sole_user

with sole_user(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def exit_status_of_a_failure() -> int:
    with ended_well() as ending:
        raise ValueError("no such thing")
    return ending.status


def test_a_folder_is_for_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match="another run"), sole_user(folder, patience_s=0.3):
            pass
    finally:
        process.kill()
        process.wait()
    with sole_user(folder, patience_s=5):
        (folder / "metrics.jsonl").touch()
    assert folder.is_dir(), "a killed run leaves no lock, and what was there stays"


def test_a_folder_that_nothing_was_written_to_goes_again(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name, stays in (("new", False), ("old", True)):
        with sole_user(tmp_path / name):
            assert (tmp_path / name).is_dir()
        assert (tmp_path / name).exists() == stays


def test_who_waited_for_a_folder_has_it_alone_when_it_went_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    before = ExitStack()
    before.enter_context(sole_user(folder))
    # The run before ends while this one waits, and takes the folder that it made away.
    monkeypatch.setattr("retool.files.lock.time.sleep", lambda _: before.close())
    with sole_user(folder):
        assert in_use(folder)


def test_who_is_refused_leaves_the_folder_to_who_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with sole_user(folder):
        # Both looked before either made it.
        monkeypatch.setattr(Path, "exists", lambda _: False)
        with pytest.raises(ValueError, match="another run"), sole_user(folder, patience_s=0):
            pass
        monkeypatch.undo()
        assert in_use(folder)


def test_the_command_refuses_a_folder_in_use(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from retool.run import start
    from retool.sft.__main__ import main

    monkeypatch.setattr(start, "sole_user", lambda folder: sole_user(folder, patience_s=0.2))
    with sole_user(tmp_path / "run"):
        assert main(words(work, tmp_path / "run")) == 1
        assert "another run is writing there. Wait for it or stop it" in capsys.readouterr().out
        assert main([*words(work, tmp_path / "run"), "--check"]) == 0, "a check starts nothing"
        assert "note: another run is writing in " in capsys.readouterr().out
        assert not any((tmp_path / "run").iterdir())
    assert (
        main([*words(work, tmp_path / "run"), "--check"]) == 0
        and "another run" not in capsys.readouterr().out
    )


def test_ctrl_c_stops_the_run_and_the_script_around_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the launcher's, of the same Ctrl-C
    assert (
        stop.received == signal.SIGINT
        and capfd.readouterr().err.count("Ctrl-C again ends at once") == 1
    )
    monkeypatch.setattr("retool.run.preemption.ONE_CTRL_C", -1.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop:
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_a_problem_ends_the_run_at_the_next_agreement(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    mesh = make_mesh()
    folder.mkdir()
    with StopRequest(lambda: None, OwnFolder(folder).problem) as stop:
        assert not stop.agreed(mesh)
        folder.rename(tmp_path / "away")
        with pytest.raises(
            ValueError, match=r"run was removed or renamed while the run was using it.*put it back"
        ):
            stop.agreed(mesh)


def test_a_folder_that_went_is_no_error_of_its_user(tmp_path: Path) -> None:
    with sole_user(tmp_path / "run"):
        (tmp_path / "run").rmdir()
    with sole_user(tmp_path / "run"):
        (tmp_path / "run").rmdir()
        (tmp_path / "run").mkdir()  # another run's, which is still empty
    assert (tmp_path / "run").exists()


def test_a_seed_may_be_as_large_as_one_likes() -> None:
    with as_guest():
        seed_everything(2**70, 0, False)
        one = torch.rand(1)
        seed_everything(2**70, 1, False)
        assert torch.rand(1) != one


def test_a_run_that_fails_gives_the_signals_back() -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(ValueError, match="its own error"), StopRequest():
        assert [signal.getsignal(s) for s in SIGNALS] != before
        raise ValueError("its own error")
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_an_error_of_all_ranks_is_said_by_rank_0_first(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    slept = list[float]()
    monkeypatch.setattr("retool.run.start.time.sleep", slept.append)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("RANK", "0")
    assert exit_status_of_a_failure() == 1 and not slept
    assert capfd.readouterr().err == "error: no such thing\n"
    monkeypatch.setenv("RANK", "1")
    assert exit_status_of_a_failure() == 1 and slept[0] > 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)


def test_the_launcher_can_read_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    tell_launcher("nobody asks")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_launcher("1 fault, nothing started\nfoo=1: unknown key foo.")
    failure = ProcessFailure(
        local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json")
    )
    assert json.loads((tmp_path / "error.json").read_text()) and "unknown key foo." in str(
        ChildFailedError("sft", {0: failure})
    )


def test_a_programs_own_alarm_stays_on() -> None:
    """A run that nobody asked to stop leaves the process's one alarm to who set it."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.alarm(100)
        with StopRequest():
            pass
        assert signal.alarm(0) > 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
