"""Inside a reward worker: it loads the function, gives up its rights, and judges answers.

A worker has a memory limit, none of the run's environment but what is harmless or named, and can
open no network socket unless the run lets it.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retool.rl.reward.calling import Asked, RewardFunction
from retool.rl.reward.protocol import Raised
from retool.rl.reward.score import MAX_CHARACTERS, score_answer
from retool.rl.reward.source import RewardSource

# Variables that are no secrets
HARMLESS = (
    "PATH",
    "HOME",
    "LANG",
    "TZ",
    "TMPDIR",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
)
HARMLESS_PREFIXES = ("LC_", "PYTHON", "OMP_", "MKL_")
GRACE_SECONDS = 60  # beyond a call's own limit, after which a worker ends itself


@dataclass(frozen=True)
class Doors:
    """What a worker may use: memory beyond the interpreter's own, the network, and variables
    besides the harmless ones.
    """

    memory_mb: int
    network: bool
    environment: Mapping[str, str]


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker is told at its start.

    `timeout` is a call's, `load_seconds` the function's to be loaded. `leaders` is a folder in
    which each worker has a file, with its process id as name.
    """

    source: RewardSource
    doors: Doors
    timeout: float
    leaders: Path
    load_seconds: float


# A worker's own, set once by `start_worker`
_function: RewardFunction | None = None
_problem = ""  # why it has no function
_life_seconds = 0  # of a call, after which it ends itself, in case nobody is left who would


def start_worker(setup: WorkerSetup) -> None:
    """Get ready to judge, or to tell why that isn't possible.

    A function that blocks while it loads ends its worker: nobody else would, once the run is gone.
    """
    global _function, _problem, _life_seconds
    _life_seconds = int(setup.timeout) + GRACE_SECONDS
    (setup.leaders / str(os.getpid())).touch()
    # A group of its own: whoever ends the worker ends its children with it.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.setitimer(signal.ITIMER_REAL, setup.load_seconds)
    try:
        _function = _load(setup.source, setup.doors)
    except BaseException as error:  # the pool would take it for its own end
        plain = isinstance(error, ValueError)
        problem = str(error) if plain else f"{type(error).__name__}: {error}."
        _problem = problem[:MAX_CHARACTERS]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def problem() -> str:
    """Why this worker has no function; "" if it has one."""
    return _problem


def work(asked: Asked) -> tuple[float, dict[str, Any]] | Raised:
    """What `score_answer` gives, or why it gave nothing, as text: an exception of the user's own
    may not survive the way to the parent, and SystemExit or CancelledError would be taken for the
    parent's own.
    """
    if _function is None:
        return Raised(_problem)
    worker = os.getpid()
    # The pool's own limit is shorter. This one is for a worker whose pool was killed: it must not
    # judge for ever.
    signal.alarm(_life_seconds)
    try:
        return score_answer(_function, asked)
    except BaseException as error:
        return Raised.by(error)
    finally:
        signal.alarm(0)
        # The function forked, and this is the child: it must not go on as a second worker
        if os.getpid() != worker:
            os._exit(0)


def is_harmless(name: str) -> bool:
    """Whether an environment variable can be no secret, by its name."""
    return name in HARMLESS or name.startswith(HARMLESS_PREFIXES)


def _load(source: RewardSource, doors: Doors) -> RewardFunction:
    """Forget the environment, load the function, then shut the doors."""
    for name in list(os.environ):
        if not is_harmless(name):
            del os.environ[name]
    os.environ.update(doors.environment)
    function = source.load()
    # What the built-in ones import when first called would count against that answer's seconds
    if not source.is_users:
        importlib.import_module("math_verify")
    limit = _mapped_bytes() + doors.memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux" and not doors.network:
        _forbid_sockets()
    return function


def _mapped_bytes() -> int:
    """Address space that the interpreter has already: it doesn't count against the function."""
    with open("/proc/self/statm", encoding="ascii") as sizes:
        return int(sizes.read().split()[0]) * resource.getpagesize()


def _forbid_sockets() -> None:
    """A system-call filter: sockets but Unix ones can't be made, io_uring (another way to one)
    neither; see seccomp(2).
    """
    from retool.sandbox.seccomp import install
    from retool.sandbox.syscalls import AUDIT_ARCH, TABLES

    machine = os.uname().machine
    if machine not in TABLES:
        return
    load = 0x20
    equal = 0x15
    give = 0x06
    deny = 0x00050000 | errno.EPERM
    allow = 0x7FFF0000
    kill = 0x80000000
    table = TABLES[machine]
    # (instruction, jump if so, jump if not, operand): a jump skips that many instructions
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, AUDIT_ARCH[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (equal, 3, 0, table["io_uring_setup"]),
        (equal, 0, 3, table["socket"]),
        (load, 0, 0, 16),  # its first argument, the family
        (equal, 1, 0, 1),  # AF_UNIX
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) == 0:  # PR_SET_NO_NEW_PRIVS
        install(
            b"".join(struct.pack("HBBI", code, so, not_so, k) for code, so, not_so, k in program)
        )
