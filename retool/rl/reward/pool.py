"""Judging in processes that can be killed: an answer that hangs, bombs or breaks the reward
function costs it its score, no more.

Workers are forked from a server process that is started with a clean environment, before any GPU is
touched, so that no secret and no device of the training process is ever in them, but what the run
names. They have a memory limit, and can open no network socket unless the run lets them.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from retool.rl.reward.judging import (
    JUDGES_LOST,
    Asked,
    Judged,
    Raised,
    asked_of,
    insistently,
    raised,
)
from retool.rl.reward.rewards import LONGEST, RewardFunction, RewardSource, judge
from retool.rl.types import FAILURE, Trajectory

KEPT = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SSL_CERT_FILE")
KEPT_PREFIXES = ("LC_", "PYTHON", "OMP_", "MKL_")
LOAD = 60.0  # seconds that a worker has to load the function
LOOK = 5.0  # seconds between looks whether the pool still is: one that broke answers nothing
PRELOADED = ["retool.rl.reward.rewards", "math_verify"]
_function: RewardFunction | None = None  # a worker's own
_problem = ""  # why it has none
_longest = 0  # seconds after which it ends itself, in case nobody is left who would


class RewardPool:
    """Processes that judge trajectories with one reward function.

    Close it, or use it as a context.
    """

    def __init__(
        self,
        source: RewardSource,
        workers: int = 2,
        timeout: float = 2.0,
        memory_mb: int = 2048,
        floor: float = -1.0,
        network: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`network`: the workers may open sockets.

        `environment` is added to what they keep of the run's.
        """
        source.load()  # a file that isn't there, or doesn't import, is told here and now
        self._leaders = Path(tempfile.mkdtemp(prefix="retool-judges-"))
        self.timeout = timeout
        self.floor = floor
        self._workers = workers
        doors = Doors(memory_mb, network, dict(environment or {}))
        self._arguments = source, doors, timeout, self._leaders, LOAD
        self._pool = self._open()
        self._ready = self._pool.schedule(_told)  # workers start meanwhile

    def problem(self) -> str:
        """Why the function, which loads here, can't be had in a worker, with the way out; "" where
        it can. Waits up to `LOAD` seconds.
        """
        try:
            reason = self._ready.result(LOAD)
        except FutureTimeout:
            reason = f"it isn't loaded after {LOAD:g} s."
        except (ProcessExpired, BrokenExecutor):
            reason = f"its process ended meanwhile, or was ended after {LOAD:g} s."
        except KeyboardInterrupt:  # a worker that blocks would live on for a while
            self.close()
            raise
        source, doors = self._arguments[:2]
        without = " and no network" if not doors.network else ""
        opened = ", or give it the network: reward_model.network=true" if not doors.network else ""
        return reason and (
            f"{source.path or source.name} loads here but not in a reward worker (which has no "
            f"secrets{without}): {reason} Have the file read what it needs from a file, name the "
            f"variables that it needs: reward_model.environment=[NAME]{opened}."
        )

    def _open(self) -> ProcessPool:
        context = multiprocessing.get_context("forkserver")
        with _clean_environment():
            context.set_forkserver_preload(PRELOADED)
            forkserver.ensure_running()
            return ProcessPool(
                self._workers,
                initializer=_start_worker,
                initargs=self._arguments,
                context=context,  # pyright: ignore[reportArgumentType]
            )

    def _sound(self) -> ProcessPool:
        """The pool, or a new one where it broke: the server of its processes was killed, for want
        of memory say.
        """
        if not self._pool.active:
            self._stop()
            self._pool = self._open()
        return self._pool

    async def judge(self, trajectory: Trajectory) -> Judged:
        """The score of a finished trajectory; `floor` where the function raises, returns no finite
        number, or takes too long.
        """
        return await self.score(asked_of(trajectory))

    async def score(self, asked: Asked, timeout: float | None = None) -> Judged:
        """What the function says to one call, within `timeout` seconds (None: the pool's own). A
        pool that breaks is replaced, and the call made again.
        """
        return await insistently(lambda: self._attempt(asked, timeout or self.timeout))

    async def _attempt(self, asked: Asked, timeout: float) -> Judged:
        pool = self._sound()
        work = asyncio.wrap_future(pool.schedule(_work, args=tuple(asked), timeout=timeout))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=LOOK)
                if not (work.done() or pool.active):
                    return self._failed(JUDGES_LOST, "the processes that judge are gone")
        finally:
            work.cancel()
        try:
            found = work.result()
        except (FutureTimeout, asyncio.TimeoutError):
            return self._failed("timeout", f"no score within {timeout:g} s")
        except BrokenExecutor as error:
            return self._failed(JUDGES_LOST, f"the processes that judge are gone: {error}")
        except ProcessExpired as error:
            return self._failed("killed", str(error))
        except (
            Exception,
            asyncio.CancelledError,
        ) as error:  # the pool's own: what can't be sent, or a pool that breaks
            return self._failed("exception", f"{type(error).__name__}: {error}")
        if isinstance(found, Raised):
            self._sweep()
            return found.judged(self.floor)
        return Judged(*found)

    def _failed(self, failure: str, reason: str) -> Judged:
        self._sweep()
        return Judged(self.floor, {FAILURE: reason}, failure, reason)

    def close(self) -> None:
        """Stop the workers, whatever they are doing, and what they have started."""
        self._stop()
        shutil.rmtree(self._leaders, ignore_errors=True)

    def _stop(self) -> None:
        self._pool.stop()
        self._pool.join()
        deadline = time.monotonic() + 2.0
        # A process that ended is there until its parent has noticed
        while self._sweep() and time.monotonic() < deadline:
            time.sleep(0.02)
        for file in self._leaders.iterdir():  # whatever it is doing: none outlives the run
            with suppress(ProcessLookupError):
                os.killpg(int(file.name), signal.SIGKILL)

    def _sweep(self) -> bool:
        """Kill what workers that are gone have left running; whether there are workers still. Each
        leads a process group, and has a file with its number as name.
        """
        for file in self._leaders.iterdir():
            try:
                os.kill(int(file.name), 0)
            except ProcessLookupError:
                with suppress(ProcessLookupError):
                    os.killpg(int(file.name), signal.SIGKILL)
                file.unlink(missing_ok=True)
        return any(self._leaders.iterdir())

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(
    data_source: str, solution: str, truth: str, extra: Mapping[str, Any]
) -> tuple[float, dict[str, Any]] | Raised:
    """What `judge` gives, or why it gave nothing, as text: an exception of the user's own may not
    survive the way to the parent, and SystemExit or CancelledError would be taken for the parent's
    own.
    """
    if _function is None:
        return Raised(_problem)
    worker = os.getpid()
    signal.alarm(_longest)
    try:
        return judge(_function, data_source, solution, truth, extra)
    except BaseException as error:
        return raised(error)
    finally:
        signal.alarm(0)
        # The function forked, and this is the child: it must not go on as a second worker
        if os.getpid() != worker:
            os._exit(0)


