"""The supervisor as its caller sees it: started or joined, started again if it has died, and ended
at last.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from . import sharing, spawn
from .connection import START_SECONDS, Connection
from .layers import Plan
from .rootfs import sweep

# Before the first attempt to mend something; each further one waits twice as long
BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 30.0
# After which a supervisor counts as sound: the next restart is a first one again
STEADY_SECONDS = 60.0


def backoff(attempt: int) -> float:
    """Seconds to wait before attempt number `attempt`, counted from 0."""
    return min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2**attempt)


class Keeper:
    """Holds a connection to a supervisor that runs `setup`: one of its own, or, under a name that
    processes share, perhaps another's.

    ValueError where strict isolation is refused, OSError where the supervisor fails. `hello` is
    what the supervisor found.
    """

    def __init__(
        self, setup: dict[str, Any], share: str, python: str, launcher: Sequence[str]
    ) -> None:
        self.python = python
        self.restarts = 0
        self.closed = False
        self._setup = setup
        self._launcher = launcher
        self._address = sharing.address(share, setup) if share else ""
        # The owner's of a shared sandbox; it outlives a supervisor
        self._listener: socket.socket | None = None
        # The supervisor, where it is this process's own
        self._process: subprocess.Popen[bytes] | None = None
        self._restarting = threading.Lock()
        self._attempts = 0  # restarts in a row
        self._start()

    @property
    def owner(self) -> bool:
        """Whether the supervisor is this process's own; a guest of another's only has a connection
        to it.
        """
        return self._process is not None

    def _start(self) -> None:
        """Connect to a supervisor, a new one or another process's, and hear what it found."""
        self.connection = self._join() if self._address else self._own()
        if "refused" in self.connection.hello:
            self.connection.close()
            self._end_process()
            self._let_go()
            raise ValueError(
                f"sandbox.isolation=strict: {self.connection.hello['refused']} Run `python -m "
                "retool.sandbox doctor` for the whole picture, or accept what is missing: "
                "isolation=best_effort (in a run, tool_isolation=best_effort)."
            )
        self.hello: dict[str, Any] = self.connection.hello["hello"]
        self.plan = Plan.from_json(self.hello["plan"])
        self._started = time.monotonic()

    def _own(self) -> Connection:
        """Start a supervisor.

        With a listener it serves other processes too, and is started again as soon as it has gone.
        """
        ours, theirs = socket.socketpair()
        inherited = [] if self._listener is None else [self._listener.fileno()]
        setup = {**self._setup, "listener": inherited[0] if inherited else None}
        self._process = spawn.start(
            "supervisor", setup, theirs, self.python, self._launcher, inherited=inherited
        )
        theirs.close()
        # Weak, or the connection's thread would keep alive who is to end it
        myself: weakref.ref[Keeper] = weakref.ref(self)
        try:
            return Connection(ours, partial(_start_again, myself) if inherited else None)
        except OSError:
            self._end_process()
            raise

    def _join(self) -> Connection:
        """Own the shared sandbox, or be a guest of whoever does.

        One that ends meanwhile makes room for the next owner.
        """
        end = time.monotonic() + START_SECONDS
        # Either this process gets the name, or it reaches whoever has it. Between the two the owner
        # may end.
        while self._listener is None:
            self._listener = sharing.claim(self._address)
            if self._listener is not None:
                break
            guest = sharing.join(self._address)
            if guest is not None:
                with contextlib.suppress(OSError):
                    return Connection(guest)
            if time.monotonic() > end:
                raise OSError(f"nobody answers for the shared sandbox within {START_SECONDS:g} s.")
            time.sleep(BACKOFF_SECONDS / 10)
        try:
            return self._own()
        except OSError:
            self._let_go()
            raise

    def _let_go(self) -> None:
        """No longer be the owner of a shared sandbox."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _end_process(self) -> None:
        """A supervisor of this process's own that isn't to go on, or that only seems to."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def revive(self) -> str:
        """Start the supervisor again if it is gone, which takes a while; "", or why there is none."""
        if self.connection.alive:
            return ""
        with self._restarting:  # one caller restarts it, the others wait for that
            if self.closed:
                return "the sandbox is closed"
            if self.connection.alive:
                return ""
            if self._process is not None:
                self._end_process()
                sweep(self.hello["scratch"])
            if time.monotonic() - self._started > STEADY_SECONDS:
                self._attempts = 0
            # A supervisor that dies at once would otherwise be started again and again, with a fork
            # server each.
            if self._attempts:
                time.sleep(backoff(self._attempts - 1))
            self._attempts += 1
            try:
                self._start()
            except (OSError, ValueError) as error:
                return f"the sandbox's supervisor died and can't be started again: {error}"
            self.restarts += 1
            return ""

    def close(self) -> None:
        """End the supervisor, or only the connection where it is another process's."""
        self.closed = True
        with self._restarting:  # nobody starts another meanwhile
            self.connection.hang_up()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=15)
            self._end_process()
        self._let_go()
        self.connection.close()


def _start_again(keeper: weakref.ref[Keeper]) -> None:
    """The owner's duty when its supervisor has gone: guests can't, and may need one before the
    owner does.
    """
    alive = keeper()
    while alive is not None and not alive.closed and alive.revive():
        time.sleep(BACKOFF_SECONDS)
