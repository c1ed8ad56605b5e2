"""The harness of distributed tests says at once what went wrong on which rank, whatever way a
process ends.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

import pytest

from tests import warm
from tests.ranks import PRELOADED, run_ranks, server


def _rank() -> int:
    return int(os.environ["RANK"])


def _die() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(100)  # a peer that waits for it


def _fail() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("nothing works")
    time.sleep(100)


def test_results_come_by_rank() -> None:
    assert run_ranks(_rank, 3) == [0, 1, 2]


def test_a_dead_or_failing_rank_is_told_at_once() -> None:
    for function, told in (
        (_die, "rank 1 of 2 ended with exit code 3"),
        (_fail, "rank 1 of 2 failed:(.|\n)*nothing works"),
    ):
        begin = time.monotonic()
        with pytest.raises(AssertionError, match=told):
            run_ranks(function, 2)
        assert time.monotonic() - begin < 60, "it must not wait for the timeout"


def test_a_module_that_fails_on_import_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import multiprocessing\nif multiprocessing.parent_process() is not None:\n    raise ImportError('not here')\ndef run(): pass\n"
    (tmp_path / "imported_only_once.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("imported_only_once")
    with pytest.raises(AssertionError, match=r"rank . of 2 failed:(.|\n)*not here"):
        run_ranks(module.run, 2)


def test_a_rank_that_hangs_is_told_after_the_timeout() -> None:
    with pytest.raises(AssertionError, match=r"rank \[0\] of 1: no result in 0.5 s"):
        run_ranks(time.sleep, 1, 100, timeout=0.5)


def _not_imported() -> list[str]:
    return [name for name in PRELOADED if name not in sys.modules]


def test_a_rank_is_a_fork_of_one_thread_that_has_imported_what_is_slow() -> None:
    """No thread has been started that a fork would lose."""
    assert run_ranks(_not_imported, 1) == [[]]
    pid = server._forkserver_pid  # type: ignore[attr-defined]
    assert len(os.listdir(f"/proc/{pid}/task")) == 1


@pytest.mark.parametrize(
    ("code", "status", "out", "err"),
    [
        ("import sys; print(sys.argv, flush=True)", 0, "['-c', 'a', 'b']\n", ""),
        ("import sys; sys.exit('no way')", 1, "", "no way\n"),
        ("import sys; sys.exit(7)", 7, "", ""),
        ("raise ValueError('this')", 1, "", "ValueError: this\n"),
        ("import os; print('last', flush=True); os.kill(os.getpid(), 9)", -9, "last\n", ""),
        ("raise KeyboardInterrupt", -2, "", "KeyboardInterrupt\n"),
        ("import atexit; atexit.register(print, 'end'); print('begin')", 0, "begin\nend\n", ""),
        (
            "import threading, time\n"
            "threading.Thread(target=lambda: [time.sleep(0.1), print('late')]).start()",
            0,
            "late\n",
            "",
        ),
    ],
)
def test_a_warm_command_ends_as_a_new_interpreter_does(
    code: str, status: int, out: str, err: str
) -> None:
    done = warm.run([sys.executable, "-c", code, "a", "b"])
    assert (done.returncode, done.stdout) == (status, out)
    assert done.stderr.endswith(err) and (err or not done.stderr), done.stderr
