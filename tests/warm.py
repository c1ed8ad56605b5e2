"""Commands of Python as a shell would start them, but as forks of the warm server of ranks: a new
interpreter spends four seconds on importing torch and transformers, and `torchrun` one for each.

What a fork can't show needs `subprocess`: what an import costs, and what is read from the
environment while a library is imported. The published SFT command is started that way too.
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
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, process
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, NamedTuple

from tests.ranks import RankContext

Argument = str | os.PathLike[str]


class _Call(NamedTuple):
    """A command line and what it is started with."""

    arguments: list[str]  # after the interpreter's name
    environment: dict[str, str]
    folder: str


class Command:
    """A started command: the part of `subprocess.Popen` that tests use.

    `stdout` is a file of text that ends when the command and all who inherited it have ended; with
    `log` there is none, and the file of that name has what was said.
    """

    def __init__(
        self,
        command: Sequence[Argument],
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        if log is None:
            reader, writer = os.pipe()
            self.stdout: IO[str] | None = os.fdopen(reader)
        else:
            writer = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            self.stdout = None
        try:
            self._process = _fork(command, (writer, writer), env, cwd)
        finally:
            os.close(writer)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def said(self) -> str:
        """All of its output, once it has ended."""
        assert self.stdout is not None
        with self.stdout:
            text = self.stdout.read()
        self.wait(20)
        return text

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s"
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[Argument],
    timeout: float = 170,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run(command, capture_output=True, text=True)` gives. `command` is a Python
    with `-m module`, `-c code` or a script, and words.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        forked = _fork(command, (out.fileno(), err.fileno()), env, cwd)
        forked.join(timeout)
        if forked.exitcode is None:
            forked.kill()
            raise subprocess.TimeoutExpired([*map(str, command)], timeout)
        said = [(file.seek(0), file.read())[1] for file in (out, err)]
    return subprocess.CompletedProcess([*map(str, command)], forked.exitcode, *said)


def _fork(
    command: Sequence[Argument],
    outputs: tuple[int, int],
    env: Mapping[str, str] | None,
    cwd: Path | None,
) -> process.BaseProcess:
    python, *arguments = map(os.fspath, command)
    assert python == sys.executable, f"{python} is no Python of ours"
    call = _Call(arguments, dict(os.environ if env is None else env), str(cwd or Path.cwd()))
    forked = RankContext().Process(target=_begin, args=(call, *map(_Output, outputs)))
    forked.start()
    return forked


class _Output:
    """A file descriptor that a fork gets a copy of when this is pickled for it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (DupFd(self.number),)


def _opened(copy: Any) -> int:
    return copy.detach()


def _begin(call: _Call, *outputs: int) -> None:
    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
    for output in set(outputs):
        os.close(output)
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

    (count,) = (int(word.split("=")[1]) for word in words if word.startswith("--nproc_per_node="))
    waiting = [_waiting_worker() for _ in range(count)]

    class Popen(subprocess.Popen[str]):
        """What the launcher starts is the next of the waiting workers."""

        def _execute_child(self, args: Any, *rest: Any) -> None:
            environment = rest[5]
            assert environment is not None
            self.pid, line = waiting.pop(0)
            self._child_created = True
            call = _Call([*args[1:]], environment, os.getcwd())
            with line:
                line.sendall(pickle.dumps(call))

    subprocess_handler.Popen = Popen


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
