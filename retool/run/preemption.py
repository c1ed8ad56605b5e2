"""Requests to stop: SIGTERM, SIGUSR1 or Ctrl-C in any worker, or a launcher that died.

All ranks agree once a step.

torchrun passes TERM on and kills after 30 seconds; of USR1 it dies itself unless told otherwise, so
start it with `--signals-to-handle SIGTERM,SIGUSR1` (and, for a large model, a longer
`--shutdown-timeout` or TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from retool.parallel.collectives import gather_objects
from retool.parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PR_SET_PDEATHSIG = 1
GRACE = 600  # seconds from a request to stop to the end of the process, whatever it hangs in
# seconds in which SIGINT may come twice of one Ctrl-C: from the terminal, and from the launcher
ONE_CTRL_C = 2.0
PROBLEM = 2  # in place of 1, asked to stop: one all-reduce carries both
INTERRUPTED = b"\nstopping: what is done will be saved. Ctrl-C again ends at once, without that.\n"


class StopRequest:
    """Remembers a signal to stop; `agreed` is True on every rank as soon as one has had one.

    Make it when there is something to save: until then a signal ends the process at once. A process
    that isn't done `GRACE` seconds later (a peer is dead, a disk hangs) is ended by an alarm. A
    second Ctrl-C doesn't wait for anything.

    `problems` are asked at every agreement for what ends the run at once: each returns None, or a
    sentence for the user.
    """

    def __init__(self, *problems: Callable[[], str | None]) -> None:
        self._problems = problems
        self.received: int | None = None
        self._since = 0.0
        # Python gives signals to its main thread only: a run in another one isn't asked to stop.
        heard = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {s: signal.signal(s, self._remember) for s in heard}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            again = time.monotonic() - self._since > ONE_CTRL_C
            if number == signal.SIGINT and again:
                raise KeyboardInterrupt
            return
        # `_since` first: another signal may come between the two.
        self._since = time.monotonic()
        self.received = number
        # The system's alarm, not a thread: it ends a process that is stuck outside Python, too.
        signal.alarm(GRACE)
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            os.write(2, INTERRUPTED)  # `print` isn't for signal handlers

    def agreed(self, mesh: Mesh) -> bool:
        """Whether any rank was asked to stop.

        Collective, on the host alone: the device isn't waited for.

        ValueError on every rank where one of them has a problem, with the first one's sentence.
        """
        problem = self._first_problem()
        # The maximum over the ranks: a problem (2) outweighs a request to stop (1).
        flag = torch.tensor(PROBLEM if problem is not None else int(self.received is not None))
        if mesh.world_group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=mesh.world_group)
        if int(flag) == PROBLEM:
            problems = gather_objects(problem, mesh.world_group)
            raise ValueError(next(said for said in problems if said is not None))
        return bool(flag)

    def _first_problem(self) -> str | None:
        for ask in self._problems:
            problem = ask()
            if problem is not None:
                return problem
        return None

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the signals back.

        KeyboardInterrupt where it was Ctrl-C that stopped the run: scripts must not go on after it.
        """
        if self.received is not None:
            signal.alarm(0)
        for number, handler in self._before.items():
            # None: it wasn't Python that set it, and Python can't set it again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if kind is None and self.received == signal.SIGINT:
            raise KeyboardInterrupt


def die_with_parent() -> None:
    """Ask Linux for a SIGTERM when the launcher dies, so that no worker is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
