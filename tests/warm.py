"""Commands of Python as a shell would start them, but as forks of the warm server of ranks: a new
interpreter spends four seconds on importing torch and transformers, and `torchrun` one for each.

What a fork can't show needs `subprocess`: what an import costs, and what is read from the
environment while a library is imported. The published SFT command is started that way too, by the slow tests.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver, process
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NamedTuple

from tests.ranks import RankContext

Argument = str | os.PathLike[str]


class _Call(NamedTuple):
    """A command line and what it is started with."""

    arguments: list[str]  # after the interpreter's name
    environment: dict[str, str]
    folder: str


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen`, for which a command of this Python (`-m module`, `-c code` or a script,
    and words) is a fork of the warm server. Any other command is started as ever.
    """

    _forked: process.BaseProcess | None = None

    def _execute_child(self, args: Any, *rest: Any) -> None:
        words = [args] if isinstance(args, str) else [*map(os.fspath, args)]
        if words[0] != sys.executable or not _is_readable(words[1]):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        folder, environment = rest[4:6]
        pipes = rest[9:15]
        call = _Call(words[1:], dict(environment or os.environ), os.fspath(folder or Path.cwd()))
        inputs_and_outputs = (pipes[0], pipes[3], pipes[5])
        ends = [
            _Descriptor(standard if end == -1 else end)
            for standard, end in enumerate(inputs_and_outputs)
        ]
        self._forked = RankContext().Process(target=_begin, args=(call, *ends))
        self._forked.start()
        assert self._forked.pid is not None
        self.pid = self._forked.pid
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _internal_poll(self, **_: Any) -> int | None:
        if self._forked is None:
            return super()._internal_poll()  # type: ignore[misc]
        self.returncode = self._forked.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._forked is None:
            return super()._wait(timeout)  # type: ignore[misc]
        self._forked.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


def run(command: Sequence[Argument], timeout: float = 170) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run(command, capture_output=True, text=True)` gives."""
    pipe = subprocess.PIPE
    with Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess([*map(str, command)], process.returncode, *said)


def _is_readable(word: str) -> bool:
    """Whether `_interpret` knows what to do with an interpreter's first word."""
    return word in ("-m", "-c", "-u") or Path(word).is_file()


class _Descriptor:
    """A file descriptor that a fork gets a copy of when this is pickled for it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (DupFd(self.number),)


def _opened(copy: Any) -> int:
    return copy.detach()


def _begin(call: _Call, *ends: int) -> None:
    for number, end in enumerate(ends):
        os.dup2(end, number)
    for end in set(ends):
        os.close(end)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    # Who looks finds a main process without a parent, which starts a fork server of its own
    this = multiprocessing.current_process()
    this.__dict__ |= {"_identity": (), "_parent_pid": None, "_name": "MainProcess"}
    this._config.pop("daemon", None)
    process._parent_process = None  # type: ignore[attr-defined]
    forkserver._forkserver.__init__()  # type: ignore[attr-defined]
    os._exit(_execute(call))


def _execute(call: _Call) -> int:
    """Run a command line in this process, and give the status that Python would end with."""
    os.environ.clear()
    os.environ.update(call.environment)
    os.chdir(call.folder)
    try:
        status = _status(call.arguments)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    return status


def _status(arguments: list[str]) -> int:
    try:
        _interpret(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _interpret(arguments: list[str]) -> None:
    """As `python` reads its own command line."""
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        arguments = arguments[1:]
    kind, *words = arguments
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    if kind == "-m":
        module, *words = words
        sys.argv = [module, *words]
        sys.path.insert(0, os.getcwd())
        if module == "torch.distributed.run":
            _prepare_workers(words)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, *words = words
        sys.argv = ["-c", *words]
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [kind, *words]
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")


# -- torchrun
# --------------------------------------------------------------------------------------------------------


def _prepare_workers(words: Sequence[str]) -> None:
    """Fork the workers of a launcher before it has a thread. They wait for what they are to run."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    numbers = dict(word.split("=", 1) for word in words if word[:2] == "--" and "=" in word)
    count = int(numbers["--nproc_per_node"])
    starts = 1 + int(numbers.get("--max-restarts", 0))
    waiting = [_waiting_worker() for _ in range(count * starts)]

    class Worker(subprocess.Popen[str]):
        """What the launcher starts is the next of the waiting workers."""

        def _execute_child(self, args: Any, *rest: Any) -> None:
            folder, environment = rest[4:6]
            call = _Call([*args[1:]], dict(environment), folder or os.getcwd())
            self.pid, line = waiting.pop(0)
            self._child_created = True
            with line:
                line.sendall(pickle.dumps(call))

    subprocess_handler.Popen = Worker


def _waiting_worker() -> tuple[int, socket.socket]:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    ours.close()
    os.setsid()
    try:
        with theirs, theirs.makefile("rb") as line:
            call = pickle.load(line)
    except EOFError:  # the launcher has ended without a worker
        os._exit(0)
    os._exit(_execute(call))
