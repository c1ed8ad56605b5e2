"""Judging in processes that can be killed: an answer that hangs or breaks the reward function loses
its score, and nothing else.

Workers are forked from a server process that is started with a clean environment, before any GPU is
touched, so that no secret and no device of the training process is ever in them, but what the run
names. What a worker may do is in `worker`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

from retool.processes import ForkServer
from retool.rl.reward import worker
from retool.rl.reward.calling import Asked, seen_by
from retool.rl.reward.protocol import JUDGES_LOST, Judged, Raised, retry_while_lost
from retool.rl.reward.source import RewardSource
from retool.rl.reward.worker import Doors, WorkerSetup
from retool.rl.types import FAILURE

LOAD_SECONDS = 60.0  # that a worker has to load the function
LOOK_SECONDS = 5.0  # between looks whether the pool still is: one that broke answers nothing
STOP_SECONDS = 2.0  # that workers have to be gone in
PRELOADED = ["retool.rl.reward.score", "retool.rl.reward.source", "math_verify"]


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
        # A file that isn't there, or doesn't import, is told here and now
        self.seen = seen_by(source.load())
        source = source.packed()
        self._leaders = Path(tempfile.mkdtemp(prefix="retool-judges-"))
        self._workers = workers
        self._timeout = timeout
        self._floor = floor
        doors = Doors(memory_mb, network, dict(environment or {}))
        self._setup = WorkerSetup(source, doors, timeout, self._leaders, LOAD_SECONDS)
        try:
            self._pool = self._open()
        except OSError:
            shutil.rmtree(self._leaders, ignore_errors=True)
            raise
        self._first_problem = self._pool.schedule(worker.problem)  # workers start meanwhile

    def problem(self) -> str:
        """Why the function, which loads here, can't be had in a worker, with the way out; "" where
        it can. Waits up to `LOAD_SECONDS`.
        """
        try:
            reason = self._first_problem.result(LOAD_SECONDS)
        except FutureTimeout:
            reason = f"it isn't loaded after {LOAD_SECONDS:g} s."
        except (ProcessExpired, BrokenExecutor):
            reason = f"its process ended meanwhile, or was ended after {LOAD_SECONDS:g} s."
        except KeyboardInterrupt:  # a worker that blocks would live on for a while
            self.close()
            raise
        if not reason:
            return ""
        source = self._setup.source
        lacking = "no secrets"
        network = ""
        if not self._setup.doors.network:
            lacking += " and no network"
            network = ", or give it the network: reward_model.network=true"
        return (
            f"{source.path or source.name} loads here but not in a reward worker (which has "
            f"{lacking}): {reason} Have the file read what it needs from a file, name the "
            f"variables that it needs: reward_model.environment=[NAME]{network}."
        )

    async def score(self, asked: Asked, timeout: float | None = None) -> Judged:
        """The function's verdict on one call, within `timeout` seconds (None: the pool's own). A
        pool that breaks is replaced, and the call made again.
        """
        return await retry_while_lost(lambda: self._attempt(asked, timeout or self._timeout))

    async def _attempt(self, asked: Asked, timeout: float) -> Judged:
        try:
            pool = self._sound_pool()
        except OSError as error:
            return self._failed(JUDGES_LOST, str(error))
        # The time counts from when a worker takes the job, not from here: a queue costs nobody a
        # score.
        job = pool.schedule(worker.work, args=(asked,), timeout=timeout)
        answer = asyncio.wrap_future(job)
        try:
            while not answer.done():
                # A pool that broke answers none of its jobs, so somebody has to look.
                await asyncio.wait([answer], timeout=LOOK_SECONDS)
                if not (answer.done() or pool.active):
                    return self._failed(JUDGES_LOST, "the processes that judge are gone")
        finally:
            answer.cancel()
        try:
            said = answer.result()
        except (FutureTimeout, asyncio.TimeoutError):
            return self._failed("timeout", f"no score within {timeout:g} s")
        except BrokenExecutor as error:
            return self._failed(JUDGES_LOST, f"the processes that judge are gone: {error}")
        except ProcessExpired as error:
            return self._failed("killed", str(error))
        # The pool's own: what can't be sent, or a pool that breaks
        except (Exception, asyncio.CancelledError) as error:
            return self._failed("exception", f"{type(error).__name__}: {error}")
        if isinstance(said, Raised):
            self._sweep()
            return said.judged(self._floor)
        return Judged(*said)

    def _failed(self, failure: str, reason: str) -> Judged:
        self._sweep()
        return Judged(self._floor, {FAILURE: reason}, failure, reason)

    def _open(self) -> ProcessPool:
        """Start the processes; OSError, with the way out, where the machine has no room for them."""
        context = ForkServer()
        try:
            with _clean_environment():
                context.set_forkserver_preload(PRELOADED)
                forkserver.ensure_running()
                return ProcessPool(
                    self._workers,
                    initializer=worker.start_worker,
                    initargs=(self._setup,),
                    context=context,  # pyright: ignore[reportArgumentType]
                )
        except OSError as error:
            raise OSError(
                f"the processes that judge can't be started ({error.strerror or error}): they need "
                "room for their semaphores in /dev/shm. Remove what fills it, or give the "
                "container more (--shm-size=1g)."
            ) from error

    def _sound_pool(self) -> ProcessPool:
        """The pool, or a new one if it broke: the server of its processes was killed, for example
        for want of memory.
        """
        if not self._pool.active:
            self._stop()
            self._pool = self._open()
        return self._pool

    def close(self) -> None:
        """Stop the workers, whatever they are doing, and what they have started."""
        self._stop()
        shutil.rmtree(self._leaders, ignore_errors=True)

    def _stop(self) -> None:
        self._pool.stop()
        self._pool.join()
        deadline = time.monotonic() + STOP_SECONDS
        # A process that ended is there until its parent has noticed
        while self._sweep() and time.monotonic() < deadline:
            time.sleep(0.02)
        for file in self._leaders.iterdir():  # whatever it is doing: none outlives the run
            _kill_group(int(file.name))

    def _sweep(self) -> bool:
        """Kill what workers that are gone have left running; whether there are workers still.

        Each leads a process group, and has a file with its process id as name.
        """
        for file in self._leaders.iterdir():
            pid = int(file.name)
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                # The worker is gone, but not what it started: its group still has the worker's
                # number.
                _kill_group(pid)
                file.unlink(missing_ok=True)
        return any(self._leaders.iterdir())

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


@contextmanager
def _clean_environment() -> Iterator[None]:
    """Without anything that could be a secret, for what is started inside: a process keeps the
    environment it was started with.
    """
    before = dict(os.environ)
    for name in before:
        if not worker.is_harmless(name):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)