def _told() -> str:
    """Why this worker has no function; "" where it has."""
    return _problem


class Doors(NamedTuple):
    """What a worker may use: memory beyond the interpreter's own, the network, and variables
    besides the harmless ones.
    """

    memory_mb: int
    network: bool
    environment: Mapping[str, str]


def _start_worker(
    source: RewardSource, doors: Doors, timeout: float, leaders: Path, load_s: float
) -> None:
    """In the worker: make ready to judge, or to tell why it can't.

    One that blocks ends itself: nobody else would, once the run is gone.
    """
    global _function, _problem, _longest
    _longest = int(timeout) + 60
    (leaders / str(os.getpid())).touch()
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.setitimer(signal.ITIMER_REAL, load_s)
    try:
        _function = _load(source, doors)
    except BaseException as error:  # the pool would take it for its own end
        _problem = (
            str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}."
        )[:LONGEST]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _load(source: RewardSource, doors: Doors) -> RewardFunction:
    """Forget the environment, load the function, then shut the doors."""
    for name in [name for name in os.environ if not _harmless(name)]:
        del os.environ[name]
    os.environ.update(doors.environment)
    function = source.load()
    # What the built-in ones import when first called would count against that answer's seconds
    if source.path is None:
        importlib.import_module("math_verify")
    with open(
        "/proc/self/statm", encoding="ascii"
    ) as sizes:  # what the interpreter has mapped already doesn't count
        mapped = int(sizes.read().split()[0]) * resource.getpagesize()
    limit = mapped + doors.memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux" and not doors.network:
        _forbid_sockets()
    return function


def _harmless(name: str) -> bool:
    return name in KEPT or name.startswith(KEPT_PREFIXES)


@contextmanager
def _clean_environment() -> Iterator[None]:
    """Without anything that could be a secret, for what is started inside: a process keeps the
    environment it was started with.
    """
    before = dict(os.environ)
    for name in before:
        if not _harmless(name):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


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
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, AUDIT_ARCH[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (equal, 3, 0, table["io_uring_setup"]),
        (equal, 0, 3, table["socket"]),
        (load, 0, 0, 16),
        (equal, 1, 0, 1),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) == 0:  # PR_SET_NO_NEW_PRIVS
        install(b"".join(struct.pack("HBBI", code, jt, jf, k) for code, jt, jf, k in program))
